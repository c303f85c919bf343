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

![Speed over PyTorch on CPUs, and over our dense kernel by density](images/performance.png)

A speed-up over a slow dense kernel says little about sparsity, so figures are products: our dense
kernel over PyTorch's, times sparse over our dense kernel. In short:

{summary}

GPU figures are on the pages of the kernels: [attend](hopper-attend.md), [select](hopper-select.md),
and in the [README](../README.md); engines: [vLLM](vllm.md#speed), [llama.cpp](llama.cpp.md#speed).

## How it is measured

Made by `tools/performance.py` from the files in `bench/results/`; each holds the machine, versions,
command and date of its run. The chart is made by `tools/charts.py`. Attention alone on made-up
inputs, by turns with PyTorch's `scaled_dot_product_attention` in the same run, medians; the time of
a policy includes its selection. GFLOP/s count the kept part of the causal triangle and leave
selection out; *of product* is their share of PyTorch's own product of two 2048 x 2048 matrices,
measured in the same turns (in fp32 where the processor has no bf16 product). Density is kept over
causal blocks. Where CPU time is named, that was the clock: runs of one thread on a machine that
others use too. Its cores were not equally fast at all times: PyTorch's product by AMX ran at 280
GFLOP/s during some shapes and at 700 during others. Compare shapes by their shares, not times.

Shapes are query heads / KV heads x head_dim x tokens.
"""
# A line of the summary: what it is called, its file, and the shape in it.
SHOWN = (
    ("Zen 3 (AVX2), fp32", "cpu-zen3-fp32-8K-2threads", "9/3x64x8192"),
    ("Zen 4 (AVX-512), fp32", "cpu-zen4-fp32-2threads", "9/3x64x8192"),
    ("Zen 4 (AVX512_BF16), bf16", "cpu-zen4-bf16-2threads", "9/3x64x8192"),
    ("Xeon (AMX), fp32", "cpu-amx-fp32-2threads", "9/3x64x8192"),
    ("Xeon (AMX), bf16", "cpu-amx-bf16-2threads", "9/3x64x8192"),
    ("Zen 3 (AVX2), fp32", "cpu-zen3-fp32-32K-2threads", "9/3x64x32768"),
    ("Zen 4 (AVX512_BF16), bf16", "cpu-zen4-bf16-2threads-32K", "9/3x64x32768"),
    ("Xeon (AMX), bf16", "cpu-amx-bf16-2threads", "32/8x128x32768"),
)
POOLED = "flashprefill(alpha=0.12, query_pool=16)"


def factors(results: dict[str, Any], shape: str) -> tuple[float, float, float]:
    """Our dense kernel over SDPA, the policy over our dense kernel, and the density that the policy kept."""
    rows = {row["name"].lower(): row for row in results["rows"] if row["shape"] == shape}
    dense, sparse = rows.get("dense") or rows["dense()"], rows[POOLED]
    return dense["speedup"], sparse["speedup"] / dense["speedup"], sparse["density"]


def summary() -> str:
    """The short table above the long ones: FlashPrefill with pooled queries, two threads."""
    lines = [
        "| FlashPrefill, pooled queries, two threads | shape | blocks kept | over SDPA = kernel x sparsity |",
        "|---|---|---|---|",
    ]
    for label, name, shape in SHOWN:
        kernel, sparsity, density = factors(read(name), shape)
        total = f"{kernel * sparsity:.1f}x = {kernel:.2f} x {sparsity:.1f}"
        lines.append(f"| {label} | {shape} | {100 * density:.0f} % | {total} |")
    return "\n".join(lines)


def read(name: str) -> dict[str, Any]:
    """One file of results."""
    results: dict[str, Any] = json.loads(
        (ROOT / "bench" / "results" / f"{name}.json").read_text(encoding="utf-8")
    )
    return results


# Names of processors that give only numbers of themselves.
KNOWN = {
    "family 25, model 1)": "Zen 3",
    "family 25, model 17)": "Zen 4",
    "family 6, model 207)": "Emerald Rapids",
}


def table(name: str) -> list[str]:
    """One run as Markdown."""
    results = read(name)
    machine, settings = results["machine"], results["settings"]
    threads, target = settings["threads"], settings["target"] or "best target"
    notes = ["CPU time"] if settings.get("clock") == "cpu" else []
    notes += [settings["busy"]] if settings["busy"] else []
    if settings["target"] and "torch_target" in settings:
        notes.append(f"PyTorch's kernels: {settings['torch_target']}")
    known = next((known for end, known in KNOWN.items() if machine["cpu"].endswith(end)), "")
    cpu = f"{known}, {machine['cpu']}" if known else machine["cpu"]
    lines = [
        f"\n## {cpu}, {settings['dtype']}, {threads} thread{'s' * (threads != 1)}, {target}\n",
        f"[{name}.json](../bench/results/{name}.json), {results['date']}, `{results['command']}`"
        + (f" ({'; '.join(notes)})" if notes else "")
        + "\n",
        "| shape | | density | ms | selection, ms | GFLOP/s | of product | speed-up over SDPA |",
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
    lines = [HEAD.format(summary=summary())]
    for file in sorted((ROOT / "bench" / "results").glob("cpu-*.json")):
        lines += table(file.stem)
    (ROOT / "docs" / "performance.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
