"""One packed batch of eight lengths (1K to 64K) beside the sum of its sequences alone, on a GPU.

    python3 bench/cuda/batch_bench.py [--out FILE]

32 query heads, 8 KV heads, head_dim 128, bf16, causal; inputs as operator_bench.py makes them. Calls are
captured in CUDA graphs; medians of five turns.
"""

import argparse
import statistics

import torch
from operator_bench import clock, graph_of, inputs, milliseconds, write_results

import flashprefill as fp

LENGTHS = [1024, 65536, 2048, 32768, 4096, 16384, 8192, 24576]
POLICIES = {
    "dense": fp.Dense(),
    "FlashPrefill, alpha .9, query_pool=16": fp.FlashPrefill(alpha=0.9, query_pool=16),
}


def main():
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out")
    arguments = parser.parse_args()
    parts = [inputs(n) for n in LENGTHS]
    q, k, v = (torch.cat([part[i] for part in parts]) for i in range(3))
    cu = torch.tensor([0, *LENGTHS]).cumsum(0).int().cuda()
    layout = {
        "cu_seqlens_q": cu,
        "cu_seqlens_k": cu,
        "max_seqlen_q": max(LENGTHS),
        "max_seqlen_k": max(LENGTHS),
    }
    rows = []
    for name, policy in POLICIES.items():
        whole = graph_of(lambda p=policy: fp.prefill_attention(q, k, v, p, **layout))
        alone = [graph_of(lambda part=part, p=policy: fp.prefill_attention(*part, p)) for part in parts]
        together, apart = [], []
        for _ in range(5):
            together.append(milliseconds(whole, 3))
            apart.append(sum(milliseconds(graph, 3) for graph in alone))
        batch, total = statistics.median(together), statistics.median(apart)
        rows.append(
            {"name": name, "batch_ms": batch, "sum_ms": total, "ratio": batch / total, "clock_mhz": clock()}
        )
        print(
            f"{name:40s} batch {batch:8.3f} ms, sum of its parts {total:8.3f} ms: {batch / total:.3f}",
            flush=True,
        )
    if arguments.out:
        write_results(arguments.out, rows, lengths=LENGTHS)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
