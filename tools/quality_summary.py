"""The part of docs/quality.md about summary keys, from bench/results/lab-summary-keys*.json.

bench/lab/summary_keys.py made those files; tools/quality.py puts this part into the page.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

HEAD = """
## Summary keys

The mean correction gives every block that is left out a key of its own. `mean_correction="summary"`
gives one to the blocks left out of 16 neighbouring ones. How much of the exact form's gain, in the
output error of a tile, is left of it, and of other ways to save keys (`bench/lab/summary_keys.py`,
which takes a folder of `flashprefill lab --dump`): other numbers of blocks per key; plain means of
64 blocks, which no query weighs; a plain mean of each 4 neighbours that are all left out, and single
blocks by themselves, which gains as much with four times the keys. *Shared* tiles have a key for
each head; one that the heads' mean query weighs is worth much less.
"""
TAIL = """
So a key may stand for 16 blocks where at least 85 % of the gain is to be left, which all rows above
have; with 64 it is below that wherever little is left out that matters. One model of head_dim 64: it
is not known for 128.
"""
COLUMNS = {
    "summary, 64 blocks": "64 blocks per key",
    "summary, 64 blocks, one query for all heads": "64, one query for all heads",
    "summary, 32 blocks": "32",
    "summary, 16 blocks": "16, **built**",
    "summary, 8 blocks": "8",
    "plain means of 64 blocks": "64, plain",
    "plain means of 4 neighbours": "4 neighbours, plain",
}


def section(files: list[dict[str, Any]], ran: Callable[[dict[str, Any]], str]) -> list[str]:
    """The lines of the page."""
    lines = [HEAD]
    for results in files:
        lines.append(ran(results))
        heads = ["text, policy", "density", "error", "corrected", *COLUMNS.values()]
        lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        for one in results["rows"]:
            error, kept = one["error"], one["kept"]
            parts = ["" if name not in kept else f"{kept[name]:.1%}".replace("%", " %") for name in COLUMNS]
            about = f"{one['text']}, {one['tokens']:,} tokens: {one['label']}"
            figures = [f"{one['density']:.3f}", f"{error['none']:.4f}", f"{error['exact']:.4f}"]
            lines.append("| " + " | ".join([about, *figures, *parts]) + " |")
        layers = ", ".join(map(str, results["rows"][0]["layers"]))
        lines.append(f"\nLayers {layers}, all heads.\n")
    return [*lines, TAIL]
