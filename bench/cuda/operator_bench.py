"""The whole operator on a GPU, selection inside, beside PyTorch's cuDNN and flash attention in the same run.

    python3 bench/cuda/operator_bench.py [--tokens 4096,16384,...] [--out FILE]

32 query heads, 8 KV heads, head_dim 128, bf16, causal, batch 1. Inputs have topics that keys and queries
share, so that energies differ as they do in text; alpha is set so that the density is that of the table in
the papers. Calls are captured in CUDA graphs and timed with events, by turns, medians; every graph of a turn
has inputs larger than L2 from 16K tokens on.
"""

import argparse
import datetime
import json
import statistics
import subprocess
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import flashprefill as fp

HEADS, KV_HEADS, DIM = 32, 8, 128
DENSITY = {1024: 1.0, 2048: 0.9, 4096: 0.74, 8192: 0.53, 16384: 0.33, 32768: 0.18, 65536: 0.09, 131072: 0.047}


def inputs(tokens, run=256):
    """q, k, v on the device, [tokens, heads, dim], with topics of `run` keys that lie together."""
    make = torch.Generator("cuda").manual_seed(tokens)
    topics = torch.randn(64, DIM, generator=make, device="cuda")

    def noise(heads):
        return torch.randn(tokens, heads, DIM, generator=make, device="cuda")

    def topic(heads, run):
        which = torch.randint(64, (tokens // run, heads), generator=make, device="cuda")
        return topics[which.repeat_interleave(run, 0)]

    q = noise(HEADS) + 0.5 * topic(HEADS, 128)
    k = noise(KV_HEADS) + 0.5 * topic(KV_HEADS, run)
    return [x.bfloat16() for x in (q, k, noise(KV_HEADS))]


def tuned(q, k, make_policy, density):
    """The policy whose alpha gives this density."""
    low, high = 0.0, 1.0
    for _ in range(12):
        alpha = (low + high) / 2
        mask = fp.select(q, k, make_policy(alpha))
        low, high = (alpha, high) if mask.density > density else (low, alpha)
    return make_policy((low + high) / 2)


def graph_of(call):
    """The call as a graph, warmed up."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def milliseconds(graph, calls):
    """One timing."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(calls):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / calls


def measure(tokens, turns):
    """All contenders at one length."""
    q, k, v = inputs(tokens)
    first = [x.transpose(0, 1).contiguous()[None] for x in (q, k, v)]
    pooled = tuned(q, k, lambda a: fp.FlashPrefill(alpha=a, query_pool=16), DENSITY[tokens])
    policies = {
        "dense": fp.Dense(),
        "FlashPrefill, query_pool=16": pooled,
        "FlashPrefill, query_pool=1": fp.FlashPrefill(alpha=pooled.alpha),
        "FlashPrefill, shared + mean correction": fp.FlashPrefill(
            alpha=pooled.alpha, query_pool=16, share_heads=True, mean_correction=True
        ),
        "Sketch": fp.Sketch(alpha=pooled.alpha),
    }
    graphs, density, masks = {}, {}, {}

    def sdpa(backend):
        with sdpa_kernel(backend):
            scaled_dot_product_attention(*first, is_causal=True, enable_gqa=True)

    graphs["cuDNN"] = graph_of(lambda: sdpa(SDPBackend.CUDNN_ATTENTION))
    graphs["PyTorch flash"] = graph_of(lambda: sdpa(SDPBackend.FLASH_ATTENTION))
    for name, policy in policies.items():
        masks[name] = fp.select(q, k, policy)
        density[name] = masks[name].density
        graphs[name] = graph_of(lambda policy=policy: fp.prefill_attention(q, k, v, policy))
        if name != "dense":
            graphs[f"{name}: select alone"] = graph_of(lambda policy=policy: fp.select(q, k, policy))
    times = {name: [] for name in graphs}
    calls = max(1, 65536 // tokens)
    for _ in range(turns):
        for name, graph in graphs.items():
            times[name].append(milliseconds(graph, calls))
    work = 2.0 * HEADS * DIM * tokens * (tokens + 1)
    base = statistics.median(times["cuDNN"])
    return [
        {
            "tokens": tokens,
            "name": name,
            "density": density.get(name),
            "ms": statistics.median(t),
            "over_cudnn": base / statistics.median(t),
            "dense_equivalent_tflops": work / statistics.median(t) / 1e9,
        }
        for name, t in times.items()
    ]


def clock():
    """SM clock now, MHz."""
    query = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0])


def write_results(path, rows, **more):
    """Write rows with what makes a figure of them: the date, the command, the card, the versions."""
    results = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python3", *sys.argv]),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "flashprefill": fp.__version__,
        **more,
        "rows": rows,
    }
    with open(path, "w", encoding="utf-8") as file:
        json.dump(results, file, indent=1)


def by_lengths(description, tokens, turns, measure, line, **more):
    """Be a bench's main: ask for lengths and turns, print a line per row that is measured, write the rows.

    Args:
        description: what --help says.
        tokens: lengths, as the option takes them, if none are asked for.
        turns: turns, likewise.
        measure: makes the rows of a length, from tokens, turns and the options of `more`.
        line: what is printed of a row.
        more: further options, integers, with their defaults.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", default=tokens)
    parser.add_argument("--turns", type=int, default=turns)
    parser.add_argument("--out")
    for name, default in more.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    rows = []
    with torch.inference_mode():
        for length in map(int, asked.tokens.split(",")):
            for row in measure(length, asked.turns, **{name: getattr(asked, name) for name in more}):
                rows.append(row)
                print(line(row), flush=True)
            torch.cuda.empty_cache()
    if asked.out:
        write_results(asked.out, rows)


def main():
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", default=",".join(map(str, DENSITY)))
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--out")
    arguments = parser.parse_args()
    rows = []
    with torch.inference_mode():
        for tokens in map(int, arguments.tokens.split(",")):
            rows += measure(tokens, arguments.turns)
            mhz = clock()
            for row in rows:
                if row["tokens"] == tokens:
                    row["clock_mhz"] = mhz
                    print(
                        f"{tokens:7d} {row['name']:52s} {row['density'] or 1:.3f} {row['ms']:9.3f} ms "
                        f"{row['over_cudnn']:6.2f}x cuDNN {mhz} MHz",
                        flush=True,
                    )
    if arguments.out:
        write_results(arguments.out, rows)


if __name__ == "__main__":
    main()
