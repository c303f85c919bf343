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
64 blocks, which no query weighs; and a plain mean of each 4 neighbours that are all left out, other
blocks by themselves. *Shared* tiles have a key for each head; one for all heads, weighed by the mean
of their queries, is worth much less.
"""
TAIL = """
The aim was to keep 85 % of the gain. With 16 blocks per key that holds for each text as a whole;
one by one, rows of the long text where the exact form itself lowers the error by less than 2 % are
below. With 64 blocks, as first thought of, it does not hold for the long text, nor do plain means of
4 neighbours there. One model of head_dim 64: it is not known for 128. On a CPU the exact form takes
at most 5 % of attend, so summary keys save no time there; a GPU's exact form adds 23 % at 128K
tokens ([hopper-attend.md](hopper-attend.md)).
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
        for text in dict.fromkeys(one["text"] for one in results["rows"]):
            errors = [one["error"] for one in results["rows"] if one["text"] == text]
            gain = sum(error["none"] - error["exact"] for error in errors)
            part = {
                name: sum(error["none"] - error[name] for error in errors) / gain
                for name in COLUMNS
                if all(name in error for error in errors)
            }
            parts = [
                "" if name not in part else f"**{part[name]:.1%}**".replace("%", " %") for name in COLUMNS
            ]
            lines.append("| " + " | ".join([f"{text}, all", "", "", "", *parts]) + " |")
        layers = ", ".join(map(str, results["rows"][0]["layers"]))
        lines.append(f"\nLayers {layers}, all heads.\n")
    return [*lines, TAIL.rstrip("\n")]
