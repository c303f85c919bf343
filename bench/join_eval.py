#!/usr/bin/env python3
"""Joins runs of `flashprefill eval` that shared their methods, lengths and seed, each with tasks of its own.

    python bench/join_eval.py out/ruler/*/results.json --out out/ruler

writes what one run over all tasks would have written: results.json with the tables, pictures, report.html.
Runs beside each other share a processor and a GPU, so times to first tokens are left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashprefill.apps.eval import answers, figures, run

SAME = ("samples", "seed", "text", "last_token", "max_tokens", "chat", "stretch")


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One run's results from those of its parts; refuses parts that differ in more than their tasks."""
    first = parts[0]
    for part in parts[1:]:
        for name in SAME:
            if part["settings"][name] != first["settings"][name]:
                raise SystemExit(
                    f"{name}: {part['settings']['tasks']} ran with {part['settings'][name]}, "
                    f"{first['settings']['tasks']} with {first['settings'][name]}"
                )
        if part["methods"] != first["methods"] or part["model"] != first["model"]:
            raise SystemExit(f"{part['settings']['tasks']}: other methods or another model than the first's")
    cases = [case for part in parts for case in part["cases"]]
    rows = figures.summaries(cases, list(first["methods"]))
    rows = [row | {"ttft_seconds": None, "ttft_speedup": None} for row in rows]
    settings = first["settings"] | {
        "suites": [name for part in parts for name in part["settings"]["suites"]],
        "tasks": [name for part in parts for name in part["settings"]["tasks"]],
        "lengths": sorted({case["length"] for case in cases}),
        "from_disk": sum(part["settings"]["from_disk"] for part in parts),
        "unanswered": sum(part["settings"]["unanswered"] for part in parts),
        "beside": len(parts),
    }
    results = first | {
        "settings": settings,
        "prompts_hash": answers.digest([part["prompts_hash"] for part in parts]),
        "rows": rows,
        "cases": cases,
    }
    results["table"], results["verdict"] = run.render(results), run.verdict(results)
    return results


def main() -> None:
    """Read the parts, write the whole."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="+", type=Path, help="results.json of each part")
    parser.add_argument("--out", type=Path, required=True, help="the folder that is written")
    given = parser.parse_args()
    parts = [json.loads(path.read_text(encoding="utf-8")) for path in given.parts]
    given.out.mkdir(parents=True, exist_ok=True)
    run.write(given.out, joined(parts))


if __name__ == "__main__":
    main()
