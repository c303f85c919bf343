"""Which blocks are kept: every backend against the rules' definitions, away from ties."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flashprefill as fp
from oracle import Selection, tensors

FREE = {"sink_blocks": 0, "window_blocks": 0, "dense_tail_blocks": 0}  # nothing but the diagonal is forced
POLICIES = [
    fp.FlashPrefill(alpha=0.9, block_size=16, **FREE),
    fp.FlashPrefill(alpha=0.97, block_size=48, **FREE),
    fp.FlashPrefill(alpha=0.9, block_size=16, query_pool=16, **FREE),
    fp.FlashPrefill(alpha=0.9, block_size=32, query_pool=7, share_heads=True, **FREE),
    fp.FlashPrefill(alpha=0.95, block_size=16, share_heads=True, mean_correction=True, **FREE),
    fp.FlashPrefill(alpha=3.0, block_size=16, min_blocks=3, **FREE),
    fp.FlashPrefill(alpha=0.95, block_size=16, sink_blocks=1, window_blocks=2, dense_tail_blocks=5),
    fp.Sketch(mass=0.6, block_size=16, **FREE),
    fp.Sketch(mass=0.6, block_size=32, query_pool=1, outliers=0, share_heads=True, **FREE),
    fp.Sketch(alpha=0.8, block_size=16, outliers=2, query_pool=5, min_blocks=2, **FREE),
    fp.Sketch(mass=0.3, block_size=16, outliers=16, **FREE),
    fp.Sketch(gain=0.07, block_size=16, **FREE),
    fp.Sketch(mass=0.5, block_size=16, outliers=3, query_metric=True, **FREE),
    fp.Sketch(
        gain=0.05, block_size=32, outliers=6, query_pool=64, query_metric=True, share_heads=True, **FREE
    ),
]
SHAPES = [(300, 300), (129, 131), (1, 200), (257, 300)]


@functools.cache  # each backend is held against the same one
def by_definition(policy, q_len, k_len, dtype):
    q, k, _ = tensors(q_len, (q_len, 4, 32), (k_len, 2, 32), dtype)
    return q, k, Selection(q, k, policy, margin=1e-3 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.text)
@pytest.mark.parametrize("q_len,k_len", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_selection_follows_the_definition(engine, policy, q_len, k_len, dtype):
    q, k, expected = by_definition(policy, q_len, k_len, dtype)
    mask = fp.select(q, k, policy, **engine)
    differs = mask.dense().numpy() != expected.keep
    assert not (differs & ~expected.near).any()
    assert expected.near.mean() < 0.2


@given(
    lengths=st.tuples(st.integers(1, 400), st.sampled_from([0, 1, 17, 64])),
    block_size=st.sampled_from([16, 32, 80]),
    sink=st.integers(0, 3),
    window=st.integers(0, 3),
    tail=st.integers(0, 6),
    heads=st.sampled_from([(1, 1), (3, 1), (10, 2)]),
    share=st.booleans(),
    final=st.booleans(),
)
@settings(max_examples=40)
def test_streaming_is_the_forced_blocks(engine, lengths, block_size, sink, window, tail, heads, share, final):
    q_len, k_len = lengths[0], sum(lengths)
    q, k, _ = tensors(0, (q_len, heads[0], 16), (k_len, heads[1], 16))
    fields = {
        "sink_blocks": sink,
        "window_blocks": window,
        "dense_tail_blocks": tail,
        "block_size": block_size,
    }
    mask = fp.select(q, k, fp.Streaming(**fields, share_heads=share), final_chunk=final, **engine)
    never = fp.FlashPrefill(alpha=1e30, share_heads=share, **fields)  # no score reaches this
    assert np.array_equal(mask.dense().numpy(), Selection(q, k, never, final_chunk=final).keep)


def test_final_chunk_of_each_sequence(engine):
    q, k, _ = tensors(1, (3, 256, 2, 16), (3, 512, 2, 16))
    policy = fp.Streaming(1, 1, 1, block_size=128)
    finals = [True, False, True]
    mask = fp.select(q, k, policy, final_chunk=finals, **engine)
    for b, final in enumerate(finals):
        single = fp.select(q[b], k[b], policy, final_chunk=final, **engine)
        assert torch.equal(mask.dense(b), single.dense())
    assert not torch.equal(mask.dense(0), mask.dense(1))


def test_fallbacks_are_reported(engine):
    q, k, _ = tensors(2, (1500, 1, 16), (1500, 1, 16))
    cu = [0, 100, 1500]
    mask = fp.select(q, k, fp.FlashPrefill(alpha=2.0), cu_seqlens_q=cu, cu_seqlens_k=cu, **engine)
    assert mask.stats.reasons == ["short", "selected"]
    assert mask.stats.fallback.tolist() == [1, 0]
    assert mask.dense(0).all() and mask.stats.density[0, 0] == 1
    assert "1 short" in repr(mask.stats)
    assert fp.select(q, k, fp.Dense(), **engine).stats.reasons == ["dense"]


def test_bad_values_do_not_poison_a_tile(engine):
    """NaN and Inf in q or k contribute nothing, and never crash or hang."""
    policy = fp.FlashPrefill(alpha=0.9, block_size=16, **FREE)
    q, k, _ = tensors(3, (256, 1, 32), (256, 1, 32))
    for value in (float("nan"), float("inf"), -float("inf")):
        bad = k.clone()
        bad[40] = value
        mask, clean = fp.select(q, bad, policy, **engine), fp.select(q, k, policy, **engine)
        others = [b for b in range(16) if b != 40 // 16]
        assert mask.dense()[..., others].any() and clean.density > 0
        worse = q.clone()
        worse[130] = value
        assert torch.equal(fp.select(worse, k, policy, **engine).dense()[:, :1], clean.dense()[:, :1])


def test_nothing_but_bits_of_visible_blocks(engine):
    q, k, _ = tensors(4, (700, 3, 16), (9000, 3, 16))
    mask = fp.select(q, k, fp.FlashPrefill(alpha=0.0, block_size=64), **engine)
    assert mask.density == 1.0
    set_bits = np.unpackbits(mask.bits.numpy().view(np.uint8)).sum()
    assert set_bits == int(mask.counts.sum()) == int(mask.stats.kept.sum())
