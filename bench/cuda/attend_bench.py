"""Times the attend kernel on a GPU beside PyTorch's cuDNN attention, interleaved in one process.

python3 attend_bench.py [case ...]: cases are names of the table below; default all. CUDA events, medians of
interleaved runs; the SM clock and power are sampled while the kernel runs again. TFLOP/s count kept blocks of
128 keys whole (sparse), or the causal half (dense). Prints a table and writes $OUT/attend_bench.json.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time

import torch
from attend_lib import Case
from torch.nn.attention import SDPBackend, sdpa_kernel

BF16, F16 = torch.bfloat16, torch.float16
G = torch.Generator(device="cuda").manual_seed(2)


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

    A list a head, or with `groups` one for the heads of a group.
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


def make_paged(case: Case, page: int) -> Case:
    n = case.k.shape[1]
    count = n // page
    order = torch.randperm(count, device="cuda", generator=G)
    k, v = (torch.empty(count, page, case.hk, case.d, device="cuda", dtype=case.q.dtype) for _ in range(2))
    k[order], v[order] = (
        case.k[0].view(count, page, case.hk, case.d),
        case.v[0].view(count, page, case.hk, case.d),
    )
    return Case(case.q, k, v, used_k=[n], table=order.int()[None].contiguous(), max_k=n, keep=case.keep)


def dense_row(n: int, d: int = 128, dtype: torch.dtype = BF16) -> dict:
    q, k, v = inputs(n, d, dtype)
    case = Case(q, k, v)
    case.prepare()
    flop = 4 * 32 * d * n * (n + 1) / 2
    t = timed({"ours": case.launch, "cudnn": cudnn(q, k, v)}, 5 if n >= 65536 else 9 if n >= 32768 else 25)
    return {
        "clock_mhz": t["clock_mhz"],
        "watts": t["watts"],
        "ms": t["ours"],
        "tflops": flop / t["ours"] / 1e9,
        "cudnn_ms": t["cudnn"],
        "cudnn_tflops": flop / t["cudnn"] / 1e9,
    }


def sparse_row(
    n: int,
    density: float,
    d: int = 128,
    groups: bool = False,
    share: bool = False,
    correct: bool = False,
    page: int = 0,
) -> dict:
    q, k, v = inputs(n, d)
    case = Case(q, k, v, share=share, correct=correct)
    kept = random_mask(case, density, groups)
    if page:
        case = make_paged(case, page)
    case.prepare()
    flop = 4 * d * 128 * 128 * kept
    t = timed({"ours": case.launch}, 25 if n < 65536 else 9)
    return {
        "clock_mhz": t["clock_mhz"],
        "watts": t["watts"],
        "ms": t["ours"],
        "tflops": flop / t["ours"] / 1e9,
        "kept_a_tile": kept / case.mask_heads / case.tiles(0),
    }


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
    "corrected 128K": lambda: sparse_row(128 * K, 0.047, correct=True),
    "paged128 64K": lambda: sparse_row(64 * K, 0.09, page=128),
    "paged16 64K": lambda: sparse_row(64 * K, 0.09, page=16),
    "paged1 64K": lambda: sparse_row(64 * K, 0.09, page=1),
    "d64 dense 16K": lambda: dense_row(16 * K, 64),
    "d64 dense 64K": lambda: dense_row(64 * K, 64),
    "d64 sparse 64K": lambda: sparse_row(64 * K, 0.09, d=64),
    "d256 dense 16K": lambda: dense_row(16 * K, 256),
    "d256 dense 64K": lambda: dense_row(64 * K, 256),
    "d256 sparse 64K": lambda: sparse_row(64 * K, 0.09, d=256),
    "fp16 dense 16K": lambda: dense_row(16 * K, dtype=F16),
}


def main() -> None:
    names = sys.argv[1:] or list(TABLE)
    rows = []
    for name in names:
        started = time.time()
        row = {"name": name, **TABLE[name]()}
        rows.append(row)
        beside = (
            f" cudnn {row['cudnn_ms']:8.3f} ms {row['cudnn_tflops']:6.1f}  x{row['cudnn_ms'] / row['ms']:.3f}"
            if "cudnn_ms" in row
            else ""
        )
        kept = f" {row['kept_a_tile']:5.1f} blocks a tile" if "kept_a_tile" in row else ""
        print(
            f"{name:16s} {row['ms']:8.3f} ms {row['tflops']:6.1f} TFLOP/s{kept}{beside} "
            f" {row['clock_mhz']} MHz "
            f"{row['watts']} W  ({time.time() - started:.1f} s)",
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
