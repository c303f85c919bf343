#!/usr/bin/env python3
"""What attention costs at equal divergence from dense attention, by `flashprefill demo` over budgets.

    flashprefill demo --policy "gather(gain=0.001)" --policy "gather(gain=0.003)" --policy "sketch(gain=0.01)"
    python bench/equal_kl.py out/demo/results.json

Every policy of one method is a point (divergence, seconds of attention with the selection inside, density).
Between points seconds are interpolated, linear in the logarithms of both; nothing is said outside of them.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashprefill.apps import table


def at_divergence(points: Sequence[dict[str, Any]], kl: float, what: str) -> float | None:
    """A quantity of a method at a divergence; None outside of its points."""
    ordered = sorted(points, key=lambda point: point["kl"])
    for low, high in zip(ordered, ordered[1:], strict=False):
        if low["kl"] <= kl <= high["kl"]:
            t = math.log(kl / low["kl"]) / math.log(high["kl"] / low["kl"])
            return math.exp((1 - t) * math.log(low[what]) + t * math.log(high[what]))
    return None


def dense(run: dict[str, Any]) -> bool:
    """Whether it is dense attention, PyTorch's or the library's."""
    return run["policy"] is None or run["policy"].lower().startswith("dense")


def points_of(runs: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The points of each method, by its name: of the policies that differ in numbers alone, the most."""
    alike: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        if dense(run):
            continue
        seconds = run["attention_seconds"]["median"]
        selection = run["select_seconds"]["median"]
        alike.setdefault(re.sub(r"[\d.e-]+", "", run["policy"]), []).append(
            {
                "policy": run["policy"],
                "kl": run["kl_nats"],
                "density": run["density"],
                "both": seconds,
                "selection": selection,
                "attention": seconds - selection,
            }
        )
    found: dict[str, list[dict[str, Any]]] = {}
    for some in sorted(alike.values(), key=len):
        found[some[0]["policy"].partition("(")[0].lower()] = some
    return found


def main() -> None:
    """Print the points, then the methods two by two at the divergences that both reach."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path, help="results.json of flashprefill demo")
    parser.add_argument("--methods", nargs=2, default=("gather", "sketch"))
    parser.add_argument("--out", type=Path, help="a JSON file for the same")
    options = parser.parse_args()
    results = json.loads(options.results.read_text(encoding="utf-8"))
    found = points_of(results["runs"])
    fastest = min(run["attention_seconds"]["median"] for run in results["runs"] if dense(run))
    cells = [
        [one["policy"], f"{one['kl']:.4f}", f"{one['density']:.3f}", f"{one['attention']:.3f}"]
        + [f"{one['selection']:.3f}", f"{one['selection'] / fastest:.1%}"]
        for some in found.values()
        for one in sorted(some, key=lambda point: point["kl"])
    ]
    print(table.render(("", "KL", "density", "attention, s", "selection, s", "of dense"), cells))
    first, second = options.methods
    rows = []
    for point in sorted({one["kl"] for name in (first, second) for one in found[name]}):
        pairs = {
            what: [at_divergence(found[name], point, what) for name in (first, second)]
            for what in ("attention", "both", "density")
        }
        if all(value is not None for pair in pairs.values() for value in pair):
            rows.append({"kl": point, **{what: pair[1] / pair[0] for what, pair in pairs.items()}})  # type: ignore[operator]
    print(f"\n{second} over {first} at equal divergence")
    print(
        table.render(
            ("KL", "attention", "with selection", "density"),
            [
                [f"{r['kl']:.4f}", *(f"{r[what]:.2f}x" for what in ("attention", "both", "density"))]
                for r in rows
            ],
        )
    )
    if options.out:
        kept = {key: results[key] for key in ("date", "command", "machine", "versions", "model", "prompt")}
        content = {
            "schema": "flashprefill-equal-kl/1",
            **kept,
            "dense_seconds": fastest,
            "points": found,
            "equal": rows,
        }
        options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
