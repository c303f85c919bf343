"""Attention that skips keys (Dense(skip=...)) beside dense attention, and SpargeAttn with both of its stages.

    python3 bench/cuda/skip_bench.py [--tokens 16384,131072] [--dim 128] [--portable 1] [--out FILE]

32 query heads, 8 KV heads, bf16, causal, batch 1. Inputs are operator_bench.py's, with an attention sink:
all queries share a direction, and the first four keys lie in it. Thresholds are found for shares of skipped
pairs, so that a row says what a share saves; skip=1e-30 skips nothing, which is what looking for it costs.
There rows skip one by one. Rows named "together" are of other inputs: a share of the chunks of 128 keys,
chosen at random, is far from all queries, and all rows skip just these. Calls are captured in CUDA graphs
and timed by turns, medians. Errors are of the first head, against the dense output. --portable 1: by the
kernels of other GPUs, dense attention too.
"""

import statistics

import torch
from operator_bench import DIM, by_lengths, clock, graph_of, milliseconds
from operator_bench import inputs as plain_inputs

import flashprefill as fp

SHARES = (0.25, 0.5, 0.75, 0.9)
TOGETHER = (0.0, 0.5, 0.75, 0.92, 0.98)
CHUNK = 128  # keys that are decided on together


def inputs(tokens, dim, sink=2.0):
    """q, k, v on the device, with a sink."""
    q, k, v = (x[..., :dim].contiguous() for x in plain_inputs(tokens))
    common = torch.randn(dim, generator=torch.Generator("cuda").manual_seed(2), device="cuda").bfloat16()
    q += 0.5 * common
    k[:4] = sink * common * (DIM / dim) ** 0.5
    return q, k, v


def together(tokens, dim):
    """q, v, and per share of TOGETHER the keys of which that share of the chunks is far from all queries."""
    make = torch.Generator("cuda").manual_seed(3)
    common = torch.randn(dim, generator=make, device="cuda")
    common *= dim**0.5 / common.norm()
    q, k, v = (torch.randn(tokens, h, dim, generator=make, device="cuda").bfloat16() / 2 for h in (32, 8, 8))
    q += common.bfloat16()
    order = torch.randperm(-(-tokens // CHUNK) - 1, generator=make, device="cuda") + 1  # the first is near
    keys = {}
    for share in TOGETHER:
        level = torch.zeros(len(order) + 1, device="cuda")
        level[order[: round(share * len(order))]] = -2  # scores of -2 sqrt(dim), give or take 6
        far = level.repeat_interleave(CHUNK)[:tokens, None, None] * common
        keys[share] = k + far.bfloat16()
    return q, keys, v


def skipped_share(stats):
    """Share of the visible blocks that attention skipped, on average of the rows."""
    if stats.skipped is None:
        return 0.0
    return float(torch.as_tensor(stats.skipped).sum()) / float(torch.as_tensor(stats.kept).sum())


def tuned(q, k, v, share, **target):
    """The threshold that skips this share, by bisection of its logarithm."""
    low, high = -6.0, -1.0
    for _ in range(7):
        middle = (low + high) / 2
        _, stats = fp.prefill_attention(q, k, v, fp.Dense(skip=10**middle), return_stats=True, **target)
        low, high = (middle, high) if skipped_share(stats) < share else (low, middle)
    return 10 ** ((low + high) / 2)


def measure(tokens, turns, dim, portable):
    """All rows of one length."""
    target = {"target": "portable"} if portable else {}
    q, k, v = inputs(tokens, dim)
    calls = {"dense": (q, k, v, fp.Dense()), "skip, nothing is": (q, k, v, fp.Dense(skip=1e-30))}
    for share in SHARES:
        skip = tuned(q, k, v, share, **target)
        calls[f"skip {skip:.1e}"] = (q, k, v, fp.Dense(skip=skip))
    calls["SpargeAttn"] = (q, k, v, fp.SpargeAttn(similarity=0.1, cdf=0.9))
    calls["SpargeAttn, skip 1e-2"] = (q, k, v, fp.SpargeAttn(similarity=0.1, cdf=0.9, skip=1e-2))
    far_q, keys, far_v = together(tokens, dim)
    for share, far_k in keys.items():
        calls[f"together {share:.2f}"] = (far_q, far_k, far_v, fp.Dense(skip=1e-3))
    graphs, rows = {}, []
    for name, call in calls.items():
        out, stats = fp.prefill_attention(*call, return_stats=True, **target)
        exact = fp.prefill_attention(*call[:3], fp.Dense(), **target)[:, 0].float()
        rows.append(
            {
                "tokens": tokens,
                "head_dim": dim,
                "target": "portable" if portable else "Hopper's",
                "name": name,
                "density": float(torch.as_tensor(stats.density).mean()),
                "skipped": skipped_share(stats),
                "error": float((out[:, 0].float() - exact).norm() / exact.norm()),
            }
        )
        graphs[name] = graph_of(lambda call=call: fp.prefill_attention(*call, **target))
    times = {name: [] for name in graphs}
    for _ in range(turns):
        for name, graph in graphs.items():
            times[name].append(milliseconds(graph, max(1, 32768 // tokens)))
    base, mhz = statistics.median(times["dense"]), clock()
    for row in rows:
        row["ms"] = statistics.median(times[row["name"]])
        row["of_dense"], row["clock_mhz"] = row["ms"] / base, mhz
    return rows


def line(row):
    """What is printed of a row."""
    return (
        f"{row['tokens']:7d} {row['name']:24s} skipped {row['skipped']:.3f} error {row['error']:.4f} "
        f"{row['ms']:9.3f} ms {row['of_dense']:.3f} of dense {row['clock_mhz']} MHz"
    )


if __name__ == "__main__":
    by_lengths(__doc__, "16384,131072", 5, measure, line, dim=128, portable=0)
