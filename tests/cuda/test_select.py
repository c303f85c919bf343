"""Selections on a GPU against the CPU's, through their thresholds.

What the CPU keeps with a threshold a little stricter must be kept, what it leaves out with one a little
looser must be left out, and a second call must give the same bits. XAttention and RRAttention, whose blocks
are ordered by rounded masses, are compared by how many bits differ. The small cases are for compute-sanitizer
as well: `-k small` (CONTRIBUTING.md).
"""

import dataclasses
import math

import pytest
import torch

import flashprefill as fp

BF16, F16 = torch.bfloat16, torch.float16
PACKED = [(100, 300), (0, 0), (1, 130), (333, 700)]


def inputs(q_tokens, k_tokens, q_heads=4, kv_heads=2, dim=128, dtype=BF16):
    """Return q and k in host memory, with topics that both share."""
    make = torch.Generator().manual_seed(q_tokens + k_tokens + dim)
    topics = torch.randn(8, dim, generator=make)

    def rows(tokens, heads, run):
        topic = torch.randint(8, (math.ceil(tokens / run), heads), generator=make).repeat_interleave(run, 0)
        return ((torch.randn(tokens, heads, dim, generator=make) + topics[topic[:tokens]]) / 2**0.5).to(dtype)

    return rows(q_tokens, q_heads, 200), rows(k_tokens, kv_heads, 64)


def moved(policy, factor):
    """Return the policy with its threshold made stricter (above 1) or looser."""
    fields = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}
    for name in ("mass", "gamma"):
        if fields.get(name) is not None:
            fields[name] = min(1.0, fields[name] / factor)
    for name in ("alpha", "gain"):
        if fields.get(name) is not None:
            fields[name] = fields[name] * factor
    if isinstance(policy, fp.MInference):
        fields["vertical"], fields["slash"] = (round(fields[name] / factor) for name in ("vertical", "slash"))
    return type(policy)(**fields)


def packed(lengths, dim=128):
    """Return inputs and layout of packed sequences of these lengths of queries and keys."""
    cu_q, cu_k = ([0], [0])
    for q_len, k_len in lengths:
        cu_q.append(cu_q[-1] + q_len)
        cu_k.append(cu_k[-1] + k_len)
    layout = {
        "cu_seqlens_q": torch.tensor(cu_q, dtype=torch.int32),
        "cu_seqlens_k": torch.tensor(cu_k, dtype=torch.int32),
        "max_seqlen_q": max(q for q, _ in lengths),
        "max_seqlen_k": max(k for _, k in lengths),
    }
    return inputs(cu_q[-1], cu_k[-1], dim=dim), layout


def paged(lengths, page, dim=128):
    """Return the same with keys in pages, in falling order."""
    (q, _), layout = packed(lengths, dim)
    most = math.ceil(max(k for _, k in lengths) / page)
    pages = len(lengths) * most
    _, k = inputs(1, pages * page, dim=dim)
    del layout["cu_seqlens_k"]
    layout["seqused_k"] = torch.tensor([k_len for _, k_len in lengths], dtype=torch.int32)
    layout["block_table"] = torch.arange(pages, dtype=torch.int32).flip(0).view(len(lengths), most)
    return (q, k.view(pages, page, *k.shape[1:])), layout


def check(policy, q, k, sequences=1, **layout):
    """Return the differences in words, or nothing."""
    there = {n: x.cuda() if torch.is_tensor(x) else x for n, x in layout.items()}
    q_there, k_there = q.cuda(), k.cuda()
    masks = [fp.select(q_there, k_there, policy, **there) for _ in range(2)]
    strided = isinstance(policy, (fp.XAttention, fp.RRAttention))
    strict, loose = (
        fp.select(q, k, policy if strided else moved(policy, f), backend="cpu", **layout)
        for f in (1.03, 1 / 1.03)
    )
    missing = extra = changed = number = 0
    for b in range(sequences):
        bits, again, inner, outer = (
            torch.as_tensor(m.dense(b)).cpu().bool() for m in (*masks, strict, loose)
        )
        missing += int((inner & ~bits).sum())
        extra += int((bits & ~outer).sum())
        changed += int((bits ^ again).sum())
        number += bits.numel()
    if strided and missing + extra <= 0.01 * number:
        missing = extra = 0
    wrong = [
        f"{n} {what}" for n, what in ((missing, "missing"), (extra, "too many"), (changed, "changed")) if n
    ]
    return ", ".join(wrong)


SCORED = {
    "rows": fp.FlashPrefill(alpha=0.5, window_blocks=1, sink_blocks=1, dense_tail_blocks=1),
    "pooled": fp.FlashPrefill(alpha=0.5, query_pool=16, window_blocks=2, min_blocks=2),
    "shared": fp.FlashPrefill(alpha=0.5, share_heads=True, dense_tail_blocks=0),
    "pairs of rows": fp.FlashPrefill(alpha=0.5, query_pool=2, window_blocks=1),
    "blocks of 64": fp.FlashPrefill(alpha=0.5, block_size=64, query_pool=7, dense_tail_blocks=0),
    "Sketch by mass": fp.Sketch(mass=0.8, window_blocks=1, dense_tail_blocks=0),
    "Sketch by alpha": fp.Sketch(alpha=0.3, share_heads=True, outliers=2, window_blocks=1),
    "Sketch by gain": fp.Sketch(gain=0.05, query_metric=True, outliers=3, window_blocks=1),
    "Sketch, rows": fp.Sketch(alpha=0.3, query_pool=1, outliers=1, window_blocks=1),
    "Sketch, tiles of 4 rows": fp.Sketch(mass=0.8, query_pool=32, window_blocks=1, dense_tail_blocks=0),
    "Sketch, tiles of 2 rows": fp.Sketch(gain=0.05, query_pool=64, query_metric=True, window_blocks=1),
    "Sketch, tiles of 3 rows": fp.Sketch(mass=0.8, query_pool=48, window_blocks=1),
    "Sketch, tiles of 1 row": fp.Sketch(alpha=0.3, query_pool=128, window_blocks=1),
    "Sketch, a row per head": fp.Sketch(alpha=0.3, query_pool=64, share_heads=True, window_blocks=1),
}
VERTICAL_SLASH = {
    "FlexPrefill, verticals and slashes": fp.FlexPrefill(gamma=0.7, tau=0.0, min_budget=128),
    "FlexPrefill, query-aware": fp.FlexPrefill(gamma=0.8, tau=10.0, min_budget=128),
    "MInference": fp.MInference(vertical=40, slash=120),
}
STRIDED = {
    "XAttention": fp.XAttention(threshold=0.7),
    "XAttention, blocks of 48": fp.XAttention(threshold=0.7, block_size=48),
    "RRAttention": fp.RRAttention(threshold=0.8),
}
POLICIES = {**SCORED, "Streaming": fp.Streaming(sink_blocks=1, window_blocks=2), **VERTICAL_SLASH, **STRIDED}
LONG = {  # mostly of blocks of 16: more of them than floats have room for, and enough for a cluster of CTAs
    "pooled": fp.FlashPrefill(alpha=0.5, query_pool=4, block_size=16),
    "Sketch by mass": fp.Sketch(mass=0.8, query_pool=4, block_size=16),
    "Sketch, rows": fp.Sketch(mass=0.8, query_pool=1, block_size=64),  # warpgroups take turns at steps
    "Sketch, tiles of 4 rows": fp.Sketch(mass=0.8, query_pool=32, block_size=16),
    "Sketch, tiles of 2 rows": fp.Sketch(mass=0.8, query_pool=64, block_size=16),
    "Sketch by mass, equal keys": fp.Sketch(mass=0.8, query_pool=4, block_size=16),
}


def cases(small):
    """Return named makers of (policy, inputs, layout)."""
    tokens = 1000 if small else 4000
    of_all_layouts = (
        "pooled",
        "Sketch by mass",
        "Sketch, tiles of 4 rows",
        "Sketch, tiles of 2 rows",
        "FlexPrefill, query-aware",
        "XAttention",
    )
    made = {}
    for name, policy in POLICIES.items():
        made[name] = lambda p=policy: (p, inputs(tokens, tokens + 300), {})
        if small and name not in of_all_layouts:
            continue
        made[f"{name}, packed"] = lambda p=policy: (p, *packed(PACKED))
        made[f"{name}, pages of 16"] = lambda p=policy: (p, *paged(PACKED, 16))
        made[f"{name}, fp16, head_dim 64"] = lambda p=policy: (p, inputs(700, 900, dim=64, dtype=F16), {})
        made[f"{name}, head_dim 256"] = lambda p=policy: (p, inputs(300, 900, dim=256), {})
    for name, policy in LONG.items():
        keys = 32000 if small else 64000

        def long(p=policy, equal="equal" in name, keys=keys):
            q, k = inputs(300, keys, 2, 2)
            return p, (q, k[:1].expand_as(k).contiguous() if equal else k), {}

        made[f"{name}, {keys // policy.block_size} blocks"] = long
    for name in ("FlexPrefill, verticals and slashes", "MInference"):
        made[f"{name}, 40000 keys"] = lambda p=VERTICAL_SLASH[name]: (p, inputs(130, 40000, 2, 1), {})
    return [pytest.param(make, id=name) for name, make in made.items()]


def agree(make):
    """Compare a case."""
    policy, (q, k), layout = make()
    assert check(policy, q, k, len(PACKED) if layout else 1, **layout) == ""


@pytest.mark.parametrize("make", cases(small=True))
def test_small(make):
    """Policies on few tokens, the methods of every kind in all layouts."""
    agree(make)


@pytest.mark.parametrize("make", cases(small=False))
def test_agrees_with_cpu(make):
    """Every policy in all layouts."""
    agree(make)
