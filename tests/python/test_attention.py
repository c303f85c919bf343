"""Attention itself, on every backend, against PyTorch's SDPA in float64."""

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flashprefill as fp
from oracle import TOLERANCE, attention, corrected_attention, error, tensors, token_mask, visible

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LENGTHS = [1, 2, 31, 127, 128, 129, 255, 257, 300]


@st.composite
def problems(draw):
    """Lengths, heads, head_dim and dtype."""
    q_len = draw(st.sampled_from(LENGTHS))
    prefix = draw(st.sampled_from([0, 0, 1, 5, 128, 130]))
    heads = [(1, 2), (2, 1), (2, 2), (3, 1), (3, 3), (5, 1), (6, 1), (7, 1), (8, 1), (12, 1)]
    group, kv_heads = draw(st.sampled_from(heads))
    dim = draw(st.sampled_from([16, 64, 80, 96, 128]))
    dtype = draw(st.sampled_from(DTYPES))
    return draw(st.integers(0, 999)), (q_len, group * kv_heads, dim), (q_len + prefix, kv_heads, dim), dtype


@given(problem=problems(), causal=st.booleans())
def test_dense_equals_sdpa(engine, problem, causal):
    seed, q_shape, k_shape, dtype = problem
    q, k, v = tensors(seed, q_shape, k_shape, dtype)
    out, lse = fp.prefill_attention(q, k, v, fp.Dense(), causal=causal, return_lse=True, **engine)
    allowed = visible(q_shape[0], k_shape[0], causal).expand(q_shape[1], -1, -1)
    expected, expected_lse = attention(q, k, v, allowed)
    assert out.dtype == dtype and out.shape == q.shape
    assert lse.dtype == torch.float32 and lse.shape == (q_shape[1], q_shape[0])
    assert error(out, expected) < TOLERANCE[dtype]
    assert error(lse, expected_lse) < TOLERANCE[dtype]


def test_8bit_products_change_nothing_without_a_kernel(engine):
    """The mode permits; CPU backends have no such products."""
    q, k, v = tensors(1, (300, 4, 128), (300, 2, 128), torch.float32)
    mask = fp.select(q, k, fp.FlashPrefill(), **engine)
    wanted = fp.attend(q, k, v, mask, **engine)
    assert torch.equal(fp.attend(q, k, v, mask, math="8bit", **engine), wanted)
    assert torch.equal(fp.prefill_attention(q, k, v, fp.FlashPrefill(), math="8bit", **engine), wanted)


@given(problem=problems(), causal=st.booleans(), data=st.data())
def test_any_mask_equals_masked_sdpa(engine, problem, causal, data):
    """Random masks, so many rows see nothing at all."""
    seed, q_shape, k_shape, dtype = problem
    q, k, v = tensors(seed, q_shape, k_shape, dtype)
    block_size = data.draw(st.sampled_from([16, 48, 128]))
    share = data.draw(st.booleans())
    group = q_shape[1] // k_shape[1]
    tile = 128 // group if share else 128
    heads = data.draw(st.sampled_from([1, k_shape[1] if share else q_shape[1]]))
    shape = (heads, -(-q_shape[0] // tile), -(-k_shape[0] // block_size))
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4
    mask = fp.BlockMask.from_dense(
        keep,
        q_len=q_shape[0],
        k_len=k_shape[0],
        block_size=block_size,
        share_heads=share,
        group=group,
        causal=causal,
    )
    out, lse = fp.attend(q, k, v, mask, return_lse=True, **engine)
    allowed = token_mask(keep, q_shape[1], q_shape[0], k_shape[0], block_size, tile, causal)
    expected, expected_lse = attention(q, k, v, allowed)
    empty = ~allowed.any(-1)
    assert (out.transpose(0, 1)[empty] == 0).all() and (lse[empty] == -math.inf).all()
    assert error(out, expected) < TOLERANCE[dtype]
    assert error(lse[~empty], expected_lse[~empty]) < TOLERANCE[dtype]


@functools.cache  # each backend is held against the same one
def corrected_by_definition(share, dtype, q_len, k_len, summary=None):
    q, k, v = tensors(3, (q_len, 4, 32), (k_len, 2, 32), dtype)
    tile = 64 if share else 128
    shape = (2 if share else 4, -(-q_len // tile), -(-k_len // 32))
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(4)) < 0.4
    return q, k, v, keep, *corrected_attention(q, k, v, keep, 32, tile, summary=summary)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "q_len,k_len,how", [(200, 333, True), (300, 300, True), (300, 300, "summary"), (200, 1111, "summary")]
)
def test_mean_correction(engine, share, dtype, q_len, k_len, how):
    summary = 16 if how == "summary" else None
    q, k, v, keep, expected, expected_lse = corrected_by_definition(share, dtype, q_len, k_len, summary)
    mask = fp.BlockMask.from_dense(
        keep, q_len=q_len, k_len=k_len, block_size=32, share_heads=share, group=2, mean_correction=how
    )
    out, lse = fp.attend(q, k, v, mask, return_lse=True, **engine)
    assert error(out, expected) < TOLERANCE[dtype]
    seen = expected_lse > -math.inf
    assert torch.equal(lse > -math.inf, seen)
    assert error(lse[seen], expected_lse[seen]) < TOLERANCE[dtype]


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("scale", [None, 0.05, 1.3])
def test_scale_and_head_dim(engine, dim, scale):
    q, k, v = tensors(dim, (150, 2, dim), (170, 1, dim))
    k = k / dim**0.5  # keeps scores near 1 at every scale
    out = fp.prefill_attention(q, k, v, fp.Dense(), softmax_scale=scale, **engine)
    expected, _ = attention(q, k, v, visible(150, 170).expand(2, -1, -1), scale)
    assert error(out, expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    "policy",
    [
        fp.FlashPrefill(alpha=0.0),
        fp.FlashPrefill(alpha=0.0, share_heads=True, mean_correction=True),
        fp.Sketch(mass=1.0),
        fp.Streaming(sink_blocks=9),
        fp.FlashPrefill(alpha=9.0, dense_tail_blocks=9),
    ],
    ids=lambda p: p.kind,
)
def test_everything_kept_equals_dense(engine, policy):
    q, k, v = tensors(5, (700, 6, 32), (700, 2, 32))
    out, stats = fp.prefill_attention(q, k, v, policy, return_stats=True, **engine)
    if policy.kind != "sketch":  # rounding may leave the last block out of mass = 1
        assert stats.mean_density == 1.0
        expected, _ = attention(q, k, v, visible(700, 700).expand(6, -1, -1))
        assert error(out, expected) < TOLERANCE[torch.float32]
    assert stats.mean_density > 0.9


def test_select_then_attend_equals_prefill(engine):
    q, k, v = tensors(6, (2, 515, 6, 32), (2, 630, 2, 32))
    policies = [
        fp.FlashPrefill(alpha=0.97, window_blocks=1, dense_tail_blocks=0, block_size=32),
        fp.FlashPrefill(alpha=0.97, block_size=64, share_heads=True, mean_correction=True, sink_blocks=0),
        fp.Sketch(mass=0.5, block_size=48, window_blocks=1, dense_tail_blocks=1),
        fp.Streaming(1, 1, 1, block_size=64, mean_correction=True),
        fp.Dense(),
    ]
    for policy in policies:
        mask = fp.select(q, k, policy, **engine)
        out, lse = fp.attend(q, k, v, mask, return_lse=True, **engine)
        out2, lse2, stats = fp.prefill_attention(
            q, k, v, policy, return_lse=True, return_stats=True, **engine
        )
        assert torch.equal(out, out2) and torch.equal(lse, lse2), policy
        assert torch.equal(stats.kept, mask.stats.kept) and torch.equal(stats.fallback, mask.stats.fallback)
        assert lse.shape == (2, 6, 515)
        if policy.kind != "dense":
            assert mask.density < 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_never_see_the_future(engine, dtype):
    """Whatever k and any finite v of later tokens hold, earlier rows keep their bits."""
    q, k, v = tensors(7, (300, 4, 64), (310, 2, 64), dtype)
    keep = torch.rand(4, 3, 20, generator=torch.Generator().manual_seed(1)) < 0.6
    mask = fp.BlockMask.from_dense(keep, q_len=300, k_len=310, block_size=16)
    before = fp.attend(q, k, v, mask, **engine)
    for token in (11, 140, 309):
        for poison in (math.nan, math.inf, -math.inf, 1e4):
            k2, v2 = k.clone(), v.clone()
            k2[token:] = poison
            v2[token:] = torch.finfo(dtype).max if poison != 1e4 else -7.0
            after = fp.attend(q, k2, v2, mask, **engine)
            rows = token - 10
            assert torch.equal(before[:rows], after[:rows]), (token, poison)


def test_garbage_of_skipped_blocks_stays_out(engine):
    q, k, v = tensors(8, (256, 2, 64), (256, 1, 64))
    keep = torch.tensor([[[1, 0, 1, 0, 0, 0, 0, 1], [1, 0, 0, 0, 1, 0, 1, 1]]], dtype=torch.bool)
    mask = fp.BlockMask.from_dense(keep, q_len=256, k_len=256, block_size=32)
    before = fp.attend(q, k, v, mask, **engine)
    k[32:64], v[32:64] = math.nan, math.nan  # block 1, which no tile keeps
    k[160:192], v[160:192] = math.inf, math.nan  # block 5
    assert torch.equal(before, fp.attend(q, k, v, mask, **engine))


def test_threads_do_not_change_bits(engine):
    q, k, v = tensors(9, (2, 400, 6, 64), (2, 400, 2, 64), torch.bfloat16)
    policy = fp.FlashPrefill(alpha=0.97, block_size=32, window_blocks=1, dense_tail_blocks=1, query_pool=16)
    runs = [
        fp.prefill_attention(q, k, v, policy, return_lse=True, return_stats=True, threads=n, **engine)
        for n in (1, 2, 5, 0, None, 1)
    ]
    for out, lse, stats in runs[1:]:
        assert torch.equal(out, runs[0][0]) and torch.equal(lse, runs[0][1])
        assert torch.equal(stats.kept, runs[0][2].kept)


def test_chunks_of_a_prompt_equal_the_whole(engine):
    """Two chunks over a growing cache, each under its part of one mask, against one call."""
    q, k, v = tensors(10, (512, 4, 64), (512, 2, 64))
    keep = torch.rand(4, 4, 16, generator=torch.Generator().manual_seed(2)) < 0.5
    keep |= torch.eye(4, dtype=torch.bool).repeat_interleave(4, 1)[None]
    mask = fp.BlockMask.from_dense(keep, q_len=512, k_len=512, block_size=32)
    whole, whole_lse = fp.attend(q, k, v, mask, return_lse=True, **engine)
    for begin, end in ((0, 256), (256, 512)):
        part = fp.BlockMask.from_dense(
            keep[:, begin // 128 : end // 128, : end // 32], q_len=end - begin, k_len=end, block_size=32
        )
        out, lse = fp.attend(q[begin:end], k[:end], v[:end], part, return_lse=True, **engine)
        assert error(out, whole[begin:end]) < 2e-6 and error(lse, whole_lse[:, begin:end]) < 2e-6


def test_empty_inputs(engine):
    for q_shape, k_shape in [
        ((0, 2, 16), (0, 1, 16)),
        ((0, 2, 16), (40, 1, 16)),
        ((0, 5, 2, 16), (0, 7, 1, 16)),
    ]:
        q, k, v = tensors(0, q_shape, k_shape)
        out, lse, stats = fp.prefill_attention(q, k, v, return_lse=True, return_stats=True, **engine)
        assert out.shape == q.shape and lse.numel() == 0
        assert stats.mean_density == 1.0 and (stats.kept == 0).all()
    q, k, v = tensors(0, (3, 2, 16), (0, 1, 16))
    out, lse = fp.prefill_attention(q, k, v, fp.Dense(), causal=False, return_lse=True, **engine)
    assert (out == 0).all() and (lse == -math.inf).all()


def test_dtypes_may_differ(engine):
    """ggml hands f32 q with f16 k and v."""
    q, k, v = tensors(11, (200, 2, 64), (200, 2, 64))
    expected, _ = attention(q, k.half(), v.half(), visible(200, 200).expand(2, -1, -1))
    try:
        out = fp.prefill_attention(q, k.half(), v.half(), fp.Dense(), **engine)
    except fp.UnsupportedError as refused:
        assert "dtype" in str(refused)
    else:
        assert out.dtype == torch.float32 and error(out, expected) < TOLERANCE[torch.float16]


def test_a_view_far_into_memory(engine):
    """Offsets beyond 2^31 elements, in memory of which only the pages in use exist."""
    token_stride = 2**31 // 50
    try:
        memory = np.zeros(token_stride * 130, np.float16)  # 11 GB of addresses, untouched
    except MemoryError:
        pytest.skip("no 11 GB of address space")
    far = np.lib.stride_tricks.as_strided(memory, (130, 1, 32), (token_stride * 2, 64, 2))
    q, k, v = (x.numpy() for x in tensors(12, (130, 2, 32), (130, 1, 32), torch.float16))
    far[:] = k
    assert np.array_equal(
        fp.prefill_attention(q, far, v, fp.Dense(), **engine),
        fp.prefill_attention(q, k, v, fp.Dense(), **engine),
    )


def test_timings(engine):
    q, k, v = tensors(13, (600, 2, 32), (600, 2, 32))
    with fp.collect_timings() as timings:
        fp.prefill_attention(q, k, v, fp.FlashPrefill(block_size=32, dense_tail_blocks=0), **engine)
    assert timings.calls == 1 and timings.attend_seconds > 0 and timings.select_seconds > 0
    fp.prefill_attention(q, k, v, fp.Dense(), **engine)
    assert timings.calls == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [0, 1])
def test_large_outputs_are_those_of_their_heads(engine, dtype, shift):
    """From 4 MiB on they are stored past the caches, rows that begin at whole vectors and others."""
    tokens, heads, head_dim = 1100, 16, 136
    policy = fp.Streaming(sink_blocks=1, window_blocks=1, block_size=32)
    q, k, v = tensors(14, (tokens, heads, head_dim), (tokens, heads, head_dim), dtype)
    memory = torch.empty(q.numel() + shift, dtype=dtype)
    out = memory[shift:].view(q.shape)
    assert out.numel() * out.element_size() > 4 << 20
    fp.prefill_attention(q, k, v, policy, out=out, **engine)
    for head in range(0, heads, 4):
        some = slice(head, head + 4)
        small = fp.prefill_attention(q[:, some], k[:, some], v[:, some], policy, **engine)
        assert torch.equal(out[:, some], small)
