"""Selection alone on a GPU, and the attend kernel's share of an operator over even lists of blocks.

    python3 bench/cuda/select_bench.py [--tokens 4096,16384,...] [--alone | --pooled | --sketch | --strided]
                                     [--out FILE]

32 query heads, 8 KV heads, head_dim 128, bf16, causal, batch 1; inputs and thresholds as operator_bench.py
makes them. Calls are captured in CUDA graphs, several in one timing so that the host's launches are not
measured, medians. A graph of a selection holds ten calls into one mask, whose zeros are not made again.
"even lists" is select, then attend over a mask of random blocks of the same density: every tile keeps as
large a share of what it sees, however the made-up text spreads its topics. --alone leaves all but
selections out, so that they run on a cooler chip. --pooled are the methods of pooled or sampled rows,
alone; --sketch is Sketch by how many query rows are pooled, alone, with densities. --strided is XAttention
and RRAttention next to FlashPrefill instead, thresholds tuned to one density, and cuDNN's dense attention;
a graph of a selection holds one call there, zeros with it.
"""

import argparse
import statistics
from unittest.mock import patch

import torch
from operator_bench import DENSITY, HEADS, clock, graph_of, inputs, milliseconds, tuned, write_results
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import flashprefill as fp

CALLS = 10  # of a selection, in its graph
DENSITIES = {**DENSITY, 262144: 0.042}


def even_mask(tokens, density):
    """A mask a head whose tiles keep this share of the blocks that they see, the diagonal one among them."""
    make = torch.Generator("cuda").manual_seed(1)
    blocks = tokens // 128
    seen = torch.arange(1, blocks + 1, device="cuda")
    keep = torch.empty(HEADS, blocks, blocks, dtype=torch.bool, device="cuda")
    for head in keep:
        rank = torch.rand(blocks, blocks, device="cuda", generator=make)
        rank.masked_fill_(seen[None, :] > seen[:, None], 2.0)
        rank.fill_diagonal_(-1.0)
        head.copy_(rank.argsort(-1).argsort(-1) < (seen * density).round().clamp_min(1)[:, None])
    return fp.BlockMask.from_dense(keep, q_len=tokens, k_len=tokens, block_size=128)


def graph_of_selections(q, k, policy):
    """A graph of ten selections into one mask, and the mask, which must live as long as the graph."""
    mask = fp.select(q, k, policy)
    with patch.object(fp.BlockMask, "_for_policy", lambda *_: mask):
        return graph_of(lambda: [fp.select(q, k, policy) for _ in range(CALLS)]), mask


def copy_rate():
    """TB/s of a copy of 1 GiB from the device to itself, bytes read and written together."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(8):
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return 2 * source.numel() / min(times) / 1e9


def medians(graphs, tokens, turns, calls_inside=None):
    """Milliseconds of each graph, by turns; calls_inside is how many calls a graph holds, if not one."""
    calls = max(1, 65536 // tokens)
    times = {name: [] for name in graphs}
    for _ in range(turns):
        for name, graph in graphs.items():
            inside = (calls_inside or {}).get(name, 1)
            times[name].append(milliseconds(graph, max(1, calls // inside)) / inside)
    return {name: statistics.median(t) for name, t in times.items()}


def measure_strided(tokens, turns):
    """All rows of one length of the policies that score strided cells."""
    q, k, v = inputs(tokens)

    def tuned_threshold(make_policy):
        low, high = 0.0, 1.0
        for _ in range(10):
            middle = (low + high) / 2
            kept = fp.select(q, k, make_policy(middle)).density
            low, high = (low, middle) if kept > DENSITIES[tokens] else (middle, high)
        return make_policy((low + high) / 2)

    policies = {
        "FlashPrefill, query_pool=16": tuned(
            q, k, lambda a: fp.FlashPrefill(alpha=a, query_pool=16), DENSITIES[tokens]
        ),
        "XAttention, stride=16": tuned_threshold(lambda t: fp.XAttention(threshold=t)),
        "XAttention, stride=8": tuned_threshold(lambda t: fp.XAttention(threshold=t, stride=8)),
        "RRAttention, stride=8": tuned_threshold(lambda t: fp.RRAttention(threshold=max(t, 1e-3))),
    }
    first = [x.transpose(0, 1).contiguous()[None] for x in (q, k, v)]

    def dense():
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            scaled_dot_product_attention(*first, is_causal=True, enable_gqa=True)

    graphs, density = {"cuDNN, dense": graph_of(dense)}, {}
    for name, policy in policies.items():
        density[f"operator, {name}"] = fp.select(q, k, policy).density
        graphs[f"select, {name}"] = graph_of(lambda p=policy: fp.select(q, k, p))
        graphs[f"operator, {name}"] = graph_of(lambda p=policy: fp.prefill_attention(q, k, v, p))
    times = medians(graphs, tokens, turns)
    mhz = clock()
    return [
        {
            "tokens": tokens,
            "name": name,
            "ms": ms,
            "clock_mhz": mhz,
            "over_cudnn": times["cuDNN, dense"] / ms,
            **({"density": density[name]} if name in density else {}),
        }
        for name, ms in times.items()
    ]


def sketches(pooled):
    """Sketch by its query_pool, next to the pooled FlashPrefill."""
    policies = {"query_pool=16": pooled}
    for pool in (16, 32, 64):
        policies[f"Sketch by mass, query_pool={pool}"] = fp.Sketch(query_pool=pool)
        policies[f"Sketch by alpha, query_pool={pool}"] = fp.Sketch(alpha=pooled.alpha, query_pool=pool)
        policies[f"Sketch by gain, query_metric, 6 outliers, query_pool={pool}"] = fp.Sketch(
            gain=0.0025, query_metric=True, outliers=6, query_pool=pool
        )
    return policies


def measure(tokens, turns, alone, of_pooled_rows, of_sketches):
    """All rows of one length."""
    q, k, v = inputs(tokens)
    pooled = tuned(q, k, lambda a: fp.FlashPrefill(alpha=a, query_pool=16), DENSITIES[tokens])
    of_pooled = {
        "query_pool=16": pooled,
        "Prism": fp.Prism(),
        "SpargeAttn, cdf": fp.SpargeAttn(similarity=0.1, cdf=0.9),
        "SpargeAttn, topk": fp.SpargeAttn(cdf=None, topk=DENSITIES[tokens]),
        "SampleAttention": fp.SampleAttention(),
        "MInference, block-sparse": fp.MInference(heads=[("block_sparse", 100, 0)] * HEADS),
        "MInference": fp.MInference(),
    }
    policies = (
        of_pooled
        if of_pooled_rows
        else sketches(pooled)
        if of_sketches
        else {
            "query_pool=16": pooled,
            "query_pool=1": fp.FlashPrefill(alpha=pooled.alpha),
            "shared, query_pool=16": fp.FlashPrefill(alpha=pooled.alpha, query_pool=16, share_heads=True),
            "Sketch by alpha": fp.Sketch(mass=None, alpha=pooled.alpha),
            "Sketch by mass": fp.Sketch(),
            "Sketch by gain": fp.Sketch(gain=0.0025),
            "Sketch by mass, query_metric": fp.Sketch(query_metric=True),
            "Streaming": fp.Streaming(),
        }
    )
    made = {f"select, {name}": graph_of_selections(q, k, policy) for name, policy in policies.items()}
    graphs = {name: graph for name, (graph, _) in made.items()}
    density = {name: mask.density for name, (_, mask) in made.items()} if of_sketches else {}
    inside = dict.fromkeys(graphs, CALLS)

    def both():
        fp.select(q, k, pooled)
        fp.attend(q, k, v, mask)

    if not alone:
        everything = fp.FlashPrefill(alpha=0.0, query_pool=16)
        mask = even_mask(tokens, DENSITIES[tokens])
        graphs["attend, even lists"] = graph_of(lambda: fp.attend(q, k, v, mask))
        graphs["select, query_pool=16, then attend, even lists"] = graph_of(both)
        graphs["operator, query_pool=16, structured"] = graph_of(
            lambda: fp.prefill_attention(q, k, v, pooled)
        )
        if tokens <= 65536:
            graphs["operator, everything kept"] = graph_of(lambda: fp.prefill_attention(q, k, v, everything))
            graphs["operator, dense"] = graph_of(lambda: fp.prefill_attention(q, k, v, fp.Dense()))
    times = medians(graphs, tokens, turns, inside)
    mhz = clock()
    even = 0 if alone else int(mask.stats.kept.sum())
    return [
        {
            "tokens": tokens,
            "name": name,
            "ms": ms,
            "clock_mhz": mhz,
            **({"tflops": even * 4 * 128**3 / ms / 1e9} if name == "attend, even lists" else {}),
            **({"density": density[name]} if name in density else {}),
        }
        for name, ms in times.items()
    ]


def main():
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", default=",".join(map(str, DENSITIES)))
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--alone", action="store_true", help="selections and nothing else")
    parser.add_argument("--pooled", action="store_true", help="methods of pooled or sampled rows, alone")
    parser.add_argument("--sketch", action="store_true", help="Sketch by its query_pool, alone")
    parser.add_argument("--strided", action="store_true", help="XAttention and RRAttention")
    parser.add_argument("--out")
    arguments = parser.parse_args()
    rows = []
    with torch.inference_mode():
        copy = copy_rate()
        print(f"{torch.cuda.get_device_name()}, copy {copy:.2f} TB/s, {clock()} MHz", flush=True)
        for tokens in map(int, arguments.tokens.split(",")):
            for row in (
                measure_strided(tokens, arguments.turns)
                if arguments.strided
                else measure(
                    tokens,
                    arguments.turns,
                    arguments.alone or arguments.pooled or arguments.sketch,
                    arguments.pooled,
                    arguments.sketch,
                )
            ):
                rows.append(row)
                rate = f" {row['tflops']:6.1f} TFLOP/s" if "tflops" in row else ""
                rate += f" {row['over_cudnn']:6.2f}x cuDNN" if "over_cudnn" in row else ""
                rate += f" density {row['density']:.3f}" if "density" in row else ""
                print(
                    f"{tokens:7d} {row['name']:50s} {row['ms']:9.4f} ms{rate} {row['clock_mhz']} MHz",
                    flush=True,
                )
            torch.cuda.empty_cache()
    if arguments.out:
        write_results(arguments.out, rows, copy_tb_s=copy)


if __name__ == "__main__":
    main()
