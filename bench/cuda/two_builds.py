"""Two builds of the library by turns in one process on a GPU: is the new one as fast as the old one?

    python3 bench/cuda/two_builds.py OLD.so NEW.so [--tokens 16384,131072] [--out FILE]

The inputs, shapes and densities of operator_bench.py. Each case is captured in a CUDA graph for either
build, graphs are replayed by turns, and the medians and the median of the turns' ratios (new over old) are
printed. Policies are parsed by the new build; both builds must agree on the structs. Masks and outputs are
compared bit for bit.

Where a call takes tens of microseconds the library that is loaded second is slower: of two equal builds the
second takes 1.2 times as long for a Sketch's select of 4,096 tokens. Run such cases in either order.
"""

import argparse
import ctypes
import statistics
from ctypes import byref

import torch
from operator_bench import DENSITY, DIM, HEADS, KV_HEADS, graph_of, inputs, milliseconds, tuned, write_results

import flashprefill as fp
from flashprefill import _abi

POLICIES = {
    "flashprefill pooled": lambda a: fp.FlashPrefill(alpha=a, query_pool=16),
    "flashprefill": lambda a: fp.FlashPrefill(alpha=a),
    "flashprefill shared, corrected": lambda a: fp.FlashPrefill(
        alpha=a, share_heads=True, mean_correction=True
    ),
    "sketch alpha": lambda a: fp.Sketch(alpha=a),
    "sketch mass": lambda _: fp.Sketch(mass=0.9),
    "sketch gain, metric": lambda _: fp.Sketch(gain=0.0025, query_metric=True, outliers=6, query_pool=64),
    "xattention": lambda _: fp.XAttention(threshold=0.9),
    "rrattention": lambda _: fp.RRAttention(threshold=0.9),
    "flexprefill": lambda _: fp.FlexPrefill(gamma=0.9, tau=0.0),
    "flexprefill query-aware": lambda _: fp.FlexPrefill(gamma=0.9, tau=1.0),
    "minference": lambda _: fp.MInference(vertical=1000, slash=2000),
    "streaming": lambda _: fp.Streaming(),
    "dense": lambda _: fp.Dense(),
}


class Build:
    """One library, and the calls of the C ABI that are timed."""

    def __init__(self, path):
        self.lib = ctypes.CDLL(path)
        self.lib.fp_last_error.restype = ctypes.c_char_p

    def check(self, status):
        if status:
            raise RuntimeError(self.lib.fp_last_error().decode())

    def workspace(self, function, *arguments):
        size = ctypes.c_size_t()
        self.check(function(*arguments, byref(size)))
        memory = torch.empty(max(size.value, 1), dtype=torch.uint8, device="cuda")
        return memory, ctypes.c_void_p(memory.data_ptr()), size


def policy_of(text):
    """A policy's struct, with its tables behind it."""
    needed = ctypes.c_size_t()
    _abi.check(_abi.lib.fp_policy_parse(text.encode(), None, 0, byref(needed)))
    memory = (ctypes.c_uint64 * (needed.value // 8 + 1))()
    _abi.check(_abi.lib.fp_policy_parse(text.encode(), memory, ctypes.sizeof(memory), None))
    return memory


def problem_of(q, k, v):
    tokens = q.shape[0]
    p = _abi.sized(_abi.Problem)
    p.device, p.batch, p.q_heads, p.kv_heads, p.head_dim = _abi.CUDA, 1, HEADS, KV_HEADS, DIM
    p.causal = p.final_chunk = 1
    p.softmax_scale = DIM**-0.5
    p.total_q = p.max_seqlen_q = p.max_seqlen_k = tokens
    for name, x in (("q", q), ("k", k), ("v", v)):
        strides = (ctypes.c_int64 * 4)(0, *x.stride())
        setattr(p, name, _abi.Tensor(x.data_ptr(), _abi.BF16, 0, strides))
    return p


class Case:
    """The graphs of one build: select alone, and the whole operator."""

    def __init__(self, build, p, policy, q):
        self.mask = mask = _abi.sized(_abi.BlockMask)
        lib, check = build.lib, build.check
        check(lib.fp_mask_describe(byref(p), policy, byref(mask)))
        self.bits = torch.zeros(mask.heads * mask.tile_rows * mask.words, dtype=torch.int64, device="cuda")
        self.counts = torch.zeros(mask.heads * mask.tile_rows, dtype=torch.int32, device="cuda")
        self.fallback = torch.zeros(1, dtype=torch.int32, device="cuda")
        mask.bits, mask.counts = self.bits.data_ptr(), self.counts.data_ptr()
        mask.fallback = self.fallback.data_ptr()
        self.out = torch.empty_like(q)
        output = _abi.sized(_abi.Output)
        output.out = _abi.Tensor(
            self.out.data_ptr(), _abi.BF16, 0, (ctypes.c_int64 * 4)(0, *self.out.stride())
        )
        own_select = build.workspace(lib.fp_select_workspace, byref(p), policy, None)
        own_prefill = build.workspace(lib.fp_prefill_workspace, byref(p), policy, None)

        def execution():
            e = _abi.sized(_abi.Exec)
            e.stream = torch.cuda.current_stream().cuda_stream
            return byref(e)

        def select():
            _, address, size = own_select
            check(lib.fp_select(byref(p), policy, execution(), byref(mask), address, size))

        def prefill():
            _, address, size = own_prefill
            check(lib.fp_prefill(byref(p), policy, execution(), byref(mask), byref(output), address, size))

        self.graphs = {"select": graph_of(select), "operator": graph_of(prefill)}
        self.keep = (own_select, own_prefill, output, policy, p)


def compare(builds, p, policy, q, what, turns):
    """Medians, and the median of the turns' ratios of new over old."""
    cases = [Case(build, p, policy, q) for build in builds]
    for case in cases:
        case.graphs[what].replay()
    torch.cuda.synchronize()
    equal = bool((cases[0].bits == cases[1].bits).all())
    equal &= what == "select" or bool((cases[0].out == cases[1].out).all())
    calls = max(1, min(50, round(4 / milliseconds(cases[0].graphs[what], 1))))
    times = [[], []]
    for turn in range(turns):
        for side in (0, 1) if turn % 2 else (1, 0):
            times[side].append(milliseconds(cases[side].graphs[what], calls))
    ratio = statistics.median(new / old for old, new in zip(*times, strict=True))
    old, new = map(statistics.median, times)
    return {"old_ms": old, "new_ms": new, "ratio": ratio, "equal_bits": equal}


def measure(builds, tokens, turns):
    q, k, v = inputs(tokens)
    p = problem_of(q, k, v)
    rows = []
    for name, make in POLICIES.items():
        policy = make(0.5)
        if "alpha" in policy.text and "Streaming" not in name:
            policy = tuned(q, k, make, DENSITY[tokens])
        struct = policy_of(policy.text)
        for what in ("select", "operator"):
            row = compare(builds, p, struct, q, what, turns)
            rows.append({"tokens": tokens, "policy": policy.text, "what": what} | row)
            same = "equal" if row["equal_bits"] else "DIFFER"
            times = f"{row['old_ms']:9.4f} {row['new_ms']:9.4f}  {row['ratio']:.4f}"
            print(f"{tokens:7} {name:32} {what:9} {times}  {same}", flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--tokens", default="4096,16384,65536,131072")
    parser.add_argument("--turns", type=int, default=21)
    parser.add_argument("--out")
    options = parser.parse_args()
    builds = [Build(options.old), Build(options.new)]
    rows = [row for n in options.tokens.split(",") for row in measure(builds, int(n), options.turns)]
    if options.out:
        write_results(options.out, rows)


if __name__ == "__main__":
    main()
