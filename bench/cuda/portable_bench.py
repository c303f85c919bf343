"""Times the portable kernels on a GPU beside PyTorch's FlashAttention-2 and, on Hopper, its own kernels.

    python3 bench/cuda/portable_bench.py [case ...] [--targets portable,portable_small] [--out FILE]

32 query heads, 8 KV heads, bf16, causal, batch 1. Calls are captured in CUDA graphs and timed with events, by
turns, medians, the clock read while the first target runs again. TFLOP/s count the causal half of dense
attention, kept blocks of 128 keys whole, and of the operator the attention alone. The cases are the keys of
CASES; default all.
"""

import argparse
import json
import statistics
import sys
import time

import torch
from attend_bench import clock
from operator_bench import graph_of, inputs, milliseconds, tuned
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import flashprefill as fp

K = 1024
HEADS, KV_HEADS = 32, 8


def plain(tokens, dim, dtype=torch.bfloat16):
    """q, k, v of normal values, [tokens, heads, dim]."""
    make = torch.Generator("cuda").manual_seed(tokens + dim)
    return [
        torch.randn(tokens, heads, dim, generator=make, device="cuda").to(dtype)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]


def flash(q, k, v):
    """PyTorch's FlashAttention-2 on the same inputs."""
    first = [x.transpose(0, 1).contiguous()[None] for x in (q, k, v)]

    def run():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            scaled_dot_product_attention(*first, is_causal=True, enable_gqa=True)

    return run


def random_mask(tokens, density):
    """Blocks at random, the diagonal inside."""
    tiles = -(-tokens // 128)
    make = torch.Generator("cuda").manual_seed(tokens)
    keep = torch.rand(HEADS, tiles, tiles, generator=make, device="cuda") < density
    keep |= torch.eye(tiles, dtype=torch.bool, device="cuda")
    return fp.BlockMask.from_dense(keep.tril(), q_len=tokens, k_len=tokens, block_size=128), int(
        keep.tril().sum()
    )


def dense(tokens, dim, targets):
    """Dense attention."""
    q, k, v = plain(tokens, dim)
    runs = {t: lambda t=t: fp.prefill_attention(q, k, v, fp.Dense(), target=t) for t in targets}
    return {**runs, "FlashAttention-2": flash(q, k, v)}, 4 * HEADS * dim * tokens * (tokens + 1) / 2, {}


def sparse(tokens, dim, density, targets):
    """Attention over a mask that is there."""
    q, k, v = plain(tokens, dim)
    mask, kept = random_mask(tokens, density)
    runs = {t: lambda t=t: fp.attend(q, k, v, mask, target=t) for t in targets}
    return runs, 4 * dim * 128 * 128 * kept, {"kept_per_tile": kept * 128 / HEADS / tokens}


def operator(tokens, density, targets):
    """Selection and attention, selection alone, and up to 16K tokens dense attention."""
    q, k, v = inputs(tokens)
    policy = tuned(q, k, lambda a: fp.FlashPrefill(alpha=a, query_pool=16), density)
    mask = fp.select(q, k, policy)
    runs = {t: lambda t=t: fp.prefill_attention(q, k, v, policy, target=t) for t in targets}
    if tokens <= 16 * K:
        runs |= {
            f"{t}: dense": lambda t=t: fp.prefill_attention(q, k, v, fp.Dense(), target=t) for t in targets
        }
    selects = {f"{t}: select": lambda t=t: fp.select(q, k, policy, target=t) for t in targets}
    same = {}
    for t in targets:
        bits = fp.select(q, k, policy, target=t).dense() != mask.dense()
        same[f"{t}: blocks that differ"] = int(bits.sum())
    extras = {"density": mask.density, "blocks": int(mask.dense().sum()), **same}
    return {**runs, "FlashAttention-2": flash(q, k, v), **selects}, 0, extras


CASES = {
    "dense 4K": lambda t: dense(4 * K, 128, t),
    "dense 16K": lambda t: dense(16 * K, 128, t),
    "dense 64K": lambda t: dense(64 * K, 128, t),
    "dense 16K d64": lambda t: dense(16 * K, 64, t),
    "dense 16K d256": lambda t: dense(16 * K, 256, t),
    "sparse 16K": lambda t: sparse(16 * K, 128, 0.33, t),
    "sparse 64K": lambda t: sparse(64 * K, 128, 0.09, t),
    "sparse 128K": lambda t: sparse(128 * K, 128, 0.047, t),
    "operator 3K": lambda t: operator(3 * K, 0.8, t),
    "operator 4K": lambda t: operator(4 * K, 0.74, t),
    "operator 16K": lambda t: operator(16 * K, 0.33, t),
    "operator 64K": lambda t: operator(64 * K, 0.09, t),
    "operator 128K": lambda t: operator(128 * K, 0.047, t),
}


def measure(name, targets, turns):
    """One row: milliseconds of every contender, interleaved."""
    runs, flop, extras = CASES[name](targets)
    graphs = {who: graph_of(run) for who, run in runs.items()}
    times = {who: [] for who in graphs}
    for _ in range(turns):
        for who, graph in graphs.items():
            times[who].append(milliseconds(graph, 1))
    ms = {who: statistics.median(t) for who, t in times.items()}
    first = graphs[targets[0]]
    for _ in range(max(2, min(100, int(80 / ms[targets[0]])))):
        first.replay()
    time.sleep(0.05)
    mhz, watts = clock()
    torch.cuda.synchronize()
    rates = {who: flop / t / 1e9 for who, t in ms.items()} if flop else {}
    return {"name": name, "ms": ms, "tflops": rates, "clock_mhz": mhz, "watts": watts, **extras}


def main():
    """Print a table and write the rows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="*", default=[])
    cuda = next(b for b in fp.backends() if b.name == "cuda")
    parser.add_argument("--targets", default=",".join(t for t in cuda.targets if t != "portable_medium"))
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--out")
    options = parser.parse_args()
    info = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "turns": options.turns}
    rows = []
    targets = sorted(options.targets.split(","), key=lambda t: t != "portable")
    for name in options.cases or CASES:
        row = measure(name, targets, options.turns)
        rows.append(row)
        fa2 = row["ms"].get("FlashAttention-2")
        parts = []
        for who, ms in row["ms"].items():
            rate = f" {row['tflops'][who]:.0f} TF" if row["tflops"] else ""
            times = f" x{fa2 / ms:.2f}" if fa2 and "select" not in who else ""
            parts.append(f"{who} {ms:.3f}{rate}{times}")
        rest = {k: v for k, v in row.items() if k not in ("name", "ms", "tflops")}
        print(f"{name:15s} " + " | ".join(parts), rest, flush=True)
        torch.cuda.empty_cache()
        if options.out:
            with open(options.out, "w") as f:
                json.dump({**info, "command": " ".join(sys.argv), "rows": rows}, f, indent=1)


if __name__ == "__main__":
    main()
