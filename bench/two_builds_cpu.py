"""Two builds of the library by turns in one process on a CPU: is the new selection as fast as the old one?

    python3 bench/two_builds_cpu.py OLD.so NEW.so [--shape 9/3x64x8192,...] [--threads 1] [--out FILE]

Each policy's select runs in either build by turns; the medians and the median of the turns' ratios (new over
old) are printed. Policies are parsed by the new build; both builds must agree on the structs. Masks are
compared bit for bit. An old build beside itself says how much the machine alone changes a ratio.
"""

import argparse
import ctypes
import datetime
import json
import platform
import statistics
import sys
import time
from ctypes import byref

import numpy as np

import flashprefill as fp
from flashprefill import _abi
from flashprefill.policies.library import FIELDS, parsed

POLICIES = [
    *FIELDS,  # every method by its defaults
    "flashprefill(query_pool=16)",
    "flashprefill(share_heads=true)",
    "sketch(gain=0.0025, query_metric=true, outliers=6, query_pool=64)",
    "flexprefill(tau=1)",
]


def inputs(tokens, heads, dim):
    """bf16 rows with topics of 256 tokens, as uint16 [tokens, heads, dim]."""
    random = np.random.default_rng(tokens + heads)
    topics = random.standard_normal((64, dim), dtype=np.float32)
    x = random.standard_normal((tokens, heads, dim), dtype=np.float32)
    x += 0.5 * topics[random.integers(64, size=(-(-tokens // 256), heads)).repeat(256, 0)[:tokens]]
    return (x.view(np.uint32) >> 16).astype(np.uint16)


class Case:
    """One build's select over one problem."""

    def __init__(self, lib, q, k, policy, threads):
        tokens, heads, dim = q.shape
        self.lib, self.policy = lib, policy
        p = self.problem = _abi.sized(_abi.Problem)
        p.batch, p.q_heads, p.kv_heads, p.head_dim = 1, heads, k.shape[1], dim
        p.causal = p.final_chunk = 1
        p.softmax_scale = dim**-0.5
        p.total_q = p.max_seqlen_q = p.max_seqlen_k = tokens
        for name, x in (("q", q), ("k", k), ("v", k)):
            strides = (ctypes.c_int64 * 4)(0, *(s // 2 for s in x.strides))
            setattr(p, name, _abi.Tensor(x.ctypes.data, _abi.BF16, 0, strides))
        self.mask = m = _abi.sized(_abi.BlockMask)
        self.exec = _abi.sized(_abi.Exec)
        self.exec.threads = threads
        self.check(lib.fp_mask_describe(byref(p), policy, byref(m)))
        self.bits = np.zeros(m.heads * m.tile_rows * m.words, np.uint64)
        self.counts = np.zeros(m.heads * m.tile_rows, np.int32)
        m.bits, m.counts = self.bits.ctypes.data, self.counts.ctypes.data
        self.size = ctypes.c_size_t()
        self.check(lib.fp_select_workspace(byref(p), policy, byref(self.exec), byref(self.size)))
        self.memory = np.zeros(self.size.value + 64, np.uint8)
        self.address = ctypes.c_void_p(-(-self.memory.ctypes.data // 64) * 64)

    def check(self, status):
        if status:
            raise RuntimeError(f"status {status}")

    def seconds(self, calls):
        begin = time.perf_counter()
        for _ in range(calls):
            self.check(
                self.lib.fp_select(
                    byref(self.problem),
                    self.policy,
                    byref(self.exec),
                    byref(self.mask),
                    self.address,
                    self.size,
                )
            )
        return (time.perf_counter() - begin) / calls


def measure(libs, shape, threads, turns):
    heads, dim, tokens = shape.split("x")
    q_heads, kv_heads = map(int, heads.split("/"))
    q, k = inputs(int(tokens), q_heads, int(dim)), inputs(int(tokens), kv_heads, int(dim))
    for text in POLICIES:
        policy = parsed(text)
        cases = [Case(lib, q, k, policy, threads) for lib in libs]
        calls = max(1, min(200, round(0.03 / max(case.seconds(1) for case in cases))))
        times = [[], []]
        for turn in range(turns):
            for side in (0, 1) if turn % 2 else (1, 0):
                times[side].append(cases[side].seconds(calls))
        equal = bool((cases[0].bits == cases[1].bits).all() and (cases[0].counts == cases[1].counts).all())
        ratio = statistics.median(new / old for old, new in zip(*times, strict=True))
        old, new = (1e3 * statistics.median(side) for side in times)
        yield {
            "shape": shape,
            "threads": threads,
            "policy": text,
            "old_ms": old,
            "new_ms": new,
            "ratio": ratio,
            "equal": equal,
        }


def main():
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--shape", default="9/3x64x8192,32/8x128x8192")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--out")
    options = parser.parse_args()
    libs, rows = [ctypes.CDLL(path) for path in (options.old, options.new)], []
    for shape in options.shape.split(","):
        for row in measure(libs, shape, options.threads, options.turns):
            same = "equal" if row["equal"] else "DIFFER"
            print(
                f"{shape:18} {row['policy'][:40]:40} {row['old_ms']:9.3f} {row['new_ms']:9.3f} ms "
                f" {row['ratio']:.4f}  {same}",
                flush=True,
            )
            rows.append(row)
    if options.out:
        results = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": " ".join(["python3", *sys.argv]),
            "machine": platform.processor() or platform.machine(),
            "backends": str(fp.backends()),
            "rows": rows,
        }
        with open(options.out, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
