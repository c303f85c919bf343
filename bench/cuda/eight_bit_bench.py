"""Times attention with 8-bit products on a Hopper GPU beside bf16's and PyTorch's cuDNN attention, by turns.

    python3 bench/cuda/eight_bit_bench.py [case ...]

Cases are names of the table below; default all. Shapes, inputs, masks and the way of timing are those of
attend_bench.py, so a time is that of the whole call: of 8 bits with the pass that makes images. TFLOP/s count
kept blocks of 128 keys whole (sparse), or the causal half (dense). "error" is the norm of the difference to
the bf16 result over its norm. For each case the times of the call's kernels follow, from torch's profiler.
Prints a table and writes $OUT/eight_bit_bench.json.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import defaultdict

import torch
from attend_bench import Case, K, cudnn, inputs, make_paged, random_mask, row_of

EIGHT = 1  # fp_math


def in_eight_bits(case: Case) -> Case:
    """The same call with 8-bit products."""
    return Case(
        case.q, case.k, case.v, used_k=case.used_k, table=case.table, max_k=case.max_k, keep=case.keep,
        correct=case.correct, share=case.share, math=EIGHT,
    )  # fmt: skip


def kernels_of(case: Case) -> dict[str, float]:
    """Milliseconds of each kernel of one call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        case.launch()
        torch.cuda.synchronize()
    times: dict[str, float] = defaultdict(float)
    for event in profile.events():
        name = event.name.split("<")[0].split("(")[0].split("::")[-1].removeprefix("void ")
        times[name] += getattr(event, "device_time", 0) / 1000
    return {name: ms for name, ms in times.items() if ms > 0}


def row(case: Case, flop: float, repeats: int, **others) -> dict:
    """Eight bits, bf16, and what else is given."""
    eight = in_eight_bits(case)
    result = row_of({"": eight, "bf16": case}, flop, repeats, **others)
    error = (eight.out.float() - case.out.float()).norm() / case.out.float().norm()
    return {**result, "error": error.item(), "kernels": kernels_of(eight)}


def dense(n: int) -> dict:
    q, k, v = inputs(n)
    repeats = 5 if n >= 65536 else 25
    return row(Case(q, k, v), 4 * 32 * 128 * n * (n + 1) / 2, repeats, cudnn=cudnn(q, k, v))


def sparse(n: int, density: float, correct: bool = False) -> dict:
    case = Case(*inputs(n), correct=correct)
    kept = random_mask(case, density, False)
    return row(case, 4 * 128**3 * kept, 25 if n < 65536 else 9)


def pages(n: int, density: float) -> dict:
    """Pages of 1 in 8 bits and in bf16, which copies them first, beside contiguous keys in bf16."""
    contiguous = Case(*inputs(n))
    kept = random_mask(contiguous, density, False)
    ones = make_paged(contiguous, 1)
    cases = {"": contiguous, "pages of 1": ones, "pages of 1, 8 bits": in_eight_bits(ones)}
    result = row_of(cases, 4 * 128**3 * kept, 15)
    return {**result, "kernels": kernels_of(ones)}


TABLE = {
    "dense 4K": lambda: dense(4 * K),
    "dense 16K": lambda: dense(16 * K),
    "dense 64K": lambda: dense(64 * K),
    "sparse 16K": lambda: sparse(16 * K, 0.33),
    "sparse 64K": lambda: sparse(64 * K, 0.09),
    "sparse 128K": lambda: sparse(128 * K, 0.047),
    "sparse 256K": lambda: sparse(256 * K, 0.042),
    "corrected 128K": lambda: sparse(128 * K, 0.047, correct=True),
    "pages 16K": lambda: pages(16 * K, 0.33),
    "pages 64K": lambda: pages(64 * K, 0.09),
}


def main() -> None:
    rows = []
    for name in sys.argv[1:] or list(TABLE):
        started = time.time()
        result = {"name": name, **TABLE[name]()}
        rows.append(result)
        beside = "  ".join(
            f"{key.removesuffix(' ms')} {x:.3f} (x{x / result['ms']:.3f})"
            for key, x in result.items()
            if key.endswith(" ms")
        )
        kernels = " ".join(f"{key} {x:.3f}" for key, x in result["kernels"].items())
        error = f" error {result['error']:.4f}" if "error" in result else ""
        print(
            f"{name:16s} {result['ms']:8.3f} ms {result['tflops']:7.1f} TFLOP/s  {beside}{error}  "
            f"{result['clock_mhz']} MHz {result['watts']} W  ({time.time() - started:.1f} s)\n"
            f"{'':16s} {kernels}",
            flush=True,
        )
        torch.cuda.empty_cache()
    if os.environ.get("OUT"):
        info = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
        with open(os.path.join(os.environ["OUT"], "eight_bit_bench.json"), "w") as f:
            json.dump(info, f, indent=1)


if __name__ == "__main__":
    main()
