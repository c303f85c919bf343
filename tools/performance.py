"""Writes docs/performance.md from the files in bench/results, which `flashprefill bench --out` made.

    .venv/bin/python tools/performance.py

Nothing is typed by hand there: to change a figure, measure again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HEAD = """# Performance

Made by `tools/performance.py` from the files in `bench/results/`; each holds the machine, versions, command
and date of its run. Attention alone on made-up inputs, by turns with PyTorch's
`scaled_dot_product_attention` in the same run, medians; the time of a policy includes its selection. GFLOP/s
count the kept part of the causal triangle and leave selection out; *of product* is their share of PyTorch's
own product of two 2048 x 2048 matrices, measured in the same turns (in fp32 where the processor has no bf16
product). Density is kept over causal blocks. Where CPU time is named, that was the clock: runs of one thread
on a machine that others use too. Its cores were not equally fast at all times: PyTorch's product by AMX ran
at 280 GFLOP/s beside some shapes and at 700 beside others. Compare shapes by their shares, not times.
"""


def table(results: dict[str, Any]) -> list[str]:
    """One run as Markdown."""
    machine, settings = results["machine"], results["settings"]
    threads, target = settings["threads"], settings["target"] or "best target"
    notes = ["CPU time"] if settings.get("clock") == "cpu" else []
    notes += [settings["busy"]] if settings["busy"] else []
    if settings["target"] and "torch_target" in settings:
        notes.append(f"PyTorch's kernels: {settings['torch_target']}")
    lines = [
        f"\n## {machine['cpu']}, {settings['dtype']}, {threads} thread(s), {target}\n",
        f"{results['date']}, `{results['command']}`" + (f" ({'; '.join(notes)})" if notes else "") + "\n",
        "| shape | | density | ms | of it selection | GFLOP/s | of product | speed-up over SDPA |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for shape in dict.fromkeys(row["shape"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["shape"] == shape]
        product = next(row["gflops"] for row in rows if row["speedup"] is None)
        for row in rows:
            if row["speedup"] is None:
                continue
            select = f"{row['select_seconds'] * 1e3:.2f}" if row["select_seconds"] else ""
            share = row["gflops"] / product
            lines.append(
                f"| {shape} | {row['name']} | {row['density']:.3f} | {row['seconds']['median'] * 1e3:.1f} | "
                f"{select} | {row['gflops']:.0f} | {share:.2f} | {row['speedup']:.2f} |"
            )
    return lines


def main() -> None:
    """Read all results, write the page."""
    files = sorted((ROOT / "bench" / "results").glob("cpu-*.json"))
    lines = [HEAD]
    for file in files:
        lines += table(json.loads(file.read_text(encoding="utf-8")))
    (ROOT / "docs" / "performance.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
