"""S2O on a GPU: selecting alone and the operator, beside Gather over the same segments and dense attention.

    python3 bench/cuda/s2o_bench.py [--tokens 16384,131072] [--out FILE]

32 query heads, 8 KV heads, head_dim 128, bf16, causal, batch 1; inputs of operator_bench.py with queries
times 2. Calls are captured in CUDA graphs and timed by turns, medians.
"""

import statistics

from operator_bench import by_lengths, clock, graph_of, inputs, milliseconds

import flashprefill as fp

POLICIES = {
    "S2O": fp.S2O(),
    "S2O, tau 0.1": fp.S2O(tau=0.1),
    "S2O, per KV head": fp.S2O(share_heads=True),
    "Gather, segment 512, per query head": fp.Gather(segment=512, share_heads=False),
    "Gather": fp.Gather(),
    "dense": fp.Dense(),
}


def measure(tokens, turns):
    """All rows of one length."""
    q, k, v = inputs(tokens)
    q *= 2
    graphs, rows = {}, []
    for name, policy in POLICIES.items():
        mask = fp.select(q, k, policy)
        lists = mask.key_lists
        rows.append(
            {
                "tokens": tokens,
                "name": name,
                "density": float(mask.density),
                "keys_per_list": None if lists is None else float(lists[..., 0].float().mean()),
            }
        )
        if name != "dense":
            graphs[name, "select_ms"] = graph_of(lambda policy=policy: fp.select(q, k, policy))
        graphs[name, "operator_ms"] = graph_of(lambda policy=policy: fp.prefill_attention(q, k, v, policy))
    times = {which: [] for which in graphs}
    for _ in range(turns):
        for which, graph in graphs.items():
            times[which].append(milliseconds(graph, max(1, 32768 // tokens)))
    for row in rows:
        for name, what in graphs:
            if name == row["name"]:
                row[what] = statistics.median(times[name, what])
        row["clock_mhz"] = clock()
    return rows


if __name__ == "__main__":
    by_lengths(__doc__, "16384,131072", 3, measure, str)
