"""Times the attend kernel on a GPU beside PyTorch's cuDNN attention, interleaved in one process.

python3 attend_bench.py [case ...]: cases are names of the table below; default all. CUDA events, medians of
interleaved runs; the SM clock and power are sampled while the kernel runs again. TFLOP/s count kept blocks of
128 keys whole (sparse), or the causal half (dense). BESIDE names other builds' libflashprefill.so, as
NAME=PATH with commas between them, which take their turns too. With the correction a call pools K and V
first. Prints a table and writes $OUT/attend_bench.json.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "cuda"))

from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from attend_case import Case, load  # noqa: E402

BF16, F16 = torch.bfloat16, torch.float16
G = torch.Generator(device="cuda").manual_seed(2)
OTHERS = [one.split("=", 1) for one in os.environ.get("BESIDE", "").split(",") if one]
BESIDE = {name: load(path) for name, path in OTHERS}


def clock() -> tuple[int, int]:
    try:
        import pynvml

        pynvml.nvmlInit()
        h = pynvml.nvmlDeviceGetHandleByIndex(0)
        return (
            pynvml.nvmlDeviceGetClockInfo(h, pynvml.NVML_CLOCK_SM),
            pynvml.nvmlDeviceGetPowerUsage(h) // 1000,
        )
    except Exception:  # the figures are a remark, not the measurement
        return (0, 0)


def inputs(
    n: int, d: int = 128, dtype: torch.dtype = BF16, hq: int = 32, hk: int = 8
) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(1, n, h, d, device="cuda", dtype=dtype, generator=G) for h in (hq, hk, hk))


def random_mask(case: Case, density: float, groups: bool) -> int:
    """Random blocks at this density of the causal triangle, the diagonal inside; returns how many.

    A list per head, or with `groups` one for the heads of a group.
    """
    tiles, blocks = case.tiles(0), -(-case.k_len[0] // case.block_size)
    heads = case.hk if groups else case.mask_heads
    r = torch.rand(heads, tiles, blocks, device="cuda", generator=G)
    ends = torch.tensor([case.full_visible(0, m)[1] for m in range(tiles)], device="cuda")
    want = (ends * density).round().clamp_min(1)
    r.masked_fill_(torch.arange(blocks, device="cuda")[None, :] >= ends[:, None], 2.0)
    r[:, torch.arange(tiles, device="cuda"), ends - 1] = -1.0
    rank = r.argsort(-1).argsort(-1)
    keep = (rank < want[None, :, None]) & (r < 2)
    if groups and not case.share:
        keep = keep.repeat_interleave(case.group, 0)
    case.keep = [keep]
    return int(keep.sum().item())


def cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))

    def run() -> None:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    try:
        run()
        return run
    except RuntimeError:
        g = q.shape[1] // k.shape[1]
        ke, ve = k.repeat_interleave(g, 1), v.repeat_interleave(g, 1)

        def expanded() -> None:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                torch.nn.functional.scaled_dot_product_attention(q, ke, ve, is_causal=True)

        expanded()
        return expanded


def timed(runs: dict, repeats: int) -> dict[str, float]:
    """Medians of interleaved runs; then some more, during which the clock is read.

    Everything is queued before anything is waited for, so that the host's time to launch is not measured.
    """
    for run in runs.values():
        run()
    torch.cuda.synchronize()
    events: dict[str, list] = {name: [] for name in runs}
    torch.cuda._sleep(int(4e7))  # some 20 ms, for the queue to fill
    for _ in range(repeats):
        for name, run in runs.items():
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            a.record()
            run()
            b.record()
            events[name].append((a, b))
    torch.cuda.synchronize()
    times = {name: statistics.median(a.elapsed_time(b) for a, b in pairs) for name, pairs in events.items()}
    first = next(iter(runs))
    for _ in range(max(2, min(200, int(120 / times[first])))):
        runs[first]()
    time.sleep(0.06)
    times["clock_mhz"], times["watts"] = clock()
    torch.cuda.synchronize()
    return times


def make_paged(case: Case, page: int, ordered: bool = False) -> Case:
    n = case.k.shape[1]
    count = n // page
    order = torch.randperm(count, device="cuda", generator=G)
    if ordered:
        order = torch.arange(count, device="cuda")
    k, v = (torch.empty(count, page, case.hk, case.d, device="cuda", dtype=case.q.dtype) for _ in range(2))
    k[order], v[order] = (
        case.k[0].view(count, page, case.hk, case.d),
        case.v[0].view(count, page, case.hk, case.d),
    )
    return Case(case.q, k, v, used_k=[n], table=order.int()[None].contiguous(), max_k=n, keep=case.keep)


def row_of(cases: dict[str, Case], flop: float, repeats: int, **others) -> dict:
    """Times of the first case as "ms", of the others by name, interleaved; other builds' by their name."""
    runs = {}
    for name, case in cases.items():
        case.prepare()
        runs[name] = case.launch
        for build, lib in BESIDE.items():
            runs[f"{build} {name}".strip()] = lambda case=case, lib=lib: case.launch(lib)
    t = timed({**runs, **others}, repeats)
    ms = t[next(iter(cases))]
    row = {"clock_mhz": t.pop("clock_mhz"), "watts": t.pop("watts"), "ms": ms, "tflops": flop / ms / 1e9}
    for name, other in t.items():
        if name:
            row[f"{name} ms"] = other
    return row


def dense_row(n: int, d: int = 128, dtype: torch.dtype = BF16) -> dict:
    q, k, v = inputs(n, d, dtype)
    flop = 4 * 32 * d * n * (n + 1) / 2
    repeats = 5 if n >= 65536 else 9 if n >= 32768 else 25
    return row_of({"": Case(q, k, v)}, flop, repeats, cudnn=cudnn(q, k, v))


def sparse_row(n: int, density: float, d: int = 128, groups: bool = False, share: bool = False) -> dict:
    case = Case(*inputs(n, d), share=share)
    kept = random_mask(case, density, groups)
    row = row_of({"": case}, 4 * d * 128 * 128 * kept, 25 if n < 65536 else 9)
    return {**row, "kept_per_tile": kept / case.mask_heads / case.tiles(0)}


def pages_row(n: int, density: float) -> dict:
    """Contiguous keys, and the same in pages."""
    case = Case(*inputs(n))
    kept = random_mask(case, density, False)
    cases = {"": case, **{f"pages of {page}": make_paged(case, page) for page in (128, 16, 1)}}
    cases["pages of 1 in order"] = make_paged(case, 1, ordered=True)
    return row_of(cases, 4 * 128**3 * kept, 15)


def masks_row(n: int, density: float) -> dict:
    """A list per head, lists that are equal in a group, and shared tiles, at one density."""
    own = Case(*inputs(n))
    cases = {"": own, "group": Case(own.q, own.k, own.v), "shared": Case(own.q, own.k, own.v, share=True)}
    kept = {name: random_mask(case, density, name == "group") for name, case in cases.items()}
    row = row_of(cases, 4 * 128**3 * kept[""], 15)
    for name in ("group", "shared"):
        row[f"{name} tflops"] = 4 * 128**3 * kept[name] / row[f"{name} ms"] / 1e9
    return row


def corrected_row(n: int, density: float) -> dict:
    """With the correction, and without."""
    plain = Case(*inputs(n))
    kept = random_mask(plain, density, False)
    corrected = Case(plain.q, plain.k, plain.v, correct=True, keep=plain.keep)
    return row_of({"": corrected, "plain": plain}, 4 * 128**3 * kept, 15)


def dtypes_row(n: int, density: float | None) -> dict:
    """bf16, and the same numbers in fp16."""
    half = Case(*(x.half() for x in inputs(n)))
    case = Case(half.q.to(BF16), half.k.to(BF16), half.v.to(BF16))
    flop = 4 * 128 * 32 * n * (n + 1) / 2
    if density is not None:
        flop = 4 * 128**3 * random_mask(case, density, False)
        half.keep = case.keep
    return row_of({"": case, "fp16": half}, flop, 25)


K = 1024
TABLE = {
    "dense 4K": lambda: dense_row(4 * K),
    "dense 8K": lambda: dense_row(8 * K),
    "dense 16K": lambda: dense_row(16 * K),
    "dense 32K": lambda: dense_row(32 * K),
    "dense 64K": lambda: dense_row(64 * K),
    "dense 128K": lambda: dense_row(128 * K),
    "sparse 4K": lambda: sparse_row(4 * K, 0.74),
    "sparse 16K": lambda: sparse_row(16 * K, 0.33),
    "sparse 32K": lambda: sparse_row(32 * K, 0.18),
    "sparse 64K": lambda: sparse_row(64 * K, 0.09),
    "sparse 128K": lambda: sparse_row(128 * K, 0.047),
    "sparse 256K": lambda: sparse_row(256 * K, 0.042),
    "group 16K": lambda: sparse_row(16 * K, 0.33, groups=True),
    "group 64K": lambda: sparse_row(64 * K, 0.09, groups=True),
    "group 128K": lambda: sparse_row(128 * K, 0.047, groups=True),
    "group 256K": lambda: sparse_row(256 * K, 0.042, groups=True),
    "shared 64K": lambda: sparse_row(64 * K, 0.09, share=True),
    "shared 128K": lambda: sparse_row(128 * K, 0.047, share=True),
    "masks 64K": lambda: masks_row(64 * K, 0.09),
    "masks 128K": lambda: masks_row(128 * K, 0.047),
    "corrected 128K": lambda: corrected_row(128 * K, 0.047),
    "pages 64K": lambda: pages_row(64 * K, 0.09),
    "d64 dense 16K": lambda: dense_row(16 * K, 64),
    "d64 dense 64K": lambda: dense_row(64 * K, 64),
    "d64 sparse 64K": lambda: sparse_row(64 * K, 0.09, d=64),
    "d256 dense 16K": lambda: dense_row(16 * K, 256),
    "d256 dense 64K": lambda: dense_row(64 * K, 256),
    "d256 sparse 64K": lambda: sparse_row(64 * K, 0.09, d=256),
    "fp16 dense 16K": lambda: dense_row(16 * K, dtype=F16),
    "dtypes dense 16K": lambda: dtypes_row(16 * K, None),
    "dtypes sparse 64K": lambda: dtypes_row(64 * K, 0.09),
}


def main() -> None:
    names = sys.argv[1:] or list(TABLE)
    rows = []
    for name in names:
        started = time.time()
        row = {"name": name, **TABLE[name]()}
        rows.append(row)
        others = "  ".join(
            f"{key.removesuffix(' ms')} {x:.3f} (x{x / row['ms']:.3f})"
            for key, x in row.items()
            if key.endswith(" ms")
        )
        kept = f" {row['kept_per_tile']:5.1f} blocks per tile" if "kept_per_tile" in row else ""
        print(
            f"{name:16s} {row['ms']:8.3f} ms {row['tflops']:6.1f} TFLOP/s{kept}  {others} "
            f" {row['clock_mhz']} MHz {row['watts']} W  ({time.time() - started:.1f} s)",
            flush=True,
        )
        torch.cuda.empty_cache()
    if os.environ.get("OUT"):
        info = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
        with open(
            os.path.join(os.environ["OUT"], os.environ.get("NAME", "attend_bench") + ".json"), "w"
        ) as f:
            json.dump(info, f, indent=1)


if __name__ == "__main__":
    main()
