"""What policies do that are not tuned: density, attention held and time on a GPU, by length.

    python3 bench/cuda/defaults_bench.py [--tokens 4096,...,262144] [--out FILE]

Inputs of operator_bench.py: topics that keys and queries share, the same at every length, so a threshold that
is tuned at one length shows what it does at the others. Per policy: density, the share of the true attention
that its blocks hold over sampled query rows (mean, and 5th percentile over rows and heads), select and the
whole operator in milliseconds (graphs, by turns, medians), and how much faster the operator is than cuDNN's
dense attention in the same run.
"""

import argparse
import statistics

import torch
from operator_bench import DIM, HEADS, KV_HEADS, graph_of, inputs, milliseconds, write_results
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import flashprefill as fp

SAMPLES = 64  # query rows, one per stretch of equal length
BLOCK = 128
METRIC = {"query_metric": True, "outliers": 6, "query_pool": 64}
POLICIES = {
    "Sketch, mass .95": fp.Sketch(mass=0.95),
    "Sketch, mass .9": fp.Sketch(mass=0.9),
    "Sketch, mass .9, metric": fp.Sketch(mass=0.9, **METRIC),
    "Sketch, gain .0015, metric": fp.Sketch(gain=0.0015, **METRIC),
    "Sketch, gain .0025, metric": fp.Sketch(gain=0.0025, **METRIC),
    "Sketch, gain .004, metric": fp.Sketch(gain=0.004, **METRIC),
    "FlashPrefill": fp.FlashPrefill(),
    "FlashPrefill, pooled": fp.FlashPrefill(query_pool=16),
    "FlexPrefill": fp.FlexPrefill(),
    "XAttention": fp.XAttention(),
    "MInference": fp.MInference(),
}


def sampled_rows(tokens):
    """A row of each stretch, always the same ones."""
    make = torch.Generator().manual_seed(tokens)
    stretch = tokens // SAMPLES
    return (torch.arange(SAMPLES) * stretch + torch.randint(stretch, (SAMPLES,), generator=make)).cuda()


def true_masses(q, k, rows):
    """The attention of every block for the sampled rows, [heads, rows, blocks], in fp32."""
    tokens, group = k.shape[0], HEADS // KV_HEADS
    masses = torch.empty(HEADS, len(rows), tokens // BLOCK, device="cuda")
    future = torch.arange(tokens, device="cuda") > rows[:, None]
    for head in range(HEADS):
        scores = q[rows, head].float() @ k[:, head // group].float().T * DIM**-0.5
        weights = scores.masked_fill_(future, -torch.inf).softmax(-1)
        masses[head] = weights.view(len(rows), -1, BLOCK).sum(-1)
    return masses


def held(masses, rows, mask):
    """Mean and 5th percentile of the share of attention that the mask's blocks hold."""
    words = torch.as_tensor(mask.bits)  # [heads, tile rows, words]
    words = words.view(torch.int64)[:, rows // BLOCK]
    bits = (words[..., None] >> torch.arange(64, device="cuda")) & 1
    kept = bits.flatten(-2)[..., : masses.shape[-1]]
    share = (masses * kept).sum(-1).flatten()
    return float(share.mean()), float(share.quantile(0.05))


def measure(tokens, turns):
    """A row per policy."""
    q, k, v = inputs(tokens)
    rows = sampled_rows(tokens)
    masses = true_masses(q, k, rows)
    first = [x.transpose(0, 1).contiguous()[None] for x in (q, k, v)]

    def cudnn():
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            scaled_dot_product_attention(*first, is_causal=True, enable_gqa=True)

    graphs, facts = {"cuDNN": graph_of(cudnn)}, {}
    for name, policy in POLICIES.items():
        mask = fp.select(q, k, policy)
        mean, low = held(masses, rows, mask)
        facts[name] = {"policy": policy.text, "density": mask.density, "held": mean, "held_5th": low}
        del mask
        graphs[name] = graph_of(lambda policy=policy: fp.prefill_attention(q, k, v, policy))
        graphs[name, "select"] = graph_of(lambda policy=policy: fp.select(q, k, policy))
    times = {name: [] for name in graphs}
    calls = max(1, 65536 // tokens)
    for _ in range(turns):
        for name, graph in graphs.items():
            times[name].append(milliseconds(graph, calls))
    ms = {name: statistics.median(t) for name, t in times.items()}
    table = []
    for name, fact in facts.items():
        row = {"tokens": tokens, "name": name, "cudnn_ms": ms["cuDNN"], "ms": ms[name]}
        row |= {"select_ms": ms[name, "select"], "speedup": ms["cuDNN"] / ms[name]} | fact
        table.append(row)
        quality = f"density {fact['density']:.3f}  held {fact['held']:.3f} {fact['held_5th']:.3f}"
        times_of = f"select {row['select_ms']:8.3f}  operator {row['ms']:8.3f} ms, {row['speedup']:.2f}x"
        print(f"{tokens:7} {name:28} {quality}  {times_of}", flush=True)
    return table


def main():
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", default="4096,8192,16384,32768,65536,131072,262144")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out")
    options = parser.parse_args()
    rows = [row for n in options.tokens.split(",") for row in measure(int(n), options.turns)]
    if options.out:
        write_results(options.out, rows)


if __name__ == "__main__":
    main()
