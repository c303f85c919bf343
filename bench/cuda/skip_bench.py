"""Attention that skips keys (Dense(skip=...)) beside dense attention, and SpargeAttn with both of its stages.

    python3 bench/cuda/skip_bench.py [--tokens 16384,131072] [--dim 128] [--out FILE]

32 query heads, 8 KV heads, bf16, causal, batch 1. Inputs are operator_bench.py's, with an attention sink:
all queries share a direction, and the first four keys lie in it. Thresholds are found for shares of skipped
pairs, so that a row says what a share saves; skip=1e-30 skips nothing, which is what looking for it costs.
Calls are captured in CUDA graphs and timed by turns, medians. Errors are of the first head, against the
dense output.
"""

import statistics

import torch
from operator_bench import DIM, by_lengths, clock, graph_of, milliseconds
from operator_bench import inputs as plain_inputs

import flashprefill as fp

SHARES = (0.25, 0.5, 0.75, 0.9)


def inputs(tokens, dim, sink=2.0):
    """q, k, v on the device, with a sink."""
    q, k, v = (x[..., :dim].contiguous() for x in plain_inputs(tokens))
    common = torch.randn(dim, generator=torch.Generator("cuda").manual_seed(2), device="cuda").bfloat16()
    q += 0.5 * common
    k[:4] = sink * common * (DIM / dim) ** 0.5
    return q, k, v


def skipped_share(q, k, v, skip):
    """Share of the visible blocks that attention skips, on average of the rows."""
    _, stats = fp.prefill_attention(q, k, v, fp.Dense(skip=skip), return_stats=True)
    return float(torch.as_tensor(stats.skipped).sum()) / float(torch.as_tensor(stats.kept).sum())


def tuned(q, k, v, share):
    """The threshold that skips this share, by bisection of its logarithm."""
    low, high = -12.0, 0.0
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (middle, high) if skipped_share(q, k, v, 10**middle) < share else (low, middle)
    return 10 ** ((low + high) / 2)


def measure(tokens, turns, dim):
    """All rows of one length."""
    q, k, v = inputs(tokens, dim)
    policies = {"dense": fp.Dense(), "skip, nothing is": fp.Dense(skip=1e-30)}
    for share in SHARES:
        skip = tuned(q, k, v, share)
        policies[f"skip {skip:.1e}"] = fp.Dense(skip=skip)
    policies["SpargeAttn"] = fp.SpargeAttn(similarity=0.1, cdf=0.9)
    policies["SpargeAttn, skip 1e-2"] = fp.SpargeAttn(similarity=0.1, cdf=0.9, skip=1e-2)
    exact = fp.prefill_attention(q, k, v, fp.Dense())[:, 0].float()
    graphs, rows = {}, []
    for name, policy in policies.items():
        out, stats = fp.prefill_attention(q, k, v, policy, return_stats=True)
        skipped = stats.skipped
        rows.append(
            {
                "tokens": tokens,
                "head_dim": dim,
                "name": name,
                "density": float(torch.as_tensor(stats.density).mean()),
                "skipped": 0.0
                if skipped is None
                else float(torch.as_tensor(skipped).sum()) / float(torch.as_tensor(stats.kept).sum()),
                "error": float((out[:, 0].float() - exact).norm() / exact.norm()),
            }
        )
        graphs[name] = graph_of(lambda policy=policy: fp.prefill_attention(q, k, v, policy))
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
    by_lengths(__doc__, "16384,131072", 5, measure, line, dim=128)
