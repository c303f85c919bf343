"""FlexPrefill's and MInference's selection on a GPU beside FlashPrefill's, and the operators beside cuDNN.

    python3 bench/cuda/vertical_slash_bench.py [--tokens 16384,65536,131072] [--out FILE]

Shapes, inputs and timing as in operator_bench.py: graphs, all contenders by turns in one run, medians. gamma
is set so that the density is that of operator_bench.py's table: on made-up text, whose mass is spread, the
published one keeps most blocks. "lines" and "query-aware" force all heads to one kind, so they bound what a
mixture costs. MInference has the numbers that its authors publish for Llama 3.1 (512, 2048) and for heads
that they don't know (1000, 6096).
"""

import statistics

from operator_bench import DENSITY, by_lengths, clock, graph_of, inputs, milliseconds, tuned
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import flashprefill as fp


def with_density(q, k, make_policy, density):
    """The policy whose gamma gives this density, or as little as it can."""
    low, high = 0.0, 1.0
    for _ in range(12):
        gamma = (low + high) / 2
        low, high = (low, gamma) if fp.select(q, k, make_policy(gamma)).density > density else (gamma, high)
    return make_policy(low or high)


def measure(tokens, turns):
    """All contenders at one length."""
    q, k, v = inputs(tokens)
    first = [x.transpose(0, 1).contiguous()[None] for x in (q, k, v)]
    density = DENSITY[tokens]
    pooled = tuned(q, k, lambda a: fp.FlashPrefill(alpha=a, query_pool=16), density)
    policies = {
        "FlashPrefill, query_pool=16": pooled,
        "FlashPrefill, query_pool=1": fp.FlashPrefill(alpha=pooled.alpha),
        "FlexPrefill, lines": with_density(
            q, k, lambda g: fp.FlexPrefill(gamma=g, tau=0.0, min_budget=128), density
        ),
        "FlexPrefill, query-aware": with_density(
            q, k, lambda g: fp.FlexPrefill(gamma=g, tau=10.0, min_budget=128), density
        ),
        "FlexPrefill, published": fp.FlexPrefill(),
        "MInference, 512 and 2048": fp.MInference(vertical=512, slash=2048),
        "MInference, 1000 and 6096": fp.MInference(),
    }

    def dense():
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            scaled_dot_product_attention(*first, is_causal=True, enable_gqa=True)

    graphs, densities = {"cuDNN": graph_of(dense)}, {}
    for name, policy in policies.items():
        densities[name] = fp.select(q, k, policy).density
        graphs[f"select, {name}"] = graph_of(lambda policy=policy: fp.select(q, k, policy))
        graphs[f"operator, {name}"] = graph_of(lambda policy=policy: fp.prefill_attention(q, k, v, policy))
    times = {name: [] for name in graphs}
    calls = max(1, 65536 // tokens)
    for _ in range(turns):
        for name, graph in graphs.items():
            times[name].append(milliseconds(graph, calls))
    base, mhz = statistics.median(times["cuDNN"]), clock()
    return [
        {
            "tokens": tokens,
            "name": name,
            "density": densities.get(name.partition(", ")[2]),
            "ms": statistics.median(t),
            "over_cudnn": base / statistics.median(t),
            "clock_mhz": mhz,
        }
        for name, t in times.items()
    ]


def line(row):
    """What is printed of a row."""
    return (
        f"{row['tokens']:7d} {row['name']:40s} {row['density'] or 1:.3f} {row['ms']:9.4f} ms "
        f"{row['over_cudnn']:7.2f}x cuDNN {row['clock_mhz']} MHz"
    )


if __name__ == "__main__":
    by_lengths(__doc__, "16384,65536,131072", 7, measure, line)
