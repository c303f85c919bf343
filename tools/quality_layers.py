"""The part of docs/quality.md about single keys at 7.6K and 24K tokens, from bench/results/lab-layers.json.

bench/lab/layers.py made that file; tools/quality.py puts this part into the page.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flashprefill.apps.lab import texts

HEAD = """
## Every line on a CPU: single keys beside blocks, prose and code

By `bench/lab/layers.py` on dumps of the lab's texts, fp32: the lab's own lines and figures, one
thread per layer and line. *long* is the long text above, *long-code* Python's `argparse.py` and
`typing.py`, both with the rotary base scaled four times. Methods that pick single keys
([Gather](methods/gather.md), [S2O](methods/s2o.md), [VSPrefill](methods/vsprefill.md) and
[MInference](methods/minference.md) in tokens) stand beside those that pick blocks. Gather's blocks,
for the nearest keys alone, have 32 keys, one sink and two window blocks. First come the six layers
of the lab, then all thirty for the lines that matter most.
"""
SHORT, LONG = ("0.1", "0.15", "0.2", "0.25"), ("0.05", "0.1", "0.15", "0.2")
LONG_FROM = 16384


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(at: dict[str, float] | None) -> str:
    if at is None:
        return "-"
    return f"{at['recall']:.3f} ({at['recall_p5']:.2f}); {at['error']:.3f} ({at['error_corrected']:.3f})"


def section(results: dict[str, Any], ran: Callable[[dict[str, Any]], str]) -> list[str]:
    """A table for each text and set of layers; lines that lack layers of it stand in no table."""
    lines, known = [HEAD, ran(results)], texts.known()
    lines[1] = lines[1].rstrip() + (f" ({results['note']})" if "note" in results else "")
    lines.append("")
    for text in results["texts"]:
        tokens = known[text["name"]].tokens
        densities = LONG if tokens >= LONG_FROM else SHORT
        whole = [one for one in text["methods"] if one["layers"] == text["layers"]]
        if not whole:
            continue
        layers = text["layers"]
        which = f"layers {', '.join(map(str, layers))}" if len(layers) < 12 else f"all {len(layers)} layers"
        lines.append(
            f"{text['name']}, {tokens:,} tokens, {which}: recall (5th percentile); error (corrected)\n"
        )
        lines += [_row(["", *(f"density {d}" for d in densities)]), "|" + "---|" * (1 + len(densities))]
        lines += [_row([one["label"], *(_cell(one["at"][d]) for d in densities)]) for one in whole]
        lines.append("")
    return lines
