"""Prism, SpargeAttn, SampleAttention and MInference's block-sparse heads on a GPU against the CPU's.

As in test_cuda.py masks are compared through what decides: with a little less of it what is kept must be
kept, with a little more what is left out must be left out. Skipped, visibly, where there is no device for it.
"""

import dataclasses
import math

import pytest
import torch

import flashprefill as fp
from test_cuda import PACKED, captured, check, data, pytestmark, two_paged_sequences  # noqa: F401 (marks this file too)

SPARSE_HEADS = [("block_sparse", 6, 0), ("stream_llm", 100, 300), ("vertical_and_slash", 50, 150)]
POLICIES = {
    "prism": fp.Prism(mass=0.6, sink_blocks=0, window_blocks=0),
    "prism, forced": fp.Prism(mass=0.5, window_blocks=3, dense_tail_blocks=2),
    "prism, interleaved": fp.Prism(mass=0.7, interleaved=True, rotary_dim=32, high_pairs=5, low_pairs=9),
    "prism, corrected": fp.Prism(mass=0.5, mean_correction=True),
    "prism, blocks of 64": fp.Prism(mass=0.6, block_size=64),
    "sparge": fp.SpargeAttn(similarity=0.2, cdf=0.7),
    "sparge, by share": fp.SpargeAttn(similarity=0.2, cdf=None, topk=0.25),
    "sparge, authors'": fp.SpargeAttn(cdf=0.9),
    "sparge, corrected": fp.SpargeAttn(similarity=0.2, cdf=0.6, mean_correction=True, sink_blocks=1),
    "sparge, blocks of 128": fp.SpargeAttn(similarity=0.2, cdf=0.8, block_size=128, dense_tail_blocks=1),
    "sample": fp.SampleAttention(coverage=0.6, sample_ratio=0.1, window_ratio=0.0),
    "sample, forced": fp.SampleAttention(coverage=0.5, sample_rows=5, window_blocks=2, dense_tail_blocks=1),
    "sample, all rows": fp.SampleAttention(coverage=0.4, sample_ratio=1.0, sample_rows=128, block_size=64),
    "sample, corrected": fp.SampleAttention(coverage=0.5, sample_ratio=0.2, mean_correction=True),
    "sample, blocks of 48": fp.SampleAttention(coverage=0.6, sample_ratio=0.3, block_size=48),
    "block-sparse": fp.MInference(heads=[("block_sparse", a, 0) for a in (4, 9, 1, 20)]),
    "mixed": fp.MInference(heads=[*SPARSE_HEADS, ("block_sparse", 3, 0)], block_size=128, sink_blocks=1),
    "mixed, corrected": fp.MInference(heads=[*SPARSE_HEADS, SPARSE_HEADS[0]], mean_correction=True),
}
FEW = ("prism", "sparge", "sparge, by share", "sample", "sample, blocks of 48")


def moved(policy, factor):
    """The policy with a little less of what it keeps (factor above 1), or a little more."""
    fields = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}
    for name in ("mass", "cdf", "topk", "coverage"):
        if fields.get(name) is not None:
            fields[name] = min(1.0, fields[name] / factor)
    if isinstance(policy, fp.MInference):
        less = 1 if factor > 1 else -1
        fields["heads"] = [
            (p, max(0, a - less), b) if p == "block_sparse" else (p, round(a / factor), round(b / factor))
            if p == "vertical_and_slash" else (p, a, b)
            for p, a, b in policy.heads
        ]  # fmt: skip
    return type(policy)(**fields)


def inputs(q_tokens, k_tokens, q_heads=4, kv_heads=2, dim=128, dtype=torch.bfloat16):
    """As test_cuda.data, but every fifth run of 64 keys has no topic: it is not similar in itself."""
    q, k, v = data(q_tokens, k_tokens, q_heads, kv_heads, dim, dtype)
    noise = torch.randn(k.shape, generator=torch.Generator().manual_seed(7))
    plain = torch.arange(k_tokens) // 128 % 5 == 4
    k[plain] = noise[plain].to(dtype)
    return q, k, v


def compare(*tensors, **layout):
    """The density, if the GPU agrees with the CPU."""
    return check(*tensors, move=moved, **layout)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_policies(name, dtype):
    density = compare(*inputs(2100, 2500, dtype=dtype), POLICIES[name])
    assert density < 0.9 or name == "sparge, authors'"  # to whose threshold these rows are not similar


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("name", [*FEW, "block-sparse"])
def test_head_dims(dim, name):
    compare(*inputs(1300, 1300, dim=dim), POLICIES[name])


@pytest.mark.parametrize("name", ["prism", "sparge"])
def test_a_head_dim_that_is_no_multiple_of_8(name):
    """Select does it, though attend does not."""
    q, k, _ = inputs(1000, 1000, dim=20)
    mask, strict, loose = (
        torch.as_tensor(fp.select(*there, policy).dense(0)).cpu().bool()
        for there, policy in (
            ((q.cuda(), k.cuda()), POLICIES[name]),
            ((q, k), moved(POLICIES[name], 1.03)),
            ((q, k), moved(POLICIES[name], 1 / 1.03)),
        )
    )
    assert not (strict & ~mask).any() and not (mask & ~loose).any()


@pytest.mark.parametrize("group", [1, 2, 3, 5, 6, 7, 8, 12])
def test_groups(group):
    tensors = inputs(777, 1153, 2 * group, 2, 64)
    for name in FEW:
        compare(*tensors, POLICIES[name])
    compare(*tensors, fp.MInference(heads=[("block_sparse", 3 + h, 0) for h in range(2 * group)]))


@pytest.mark.parametrize(
    "q_len, k_len",
    [(1, 1), (1, 700), (2, 900), (63, 700), (127, 127), (128, 128), (129, 640), (509, 1021), (1025, 1025)],
)
def test_lengths(q_len, k_len):
    tensors = inputs(q_len, k_len)
    for name in (*FEW, "block-sparse", "mixed", "prism, forced"):
        compare(*tensors, POLICIES[name])


@pytest.mark.parametrize("size", [16, 48, 80, 256, 1024])
def test_block_sizes(size):
    tensors = inputs(2500, 2600, dim=64)
    compare(*tensors, fp.Prism(mass=0.6, block_size=size, sink_blocks=0))
    compare(*tensors, fp.SpargeAttn(similarity=0.2, cdf=0.7, block_size=size))
    compare(*tensors, fp.SampleAttention(coverage=0.6, sample_ratio=0.1, window_ratio=0, block_size=size))
    compare(*tensors, fp.MInference(heads=[("block_sparse", a, 0) for a in (4, 2, 1, 7)], block_size=size))


@pytest.mark.parametrize("name", POLICIES)
def test_packed_with_an_empty_sequence(name):
    compare(*inputs(1500, 2650), POLICIES[name], sequences=4, **PACKED)


@pytest.mark.parametrize("page", [1, 16, 24, 64, 128])
def test_pages_in_any_order(page):
    q, caches, layout, _ = two_paged_sequences(page)
    for name in (*FEW, "block-sparse", "sparge, corrected"):
        compare(q, *caches, POLICIES[name], sequences=2, **layout)


@pytest.mark.parametrize("q_len, k_len", [(700, 700), (1300, 200), (200, 1300), (1, 500), (257, 1)])
def test_without_causal(q_len, k_len):
    """SpargeAttn, as diffusion models use it."""
    tensors = inputs(q_len, k_len)
    for name in ("sparge", "sparge, by share"):
        compare(*tensors, POLICIES[name], causal=False)


def test_long_enough_for_the_operator():
    """So many keys that prefill selects: it is select, then attend."""
    tensors = inputs(4000, 4500, 8, 2)
    for name in (*FEW, "sparge, corrected", "prism, corrected"):
        compare(*tensors, POLICIES[name])


@pytest.mark.parametrize("name", ["prism", "sparge", "sample", "block-sparse"])
def test_heads_alone_are_as_among_others(name):
    """Many heads take several rounds of a few panels of rows, some heads one: the same bits."""
    q, k, _ = (x.cuda() for x in data(18000, 66000, 64, 1, 64, torch.bfloat16))
    size = {"block_size": 16}
    policy = {
        "prism": fp.Prism(mass=0.6, **size),
        "sparge": fp.SpargeAttn(similarity=0.2, cdf=0.7, **size),
        "sample": fp.SampleAttention(coverage=0.6, sample_ratio=0.1, **size),
        "block-sparse": fp.MInference(heads=[("block_sparse", 30, 0)] * 64, **size),
    }[name]
    alone = dataclasses.replace(policy, heads=policy.heads[:2]) if name == "block-sparse" else policy
    bits = fp.select(q, k, policy).bits
    assert torch.equal(bits[8:10], fp.select(q[:, 8:10], k, alone).bits)


@pytest.mark.parametrize("name", [*FEW, "block-sparse"])
def test_what_is_no_number_counts_as_nothing(name):
    q, k, _ = inputs(1500, 1500)
    k[300], k[700], k[701], q[1400] = math.nan, math.inf, -math.inf, math.nan
    mask = fp.select(q.cuda(), k.cuda(), POLICIES[name])
    assert torch.equal(mask.bits, fp.select(q.cuda(), k.cuda(), POLICIES[name]).bits)
    strict, loose = (fp.select(q, k, moved(POLICIES[name], f), backend="cpu") for f in (1.03, 1 / 1.03))
    bits, inner, outer = (torch.as_tensor(m.dense(0)).cpu().bool() for m in (mask, strict, loose))
    assert not (inner & ~bits).any() and not (bits & ~outer).any()


@pytest.mark.parametrize("name", [*FEW, "mixed"])
def test_the_same_bits_thirty_times(name):
    there = [x.cuda() for x in inputs(3000, 3000)]
    first = fp.select(there[0], there[1], POLICIES[name]).bits
    for _ in range(30):
        assert torch.equal(fp.select(there[0], there[1], POLICIES[name]).bits, first)


@pytest.mark.parametrize("name", [*FEW, "mixed"])
def test_graph_replays_with_other_lengths(name):
    q, k, v = (x.cuda() for x in inputs(5400, 5400))
    cu = torch.tensor([0, 4000, 5400], dtype=torch.int32).cuda()
    layout = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 5400, "max_seqlen_k": 5400}
    out = torch.empty_like(q)
    graph = captured(fp.prefill_attention, q, k, v, POLICIES[name], out=out, **layout)
    for middle in (4000, 1, 5399, 700):
        cu[1] = middle
        graph.replay()
        assert torch.equal(out, fp.prefill_attention(q, k, v, POLICIES[name], **layout))


def test_lengths_that_make_no_sense():
    """Whatever the device arrays hold, memory stays whole, and other sequences are as ever."""
    q, k, v = (x.cuda() for x in data(4200, 5400, 4, 2, 128, torch.bfloat16))
    cu_q = torch.tensor([0, 3500, 4200], dtype=torch.int32).cuda()
    cu_k = torch.tensor([0, 4400, 5400], dtype=torch.int32).cuda()
    layout = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": 3500, "max_seqlen_k": 4400}
    for name in (*FEW, "mixed"):
        expected = fp.prefill_attention(q, k, v, POLICIES[name], **layout)
        used = torch.tensor([4400, 600], dtype=torch.int32).cuda()
        out, stats = fp.prefill_attention(
            q, k, v, POLICIES[name], return_stats=True, seqused_k=used, **layout
        )
        assert stats.fallback.tolist() == [0, -1]
        assert torch.equal(out[:3500], expected[:3500])
        for bad in ([0, -5, 4200], [0, 9000, 4200], [900, 100, 4200], [0, 2**31 - 1, -(2**31)]):
            wrong = {**layout, "cu_seqlens_q": torch.tensor(bad, dtype=torch.int32).cuda()}
            fp.prefill_attention(q, k, v, POLICIES[name], **wrong)
        torch.cuda.synchronize()


def test_lines_of_tokens_become_blocks():
    q, k, v = (x.cuda() for x in data(1500, 1500, 2, 2, 64, torch.bfloat16))
    tokens, blocks = (fp.MInference(vertical=40, slash=120, rounding=to) for to in ("tokens", "blocks"))
    assert torch.equal(fp.select(q, k, tokens).bits, fp.select(q, k, blocks).bits)
    assert torch.equal(fp.prefill_attention(q, k, v, tokens), fp.prefill_attention(q, k, v, blocks))
