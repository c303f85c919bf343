"""Chunks of a long prompt on a GPU, as an engine that serves sends them: two builds of the library by turns.

    python3 bench/cuda/chunks_bench.py OLD.so NEW.so [--tokens 32768,131072] [--chunks 1024,8192]

The last rows of a prompt attend to all of it over pages of 16 tokens that lie in any order: once as a chunk
in the middle of a longer prompt, once as the last one, whose dense tail keeps everything. A chunk as long as
the prompt is the whole prompt. Inputs as in operator_bench.py. For select, attend and the whole operator:
medians, the median of the turns' ratios (new over old), and for attend TFLOP/s on kept blocks. For every
case a list schedule of its tiles over the chip's multiprocessors says how level the work could be: "natural"
in the order of tiles, "sorted" with the heaviest first, each as a share of the time of level work.
"""

import argparse
import ctypes
import heapq
import statistics
from ctypes import byref

import torch
from operator_bench import DIM, HEADS, KV_HEADS, graph_of, inputs, milliseconds, tuned, write_results
from two_builds import Build, Case, policy_of, problem_of

import flashprefill as fp
from flashprefill import _abi

PAGE = 16
DENSITY = {4096: 0.74, 8192: 0.47, 16384: 0.33, 32768: 0.27, 65536: 0.2, 131072: 0.155}
TILE, STEP_CYCLES, TILE_CYCLES = 128, 2260, 2350  # docs/hopper-attend.md


def chunk_problem(q, k, v, final):
    """The problem of q's rows at the end of k, whose pages are shuffled. And what has to stay alive."""
    tokens = k.shape[0]
    pages = tokens // PAGE
    order = torch.randperm(pages, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    table = torch.empty(pages, dtype=torch.int32, device="cuda")
    table[order] = torch.arange(pages, dtype=torch.int32, device="cuda")
    caches = [x.view(pages, PAGE, KV_HEADS, DIM)[order].contiguous() for x in (k, v)]
    starts = torch.tensor([0, q.shape[0]], dtype=torch.int32, device="cuda")
    used = torch.tensor([tokens], dtype=torch.int32, device="cuda")
    p = problem_of(q, k, v)
    p.max_seqlen_k, p.total_k = tokens, 0
    p.final_chunk = final
    p.cu_seqlens_q, p.seqused_k = starts.data_ptr(), used.data_ptr()
    p.block_table, p.block_table_stride = table.data_ptr(), pages
    p.page_size, p.page_count, p.pages_per_seq = PAGE, pages, pages
    for name, x in (("k", caches[0]), ("v", caches[1])):
        setattr(p, name, _abi.Tensor(x.data_ptr(), _abi.BF16, 0, (ctypes.c_int64 * 4)(*x.stride())))
    return p, (table, caches, starts, used)


def add_attend(case, build, p):
    """A graph of attend alone, over the mask that select has made."""
    output = case.keep[2]
    own = build.workspace(build.lib.fp_attend_workspace, byref(p), byref(case.mask), None)

    def attend():
        e = _abi.sized(_abi.Exec)
        e.stream = torch.cuda.current_stream().cuda_stream
        _, address, size = own
        build.check(build.lib.fp_attend(byref(p), byref(case.mask), byref(e), byref(output), address, size))

    case.graphs["select"].replay()
    case.graphs["attend"] = graph_of(attend)


def level(counts, section_rows, processors):
    """Shares of perfectly level work: tiles in their natural order, and with the heaviest first."""
    cost = counts.float() * STEP_CYCLES + TILE_CYCLES  # [heads, tiles]
    heads, tiles = cost.shape
    natural = cost.flip(1).view(heads // section_rows, section_rows, tiles).transpose(1, 2).flatten()

    def makespan(items):
        free = [0.0] * processors
        for item in items:
            heapq.heappush(free, heapq.heappop(free) + item)
        return max(free)

    ideal = float(cost.sum()) / processors
    return ideal / makespan(natural.tolist()), ideal / makespan(natural.sort(descending=True).values.tolist())


def compare(builds, p, policy, q, turns):
    """A row per verb."""
    cases = [Case(build, p, policy, q) for build in builds]
    for case, build in zip(cases, builds, strict=True):
        add_attend(case, build, p)
        case.graphs["operator"].replay()
    torch.cuda.synchronize()
    equal = bool((cases[0].bits == cases[1].bits).all()) and bool((cases[0].out == cases[1].out).all())
    counts = cases[0].counts.view(cases[0].mask.heads, -1)[:, : -(-q.shape[0] // TILE)].cpu()
    kept = int(counts.sum())
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    natural, sorted_ = level(counts, counts.shape[0] // KV_HEADS, processors)
    rows = []
    for what in ("select", "attend", "operator"):
        calls = max(1, min(50, round(4 / milliseconds(cases[0].graphs[what], 1))))
        times = [[], []]
        for turn in range(turns):
            for side in (0, 1) if turn % 2 else (1, 0):
                times[side].append(milliseconds(cases[side].graphs[what], calls))
        old, new = map(statistics.median, times)
        row = {"what": what, "old_ms": old, "new_ms": new, "equal_bits": equal}
        row["ratio"] = statistics.median(b / a for a, b in zip(*times, strict=True))
        if what == "attend":
            work = 4.0 * TILE * TILE * DIM * kept * (HEADS // counts.shape[0])
            row |= {"kept_blocks": kept, "level_natural": natural, "level_sorted": sorted_}
            row |= {"old_tflops": work / old / 1e9, "new_tflops": work / new / 1e9}
        rows.append(row)
    return rows


def measure(builds, tokens, chunk, turns):
    """All policies; a chunk of all tokens is the whole prompt."""
    q, k, v = inputs(tokens)
    tail = q[-chunk:].contiguous()
    alpha = tuned(tail, k, lambda a: fp.FlashPrefill(alpha=a), DENSITY[tokens]).alpha
    policies = {
        "flashprefill": fp.FlashPrefill(alpha=alpha),
        "flashprefill pooled": fp.FlashPrefill(alpha=alpha, query_pool=16),
        "streaming 2, 32": fp.Streaming(sink_blocks=2, window_blocks=32),
        "dense": fp.Dense(),
    }
    rows = []
    for name, policy in policies.items():
        struct = policy_of(policy.text)
        for kind, final in (("whole", 1),) if chunk == tokens else (("middle", 0), ("last", 1)):
            p, keep = chunk_problem(tail, k, v, final)
            for row in compare(builds, p, struct, tail, turns):
                row = {"tokens": tokens, "rows": chunk, "kind": kind, "policy": policy.text} | row
                rows.append(row)
                times = f"{row['old_ms']:8.4f} {row['new_ms']:8.4f} {row['ratio']:.4f}"
                line = f"{tokens:7}{chunk:7} {kind:7}{name:20} {row['what']:9} {times}"
                if row["what"] == "attend":
                    line += f"  {row['old_tflops']:4.0f} {row['new_tflops']:4.0f} TFLOP/s"
                    line += f", level {row['level_natural']:.3f} {row['level_sorted']:.3f}"
                print(line + ("" if row["equal_bits"] else "  DIFFER"), flush=True)
            del keep
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--tokens", default="8192,32768,131072")
    parser.add_argument("--chunks", default="1024,8192,131072")
    parser.add_argument("--turns", type=int, default=11)
    parser.add_argument("--out")
    options = parser.parse_args()
    builds = [Build(options.old), Build(options.new)]
    rows = []
    chunks = [int(n) for n in options.chunks.split(",")]
    for tokens in map(int, options.tokens.split(",")):
        for chunk in sorted({min(chunk, tokens) for chunk in chunks}):
            rows += measure(builds, tokens, chunk, options.turns)
    if options.out:
        write_results(options.out, rows)


if __name__ == "__main__":
    main()
