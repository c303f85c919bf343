"""Packed, paged, strided, NumPy: however the same numbers lie in memory, the same bits come out."""

import itertools

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flashprefill as fp
from oracle import tensors

POLICIES = [
    fp.Dense(),
    fp.FlashPrefill(alpha=0.97, block_size=16, sink_blocks=1, window_blocks=1, dense_tail_blocks=1),
    fp.FlashPrefill(
        alpha=0.97, block_size=32, sink_blocks=0, window_blocks=0, share_heads=True, mean_correction=True
    ),
    fp.Sketch(mass=0.5, block_size=16, sink_blocks=0, window_blocks=1, dense_tail_blocks=2),
    fp.XAttention(threshold=0.5, stride=8, norm=0.1, block_size=16),
    fp.RRAttention(threshold=0.5, stride=4, block_size=32, window_blocks=0),
    fp.SpargeAttn(cdf=0.5, similarity=0.1, block_size=16),
    fp.Prism(mass=0.4, block_size=16),
    fp.SampleAttention(coverage=0.4, sample_rows=5, window_ratio=0.05, block_size=16),
]
LENGTHS = st.lists(st.tuples(st.integers(0, 150), st.sampled_from([0, 1, 30])), min_size=1, max_size=4)


def cumulative(lengths):
    return [0, *itertools.accumulate(lengths)]


def paged(x, lengths, page_size, seed):
    """Packed keys on pages in random order, unused slots NaN. Returns pages and block table."""
    counts = [-(-n // page_size) for n in lengths]
    order = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(seed)).tolist()
    pages = torch.full((len(order), page_size, *x.shape[1:]), float("nan"), dtype=x.dtype)
    table = torch.full((len(lengths), max(counts, default=0) + 1), 10**6, dtype=torch.int32)
    begin = 0
    for b, n in enumerate(lengths):
        for p in range(counts[b]):
            page = order.pop()
            table[b, p] = page
            part = x[begin + p * page_size : begin + min((p + 1) * page_size, n)]
            pages[page, : len(part)] = part
        begin += n
    return pages, table


def results(engine, *args, **keywords):
    out, lse, stats = fp.prefill_attention(*args, return_lse=True, return_stats=True, **keywords, **engine)
    return out, lse, stats


@given(
    lengths=LENGTHS,
    policy=st.sampled_from(POLICIES),
    page_size=st.sampled_from([1, 16, 24, 64, 128]),
    heads=st.sampled_from([(2, 2), (3, 1)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_packed_and_paged_equal_single_sequences(engine, lengths, policy, page_size, heads, dtype, seed):
    q_lens, k_lens = [n for n, _ in lengths], [n + p for n, p in lengths]
    q, k, v = tensors(seed, (sum(q_lens), heads[0], 32), (sum(k_lens), heads[1], 32), dtype)
    cu_q, cu_k = cumulative(q_lens), cumulative(k_lens)
    out, lse, stats = results(engine, q, k, v, policy, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    assert lse.shape == (heads[0], sum(q_lens))
    for b in range(len(lengths)):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        out1, lse1, stats1 = results(engine, q[rows], k[keys], v[keys], policy)
        assert torch.equal(out[rows], out1) and torch.equal(lse[:, rows], lse1)
        assert torch.equal(stats.kept[b], stats1.kept[0]) and stats.total[b] == stats1.total[0]
        assert stats.reasons[b] == stats1.reasons[0]

    both, table = paged(torch.stack([k, v], 1), k_lens, page_size, seed)
    k_pages, v_pages = both[:, :, 0], both[:, :, 1]
    given = [{"seqused_k": k_lens}, {"cu_seqlens_k": cu_k}]
    for lens in given:
        out2, lse2, stats2 = results(
            engine, q, k_pages, v_pages, policy, cu_seqlens_q=cu_q, block_table=table, **lens
        )
        assert torch.equal(out, out2) and torch.equal(lse, lse2) and torch.equal(stats.kept, stats2.kept)
    # vLLM's cache keeps heads before slots, and on the CPU K's head_dim before slots.
    k_cache = k_pages.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    v_cache = v_pages.transpose(1, 2).contiguous().transpose(1, 2)
    out3, _, _ = results(
        engine, q, k_cache, v_cache, policy, cu_seqlens_q=cu_q, block_table=table, **given[0]
    )
    assert torch.equal(out, out3)
    mask = fp.select(q, k_pages, policy, cu_seqlens_q=cu_q, block_table=table, seqused_k=k_lens, **engine)
    out4 = fp.attend(
        q, k_pages, v_pages, mask, cu_seqlens_q=cu_q, block_table=table, seqused_k=k_lens, **engine
    )
    assert torch.equal(out, out4)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.kind)
def test_rectangular_batch_equals_single_sequences(engine, policy):
    q, k, v = tensors(1, (3, 140, 4, 32), (3, 170, 2, 32))
    used = torch.tensor([170, 140, 155])
    out, lse, stats = results(engine, q, k, v, policy, seqused_k=used)
    for b, n in enumerate(used.tolist()):
        out1, lse1, stats1 = results(engine, q[b], k[b, :n], v[b, :n], policy)
        assert torch.equal(out[b], out1) and torch.equal(lse[b], lse1)
        assert torch.equal(stats.kept[b], stats1.kept[0])
    # Packed queries over a rectangular cache, as a server's prefix cache has it.
    cu = [0, 140, 140, 200]
    packed = torch.cat([q[0], q[2][-60:]])
    out2 = fp.prefill_attention(packed, k, v, policy, cu_seqlens_q=cu, seqused_k=used, **engine)
    assert torch.equal(out2[:140], out[0])


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.kind)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_numpy_and_torch_give_equal_bits(engine, policy, dtype):
    q, k, v = tensors(2, (200, 4, 32), (230, 2, 32), dtype)

    def to_numpy(x):
        return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if dtype == torch.bfloat16 else x.numpy()

    arrays = [to_numpy(x) for x in (q, k, v)]
    out, lse, stats = results(engine, q, k, v, policy)
    out2, lse2, stats2 = results(engine, *arrays, policy)
    assert (
        isinstance(out2, np.ndarray) and out2.dtype == arrays[0].dtype and isinstance(stats2.kept, np.ndarray)
    )
    assert np.array_equal(to_numpy(out), out2) and np.array_equal(lse.numpy(), lse2)
    assert np.array_equal(stats.kept.numpy(), stats2.kept)
    mask, mask2 = fp.select(q, k, policy, **engine), fp.select(*arrays[:2], policy, **engine)
    assert mask2.bits.dtype == np.uint64 and mask.bits.dtype == torch.int64
    assert np.array_equal(mask.bits.numpy().view(np.uint64), mask2.bits)
    # A mask made with one library serves the other.
    assert np.array_equal(out2, fp.attend(*arrays, mask, **engine))
    assert torch.equal(out, fp.attend(q, k, v, mask2, **engine))


@given(
    order=st.permutations(range(4)),
    flips=st.tuples(*[st.booleans()] * 4),
    steps=st.tuples(*[st.integers(1, 3)] * 4),
    policy=st.sampled_from(POLICIES),
)
def test_any_strides_of_inputs_and_out(engine, order, flips, steps, policy):
    q, k, v = (x.numpy() for x in tensors(3, (2, 100, 4, 16), (2, 130, 2, 16)))

    def strided(x):
        """The same values in other places: permuted, reversed, with gaps."""
        wide = np.full([n * s for n, s in zip(x.shape, steps, strict=True)], np.nan, x.dtype)
        wide = np.ascontiguousarray(wide.transpose(order)).transpose(np.argsort(order))
        cuts = tuple(slice(None, None, -s if f else s) for s, f in zip(steps, flips, strict=True))
        wide[cuts] = x
        return wide[cuts]

    out, lse = fp.prefill_attention(q, k, v, policy, return_lse=True, **engine)
    given = strided(np.zeros_like(q))
    out2, lse2 = fp.prefill_attention(
        strided(q), strided(k), strided(v), policy, out=given, return_lse=True, **engine
    )
    assert out2 is given
    assert np.array_equal(out, out2) and np.array_equal(lse, lse2)


def test_broadcast_inputs(engine):
    """Strides of zero: one K and V for all sequences."""
    q, k, v = tensors(4, (3, 64, 2, 16), (1, 80, 2, 16))
    wide = [x.expand(3, -1, -1, -1) for x in (k, v)]
    out = fp.prefill_attention(q, *wide, **engine)
    assert torch.equal(out, fp.prefill_attention(q, *(x.contiguous() for x in wide), **engine))


def test_out_of_torch(engine):
    q, k, v = tensors(5, (64, 2, 16), (64, 2, 16))
    buffer = torch.full((64, 2, 40), 7.0)
    out, lse = fp.prefill_attention(q, k, v, out=buffer[..., :16], return_lse=True, **engine)
    assert out.data_ptr() == buffer.data_ptr() and (buffer[..., 16:] == 7).all()
    assert torch.equal(out, fp.prefill_attention(q, k, v, **engine))
    mask = fp.select(q, k, **engine)
    again = torch.empty_like(q)
    assert fp.attend(q, k, v, mask, out=again, **engine) is again and torch.equal(again, out)


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8"])
def test_index_arrays_of_any_kind(engine, kind, dtype):
    q, k, v = tensors(6, (90, 2, 16), (90, 2, 16))
    cu = [0, 30, 90]
    if kind is np.array:
        cu = np.array(cu, dtype)
    elif kind is torch.tensor:
        cu = torch.tensor(cu, dtype=getattr(torch, dtype))
    expected = fp.prefill_attention(q, k, v, cu_seqlens_q=[0, 30, 90], cu_seqlens_k=[0, 30, 90], **engine)
    out = fp.prefill_attention(
        q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=60, max_seqlen_k=90, **engine
    )
    assert torch.equal(out, expected)
    if kind is not torch.tensor:
        arrays = [x.numpy() for x in (q, k, v)]
        out = fp.prefill_attention(*arrays, cu_seqlens_q=cu, cu_seqlens_k=cu, **engine)
        assert np.array_equal(out, expected.numpy())


def test_bounds_do_not_change_results(engine):
    """max_seqlen may be any upper bound: a mask has more words then, and the same bits."""
    q, k, v = tensors(7, (300, 2, 16), (300, 2, 16))
    cu = [0, 100, 300]
    policy = fp.FlashPrefill(alpha=0.97, block_size=16, sink_blocks=0, dense_tail_blocks=0)
    lens = {"cu_seqlens_q": cu, "cu_seqlens_k": cu}
    tight = fp.select(q, k, policy, **lens, **engine)
    loose = fp.select(q, k, policy, max_seqlen_q=300, max_seqlen_k=5000, **lens, **engine)
    assert loose.bits.shape[2] > tight.bits.shape[2]
    for b in range(2):
        assert torch.equal(tight.dense(b), loose.dense(b))
    out = fp.attend(q, k, v, tight, **lens, **engine)
    assert torch.equal(out, fp.attend(q, k, v, loose, **lens, **engine))
