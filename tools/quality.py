"""Writes docs/quality.md from bench/results/lab-*.json, which `flashprefill lab` and the prototypes made.

    .venv/bin/python tools/quality.py                                  write the page
    .venv/bin/python tools/quality.py out/lab/results.json short       take a run into bench/results first

Nothing is typed by hand there: to change a figure, measure again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
HEAD = """# How good the selections are

Made by `tools/quality.py` from `bench/results/lab-*.json`; each file holds the machine, versions, command
and date of its run.

    flashprefill lab            # all of it; out/lab/report.html has curves, density maps and the mask viewer
    flashprefill lab --quick    # does it run?

A model reads real texts. For the queries, keys and values of six of its layers (all heads), every method
is asked which blocks it would keep, over a sweep of its main parameter:

| | |
|---|---|
| density | kept blocks over causal blocks, all layers and heads |
| recall | share of the true softmax mass on the kept blocks, by tile of 128 queries: mean / 5th percentile |
| error | norm of out - dense over that of dense, by tile, mean: without / with `mean_correction` |

Figures at one density are linear between the two points of the sweep around it; "-" is a density that the
sweep does not reach. Forced blocks are the same for all: 1 sink, 2 window, no dense tail.
FlashPrefill's defaults (2, 4 and a tail of 2) keep a quarter of the causal blocks at 7.6K tokens whatever
the scores say, and hide what a selector does. *Oracle* knows the true masses; *bounds* is a scorer of the
lab's own, a box around a block's keys in the manner of Quest. One small model: take the order as a lead,
and run the lab on yours.
"""
SHOWN = {"short": ("0.15", "0.2", "0.25", "0.3"), "long": ("0.05", "0.1", "0.15", "0.2", "0.3")}


def take(path: Path, name: str) -> None:
    """Keep what the page needs of a run: not the density of every head."""
    results = json.loads(path.read_text(encoding="utf-8"))
    for text in results["texts"]:
        for curve in text["methods"] + [c for study in text["studies"].values() for c in study["curves"]]:
            del curve["density_by_layer_and_head"]
    lines = json.dumps(results, indent=1)
    (RESULTS / f"lab-{name}.json").write_text(lines + "\n", encoding="utf-8")


def ran(results: dict[str, Any]) -> str:
    """Machine, date and command of a file."""
    machine, threads = results["machine"]["cpu"], results.get("settings", {}).get("threads")
    on = f"{machine}, {threads} threads" if threads else machine
    took = f", {results['seconds'] / 60:.0f} minutes" if "seconds" in results else ""
    busy = results.get("settings", {}).get("busy")
    return f"{on}; {results['date']}{took}; `{results['command']}`" + (f" ({busy})" if busy else "") + "\n"


def row(cells: list[str]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def header(cells: list[str]) -> list[str]:
    """The first two lines of one."""
    return [row(cells), "|" + "---|" * len(cells)]


def cell(at: dict[str, float] | None) -> str:
    """Recall and error at a density."""
    if at is None:
        return "-"
    recall, error = (
        f"{at['recall']:.3f}/{at['recall_p5']:.2f}",
        f"{at['error']:.3f}/{at['error_corrected']:.3f}",
    )
    return f"{recall} {error}".replace("0.", ".")


def curves_table(found: list[dict[str, Any]], densities: tuple[str, ...]) -> list[str]:
    """Curves down, densities to the right."""
    heads = ["recall, 5 % / error, corrected", *(f"density {d.replace('0.', '.')}" for d in densities)]
    return header(heads) + [row([c["label"], *(cell(c["at"][d]) for d in densities)]) for c in found] + [""]


def times_table(text: dict[str, Any]) -> list[str]:
    """Milliseconds of one layer by method."""
    lines = header(["", "density", "selection, ms", "selection and attention, ms", "speed-up over SDPA"])
    for one in text["times"]:
        select = "" if one["select_seconds"] is None else f"{one['select_seconds'] * 1e3:.1f}"
        cells = [
            one["label"],
            f"{one['density']:.3f}",
            select,
            f"{one['seconds'] * 1e3:.0f}",
            f"{one['speedup']:.2f}",
        ]
        lines.append(row(cells))
    return [*lines, ""]


def one_text(text: dict[str, Any], densities: tuple[str, ...]) -> list[str]:
    """All tables of a text."""
    scaled = text["rotary_base_scaled"]
    about = f"{text['files']}; layers {', '.join(map(str, text['layers']))}"
    about += f"; rotary base scaled {scaled:g} times" if scaled else ""
    lines = [f"\n## {text['name']}: {text['tokens']:,} tokens\n", about + "\n"]
    lines += curves_table(text["methods"], densities)
    lines += [f"Time of layer {text['times_layer']}, each method at the value nearest to density "
              f"{text['reference_density']:g}; selections and attention by turns, medians:\n"]  # fmt: skip
    lines += times_table(text)
    for study in text["studies"].values():
        lines += [f"### {study['title']}\n", *curves_table(study["curves"], densities)]
        if len(study["curves"]) == 1:
            (curve,) = study["curves"]
            keys = ("density", "recall", "recall_p5", "error", "error_corrected")
            lines += header([curve["parameter"], "density", "recall", "5th percentile", "error", "corrected"])
            lines += [
                row([f"{p['value']:g}", *(f"{p[key]:.3f}" for key in keys)]) for p in curve["points"]
            ] + [""]
    return lines


VERDICT = {
    "Sketch, mass": "the default",
    "kept": "**built**",
    "bound": "a bound",
    "oracle": "a bound",
}
ORDER = """
## The order of the methods

Recall at equal density on the long text (SmolLM2-135M, {tokens} tokens of licences, rotary base scaled four
times), each method cut at exactly that density. The study that Sketch came from found the same order: oracle,
Sketch, pooled V1 and V1 alike, bounds.
"""
SKETCH = """
## Making Sketch better

One change at a time, by prototypes in torch (`bench/lab/sketch_prototypes.py`, which takes a folder of
`flashprefill lab --dump`). Each keeps exactly the blocks of highest worth up to the density. *Units* are
products of a pooled query row with a vector, for a tile and a block: V1 takes 128. Rows with a ring come from
the scripts that this bench was made of, over the same Q, K and V and with the same kernel; where both ran
they agree to .001 (5th percentile: .003), and the bench measures all rows again. *The policy itself* is
the library's own select and attend on the CPU, at densities of .1499 to .1502, forced blocks as above.
"""
SKETCH_END = """
What it says:
- **The metric** is most of it. A key far from its block's mean matters if a query can tell; distances weighed
  by the squares of the queries find those keys, and a row of queries a tile is sample enough. Built as
  `query_metric`. The queries' whole covariance is hardly better; the block's own principal direction or
  variance, or the distance from zero, are much worse.
- **Rows can be pooled by 64 or 128**, not 16: with all keys given exactly, one or two mean rows a tile select
  as well as eight. So the arithmetic belongs to the keys, and an eighth of V1's is enough; more than six to
  ten outliers add little.
- **The rule.** A threshold on shares keeps the most mass on average, mass serves the worst tiles best.
  share * rest^g goes from one to the other; g = 1/2 is built as `gain`. Normalising rows first, or estimating
  the diagonal block so that local heads get less, is not worth its cost: recall hardly moves, or output error
  rises.
- **Descriptions.** Consecutive means, centroids and principal directions do not beat outliers; leaving the
  variance out is worse.
"""


def order(results: dict[str, Any]) -> list[str]:
    """Recall of the methods that the study compared."""
    densities = results["order"][0]["densities"]
    lines = [ORDER.format(tokens=f"{results['tokens']['long']:,}")]
    heads = [f"density {density:.2f}" for density in densities]
    lines += header(["recall, mean / 5th percentile", "units", *heads])
    for one in results["order"]:
        pairs = zip(one["recall"], one["recall_p5"], strict=True)
        cells = (f"{mean:.3f}/{low:.2f}".replace("0.", ".") for mean, low in pairs)
        lines.append(row([one["name"], str(one["units"] or ""), *cells]))
    return lines


def sketch(results: dict[str, Any]) -> list[str]:
    """What was tried, in groups, a table for each text."""
    lines = [SKETCH, ran(results)]
    for text in dict.fromkeys(one["text"] for one in results["rows"]):
        rows = [one for one in results["rows"] if one["text"] == text]
        about = f"{text}, {results['tokens'][text]:,} tokens, density {rows[0]['density']:g}"
        lines += header([about, "", "units", "recall", "5th percentile", "error", "corrected", ""])
        last = None
        for one in rows:
            group = one["group"] if one["group"] != last else ""
            last = one["group"]
            digits = (("recall", 3), ("recall_p5", 2), ("error", 3), ("error_corrected", 4))
            figures = ["" if one[key] is None else f"{one[key]:.{n}f}" for key, n in digits]
            name = one["name"] + (" °" if one.get("by") == "earlier form" else "")
            verdict = VERDICT.get(one["name"], VERDICT.get(one["group"], ""))
            lines.append(row([group, name, str(one["units"] or ""), *figures, verdict]))
        lines.append("")
    return [*lines, SKETCH_END]


def main() -> None:
    """Read all results, write the page."""
    if len(sys.argv) == 3:
        take(Path(sys.argv[1]), sys.argv[2])
    lines = [HEAD]
    for name, densities in SHOWN.items():
        path = RESULTS / f"lab-{name}.json"
        if not path.exists():
            continue
        results = json.loads(path.read_text(encoding="utf-8"))
        for text in results["texts"]:
            lines += one_text(text, densities)
        lines.append(f"*{results['model']['name']}, {results['model']['dtype']}; {ran(results).strip()}*\n")
    path = RESULTS / "lab-prototypes.json"
    if path.exists():
        results = json.loads(path.read_text(encoding="utf-8"))
        lines += (order(results) if "order" in results else []) + sketch(results)
    page = "\n".join(lines).rstrip() + "\n"
    (ROOT / "docs" / "quality.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
