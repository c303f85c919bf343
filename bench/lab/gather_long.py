"""Gather beside Sketch and FlashPrefill on dumps of long texts, point by point: it may be interrupted.

    flashprefill lab --text long --text long-code --dump out/qkv
    python bench/lab/gather_long.py out/qkv --layers 13,25,7,19,2,29

Figures and lines are the lab's own (`apps/lab/figures.py`, `lines.py`), the values of the sweeps fewer.
A point of one layer of one text is one file under --parts; what is there already is not measured again.
Layers that have all points of a text are put together at the end.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from flashprefill.apps import dump, machine
from flashprefill.apps.lab import figures, lines
from flashprefill.apps.lab.run import FORCED

VALUES = {
    "Gather, gain": (0.001, 0.003, 0.01),
    "Sketch, gain, query metric, pool 64": (0.004, 0.012),
    "FlashPrefill (V1)": (0.12, 0.25),
}
LINES = {line.label: line for line in lines.METHODS if line.label in VALUES}
TEXTS = ("long", "long-code")
DENSITIES = (0.05, 0.1, 0.15)


def part(folder: Path, text: str, layer: int, label: str, value: float) -> Path:
    """Where a point is kept."""
    return folder / f"{text}-{layer}-{label}-{value}.pt"


def points(labels: Iterable[str]) -> list[tuple[str, float]]:
    """The lines and values to look at."""
    return [(label, value) for label in labels for value in VALUES[label]]


def measure(dumped: Path, parts: Path, text: str, number: int, labels: list[str]) -> None:
    """Every point of one layer of one text that is not there yet."""
    left = [point for point in points(labels) if not part(parts, text, number, *point).exists()]
    if not left:
        return
    content: Any = dump.load(dumped / f"{text}-layer{number}.pt")
    query, key, value = (torch.as_tensor(content[name]) for name in "qkv")
    layer = figures.Layer(number, query, key, value, float(content["scale"]))
    for label, at in left:
        sums = figures.Sums()
        mask, _ = layer.select(LINES[label].policy(at, FORCED))
        sums.add(layer, mask)
        tiles = {"recall": sums.recall, "error": sums.error, "corrected": sums.corrected}
        torch.save({"density": sums.density, **tiles}, part(parts, text, number, label, at))
        print(text, number, label, at, sums.figures(), flush=True)


def together(parts: Path, text: str, layers: list[int], labels: list[str]) -> dict[str, Any]:
    """The layers that have all points of these lines, as the lab writes a text down."""
    whole = sorted(
        n for n in layers if all(part(parts, text, n, *point).exists() for point in points(labels))
    )
    methods = []
    for label in labels if whole else ():
        rows = []
        for value in VALUES[label]:
            sums = figures.Sums()
            for number in whole:
                for name, what in torch.load(part(parts, text, number, label, value)).items():
                    getattr(sums, name).extend(what)
            measured = sums.figures()
            rows.append({"value": value, **{k: v for k, v in measured.items() if "seconds" not in k}})
        at = {f"{density:g}": figures.at_density(rows, density) for density in DENSITIES}
        methods.append({"label": label, "parameter": LINES[label].parameter, "points": rows, "at": at})
    return {"name": text, "layers": whole, "methods": methods}


def sets(parts: Path, text: str, layers: list[int]) -> list[dict[str, Any]]:
    """The layers that have all lines, and those that have Gather alone where these are more."""
    every, gather = (together(parts, text, layers, labels) for labels in ([*VALUES], [*VALUES][:1]))
    return [
        one for one in (every, gather) if one["layers"] and (one is every or one["layers"] != every["layers"])
    ]


def main() -> None:
    """Measure what is missing, write what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("dumps", type=Path)
    parser.add_argument(
        "--layers", type=lambda s: [int(n) for n in s.split(",")], default=[2, 7, 13, 19, 25, 29]
    )
    parser.add_argument("--parts", type=Path, default=Path("out/gather-long"))
    parser.add_argument("--text", choices=TEXTS, help="only this one")
    parser.add_argument("--line", choices=VALUES, help="only this one")
    parser.add_argument("--only-write", action="store_true", help="measure nothing more")
    parser.add_argument("--out", type=Path, default=Path("bench/results/lab-gather-long.json"))
    options = parser.parse_args()
    options.parts.mkdir(parents=True, exist_ok=True)
    for number in () if options.only_write else options.layers:
        for text in [options.text] if options.text else TEXTS:
            measure(options.dumps, options.parts, text, number, [options.line] if options.line else [*VALUES])
    results = {
        "schema": "flashprefill-gather-long/1",
        **machine.describe(),
        "command": shlex.join(["python", "bench/lab/gather_long.py", *sys.argv[1:]]),
        "model": {"name": "SmolLM2-135M-Instruct", "dtype": "fp32"},
        "tokens": 24355,
        "rotary_base_scaled": 4.0,
        "forced": FORCED,
        "texts": [one for text in TEXTS for one in sets(options.parts, text, options.layers)],
    }
    options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
