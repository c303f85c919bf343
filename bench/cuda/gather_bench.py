"""Gathered keys on a GPU: attention over lists beside blocks, and the operator at equal recall.

    python3 bench/cuda/gather_bench.py [--tokens 32768,131072] [--sharp 1,2] [--runs 256,64,16,1] [--out FILE]

32 query heads, 8 KV heads, head_dim 128, bf16, causal, batch 1; inputs are operator_bench.py's, queries times
`sharp`. Topics of keys come in runs: of 256 keys, which suits blocks, down to 1, so that a topic's keys lie
scattered, as in many heads of real models. Recall is the share of exact attention that a mask keeps, over
sampled rows of all heads outside the dense tail: mean and 5th percentile. For each length first attention
alone over lists of ranked keys, lists of neighbouring keys and blocks, as many keys each; then select, attend
and operator for some values of each method's parameter, and the operator at equal recall by interpolation.
Calls are captured in CUDA graphs and timed with events, by turns, medians.
"""

import argparse
import itertools
import math
import statistics

import torch
from operator_bench import DIM, HEADS, KV_HEADS, clock, graph_of, inputs, milliseconds, write_results

import flashprefill as fp

ROWS = 48  # sampled, of each head
RECALLS = (0.4, 0.5, 0.6, 0.65, 0.7, 0.8)


def sketches(**fields):
    """Sketch at several gains."""
    gains = (0.05, 0.02, 0.006, 0.003, 0.0015, 0.0008, 0.0004)
    return [fp.Sketch(gain=g, query_metric=True, outliers=6, query_pool=64, **fields) for g in gains]


METHODS = {
    "FlashPrefill, query_pool=16": [
        fp.FlashPrefill(alpha=a, query_pool=16) for a in (0.9, 0.8, 0.7, 0.6, 0.5, 0.35, 0.25, 0.17)
    ],
    "Sketch": sketches(),
    "Sketch, blocks of 64": sketches(block_size=64),
    "Gather": [fp.Gather(gain=g) for g in (0.05, 0.02, 0.01, 0.005, 0.002, 0.001)],
    "Gather, segments of 256": [fp.Gather(gain=g, segment=256) for g in (0.02, 0.01, 0.005, 0.002, 0.001)],
    "Gather, segments of 512": [fp.Gather(gain=g, segment=512) for g in (0.02, 0.005, 0.002, 0.001)],
    "Gather, a window of 64 tokens": [fp.Gather(gain=g, window_blocks=2) for g in (0.02, 0.005, 0.002)],
    "Gather, budget": [fp.Gather(gain=None, budget=b) for b in (0.02, 0.05, 0.1)],
    "Gather, a list per head": [
        fp.Gather(gain=g, share_heads=False) for g in (0.05, 0.02, 0.01, 0.005, 0.002)
    ],
}


def median(graph, turns, tokens):
    """The median of some timings, in ms."""
    return statistics.median(milliseconds(graph, max(1, 65536 // tokens)) for _ in range(turns))


def seen_keys(mask, heads, rows, keys):
    """Which keys the tiles of these rows of these mask heads attend to, bool [heads, rows, keys]."""
    tiles = rows // mask.tile_tokens
    words = mask.bits[heads][:, tiles].view(torch.int64)
    bits = (words[..., None] >> torch.arange(64, device=words.device)) & 1
    seen = bits.bool().flatten(-2).repeat_interleave(mask.block_size, -1)[..., :keys]
    if mask.key_lists is not None:
        lists = mask.key_lists[heads][:, tiles // mask.segment_tiles]
        there = torch.arange(lists.shape[2] - 2, device=lists.device) < lists[..., :1]
        listed = torch.zeros_like(seen, dtype=torch.int8)
        listed.scatter_add_(2, lists[..., 2:].long().clamp(0, keys - 1), there.to(torch.int8))
        seen = seen | (listed > 0)
    return seen


def shares_of(q, k, rows):
    """Exact attention of these rows of a KV head's group, [group, rows, keys]."""
    scores = torch.einsum("rgd,kd->grk", q[rows].float(), k.float()) * DIM**-0.5
    future = torch.arange(k.shape[0], device=k.device) > rows[:, None]
    return scores.masked_fill(future, float("-inf")).softmax(-1)


class Recall:
    """What masks keep of exact attention, which is computed once: of sampled rows of all heads."""

    def __init__(self, q, k):
        self.tokens, self.group = q.shape[0], HEADS // KV_HEADS
        make = torch.Generator().manual_seed(1)
        self.rows = torch.randint(self.tokens // 8, self.tokens - 2048, (ROWS,), generator=make).cuda()
        self.shares = [
            shares_of(q[:, kv * self.group : (kv + 1) * self.group], k[:, kv], self.rows)
            for kv in range(KV_HEADS)
        ]

    def of(self, mask):
        """Mean and 5th percentile."""
        found = []
        for kv, shares in enumerate(self.shares):
            heads = slice(kv, kv + 1) if mask.share_heads else slice(kv * self.group, (kv + 1) * self.group)
            found.append((shares * seen_keys(mask, heads, self.rows, self.tokens)).sum(-1).flatten())
        recall = torch.cat(found)
        return recall.mean().item(), recall.quantile(0.05).item()


def attend_rates(tokens, turns):
    """Attention alone: as many keys per tile in lists as in blocks. TFLOP/s of kept keys."""
    q, k, v = inputs(tokens)
    tile = 128 // (HEADS // KV_HEADS)
    budget = 0.05
    policy = fp.Gather(gain=None, budget=budget, max_keys=8192)
    random = fp.select(q, k, policy)
    near = fp.select(q, k, policy)
    lists = near.key_lists
    for i in range(0, lists.shape[1], 64):  # neighbours: the last so many keys before each window
        part = lists[:, i : i + 64]
        segments = torch.arange(i, i + part.shape[1], device="cuda")
        last = (segments * near.segment_tiles * tile - 64).clamp_min(0)
        column = torch.arange(part.shape[2] - 2, device="cuda")
        part[..., 2:] = (last[None, :, None] - part[..., :1] + column).clamp_min(0).int()
    contiguous = fp.select(q, k, tuned_blocks(q, k, random.density))
    masks = {"lists of ranked keys": random, "lists of neighbours": near, "blocks of 128": contiguous}
    graphs = {name: graph_of(lambda m=m: fp.attend(q, k, v, m)) for name, m in masks.items()}
    rows = []
    for name, graph in graphs.items():
        ms = median(graph, turns, tokens)
        work = masks[name].density * 2.0 * HEADS * DIM * tokens * (tokens + 1)
        rows.append(
            {
                "tokens": tokens,
                "name": f"attend, {name}",
                "density": masks[name].density,
                "ms": ms,
                "tflops": work / ms / 1e9,
                "clock_mhz": clock(),
            }
        )
    return rows


def tuned_blocks(q, k, density):
    """FlashPrefill, shared, at this density."""
    low, high = 0.0, 1.0
    for _ in range(12):
        alpha = (low + high) / 2
        policy = fp.FlashPrefill(alpha=alpha, query_pool=16, share_heads=True)
        low, high = (alpha, high) if fp.select(q, k, policy).density > density else (low, alpha)
    return fp.FlashPrefill(alpha=(low + high) / 2, query_pool=16, share_heads=True)


def operators(tokens, sharp, run, turns):
    """Every method's values: recall, density, times."""
    q, k, v = inputs(tokens, run)
    q = (q * sharp).to(q.dtype)
    recall, rows = Recall(q, k), []
    for name, policies in METHODS.items():
        for policy in policies:
            mask = fp.select(q, k, policy)
            mean, low = recall.of(mask)
            select = graph_of(lambda p=policy: fp.select(q, k, p))
            attend = graph_of(lambda m=mask: fp.attend(q, k, v, m))
            whole = graph_of(lambda p=policy: fp.prefill_attention(q, k, v, p))
            rows.append(
                {
                    "tokens": tokens,
                    "sharp": sharp,
                    "run": run,
                    "name": name,
                    "policy": repr(policy),
                    "density": mask.density,
                    "recall": mean,
                    "recall_p05": low,
                    "select_ms": median(select, turns, tokens),
                    "attend_ms": median(attend, turns, tokens),
                    "ms": median(whole, turns, tokens),
                    "overflowed": int((mask.key_lists[..., 1] > mask.key_lists[..., 0]).sum())
                    if mask.key_lists is not None
                    else 0,
                    "clock_mhz": clock(),
                }
            )
            del select, attend, whole, mask
    return rows


def at_recall(rows, name, key, recall):
    """The operator's ms at this recall, between the two values that enclose it; or None."""
    points = sorted((row[key], row["ms"]) for row in rows if row["name"] == name)
    for (r0, t0), (r1, t1) in zip(points, points[1:], strict=False):
        if r0 <= recall <= r1 and r1 > r0:
            share = (recall - r0) / (r1 - r0)
            return math.exp(math.log(t0) * (1 - share) + math.log(t1) * share)
    return None


def print_equal_recall(rows):
    """A table of the operator's times at equal recall."""
    for key in ("recall", "recall_p05"):
        for recall in RECALLS:
            times = {name: at_recall(rows, name, key, recall) for name in METHODS}
            text = ", ".join(f"{name} {ms:.2f} ms" for name, ms in times.items() if ms)
            print(f"        at {key} {recall}: {text or 'no method'}", flush=True)


def main():
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", default="32768,65536,131072")
    parser.add_argument("--sharp", default="1,2")
    parser.add_argument("--runs", default="256,64,16,1", help="keys of a topic that lie together")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--only", choices=("attend", "operator"))
    parser.add_argument("--out")
    arguments = parser.parse_args()
    rows = []
    with torch.inference_mode():
        for tokens in map(int, arguments.tokens.split(",")):
            for row in attend_rates(tokens, arguments.turns) if arguments.only != "operator" else []:
                print(
                    f"{tokens:7d} {row['name']:34s} {row['density']:.4f} {row['ms']:9.3f} ms "
                    f"{row['tflops']:6.0f} TFLOP/s {row['clock_mhz']} MHz",
                    flush=True,
                )
                rows.append(row)
            if arguments.only == "attend":
                continue
            for sharp, run in itertools.product(
                map(float, arguments.sharp.split(",")), map(int, arguments.runs.split(","))
            ):
                some = operators(tokens, sharp, run, arguments.turns)
                for row in some:
                    print(
                        f"{tokens:7d} x{sharp:g} run {run} {row['policy']:70.70s} {row['density']:.4f} "
                        f"recall {row['recall']:.3f} {row['recall_p05']:.3f} select {row['select_ms']:.3f} "
                        f"attend {row['attend_ms']:.3f} operator {row['ms']:.3f} ms, "
                        f"{row['overflowed']} overflow, {row['clock_mhz']} MHz",
                        flush=True,
                    )
                print_equal_recall(some)
                rows += some
    if arguments.out:
        write_results(arguments.out, rows)


if __name__ == "__main__":
    main()
