"""BlockMask and Stats."""

import ctypes
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flashprefill as fp
from flashprefill import _abi
from oracle import tensors


@given(
    q_len=st.integers(1, 700),
    prefix=st.sampled_from([0, 3, 128, 9000]),
    block_size=st.sampled_from([16, 64, 128]),
    heads=st.integers(1, 3),
    batch=st.integers(1, 3),
    causal=st.booleans(),
    library=st.sampled_from(["numpy", "torch"]),
    seed=st.integers(0, 99),
)
def test_dense_round_trip(q_len, prefix, block_size, heads, batch, causal, library, seed):
    k_len = q_len + prefix
    tiles, blocks = -(-q_len // 128), -(-k_len // block_size)
    keep = np.random.default_rng(seed).random((batch, heads, tiles, blocks)) < 0.5
    given = keep if library == "numpy" else torch.from_numpy(keep)
    mask = fp.BlockMask.from_dense(given, q_len=q_len, k_len=k_len, block_size=block_size, causal=causal)
    last = np.minimum(np.arange(1, tiles + 1) * 128, q_len) - 1 + prefix
    past = np.ones((tiles, blocks), bool) if not causal else np.arange(blocks) * block_size <= last[:, None]
    for b in range(batch):
        dense = mask.dense(b)
        assert isinstance(dense, np.ndarray if library == "numpy" else torch.Tensor)
        assert np.array_equal(np.asarray(dense), keep[b] & past)
        assert int(mask.stats.total[b]) == past.sum()
        assert np.array_equal(np.asarray(mask.stats.kept)[b], (keep[b] & past).sum((1, 2)))
    assert mask.density == pytest.approx((keep & past).sum() / (past.sum() * heads * batch))
    assert mask.heads == heads and mask.batch == batch and mask.causal is causal


def test_from_dense_of_packed_sequences():
    rng = np.random.default_rng(1)
    keeps = [rng.random((2, t, b)) < 0.5 for t, b in ((1, 3), (0, 0), (3, 9))]
    cu_q, cu_k = [0, 60, 60, 210], [0, 140, 140, 700]
    mask = fp.BlockMask.from_dense(
        keeps, block_size=64, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, share_heads=True, group=2
    )
    assert mask.tile_tokens == 64
    assert mask.dense(1).shape == (2, 0, 0)
    last = 559 - 150 + np.array([64, 128, 150])
    past = np.arange(9) * 64 <= last[:, None]
    assert np.array_equal(mask.dense(2), keeps[2] & past)
    assert np.array_equal(mask.dense(-1), mask.dense(2))


def test_one_head_serves_all(engine):
    q, k, v = tensors(0, (256, 6, 16), (256, 2, 16))
    keep = torch.tensor([[[1, 0, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 1, 0, 1, 1]]], dtype=torch.bool)
    one = fp.BlockMask.from_dense(keep, q_len=256, k_len=256, block_size=32)
    six = fp.BlockMask.from_dense(keep.expand(6, -1, -1), q_len=256, k_len=256, block_size=32)
    assert torch.equal(fp.attend(q, k, v, one, **engine), fp.attend(q, k, v, six, **engine))


def test_stats_equal_the_library_s(engine):
    """Stats count in Python, from counts; fp_mask_stats counts bits."""
    q, k, _ = tensors(1, (500, 4, 16), (800, 2, 16))
    cu_q, cu_k = np.array([0, 200, 200, 500], np.int32), np.array([0, 290, 300, 800], np.int32)
    for policy in (fp.FlashPrefill(alpha=0.99, block_size=16), fp.Sketch(share_heads=True), fp.Dense()):
        mask = fp.select(q, k, policy, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **engine)
        p, m, s = _abi.sized(_abi.Problem), _abi.sized(_abi.BlockMask), _abi.sized(_abi.Stats)
        p.batch, p.q_heads, p.kv_heads, p.head_dim, p.causal, p.softmax_scale = 3, 4, 2, 16, 1, 1.0
        p.total_q, p.total_k, p.max_seqlen_q, p.max_seqlen_k = 500, 800, 300, 500
        p.q.data = p.k.data = p.v.data = q.data_ptr()
        p.cu_seqlens_q, p.cu_seqlens_k = cu_q.ctypes.data, cu_k.ctypes.data
        m.heads, m.tile_tokens, m.block_size = mask.heads, mask.tile_tokens, mask.block_size
        m.share_heads, (_, m.tile_rows, m.words) = mask.share_heads, mask.bits.shape
        m.bits, m.fallback = mask.bits.data_ptr(), mask.fallback.data_ptr()
        kept, total = np.zeros((3, mask.heads), np.int64), np.zeros(3, np.int64)
        fallback = np.zeros(3, np.int32)
        s.kept, s.total, s.fallback = kept.ctypes.data, total.ctypes.data, fallback.ctypes.data
        _abi.check(_abi.lib.fp_mask_stats(ctypes.byref(p), ctypes.byref(m), ctypes.byref(s)))
        assert np.array_equal(mask.stats.kept.numpy(), kept) and np.array_equal(
            mask.stats.total.numpy(), total
        )
        assert np.array_equal(mask.stats.fallback.numpy(), fallback)


def test_stats_forget_nothing_the_caller_changes(engine):
    """Lengths are copied, so statistics read later are those of the call."""
    q, k, v = tensors(2, (300, 1, 16), (300, 1, 16))
    cu = torch.tensor([0, 100, 300], dtype=torch.int32)
    _, stats = fp.prefill_attention(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, return_stats=True, **engine)
    cu.zero_()
    assert stats.total.tolist() == [1, 3]
    assert "density 1.000" in str(stats) and "2 sequences" in str(stats)
    assert stats.kept.shape == stats.density.shape == (2, 1)


def test_masks_and_stats_travel():
    keep = np.tri(3, dtype=bool)[None]
    mask = fp.BlockMask.from_dense(keep, q_len=384, k_len=384)
    copy = pickle.loads(pickle.dumps(mask))
    assert np.array_equal(copy.dense(), keep) and repr(copy) == repr(mask)
    assert pickle.loads(pickle.dumps(mask.stats)).mean_density == 1.0


def test_plot(tmp_path):
    keep = np.random.default_rng(0).random((3, 4, 5)) < 0.5
    mask = fp.BlockMask.from_dense(keep, q_len=500, k_len=600)
    axes = mask.plot(tmp_path / "mask.png")
    assert (tmp_path / "mask.png").read_bytes().startswith(b"\x89PNG")
    assert axes.images[0].get_array().shape == (4, 5)
    assert mask.plot(axes, head=1, title="one") is axes and axes.get_title() == "one"
    drawn = axes.images[-1].get_array()
    assert np.array_equal(drawn.filled(0).astype(bool), mask.dense()[1])
    assert drawn.mask[0, 4] and not drawn.mask[3, 4]  # the future is not drawn as left out
    assert mask.plot().get_title().startswith("all heads, density 0.")
    with pytest.raises(ValueError, match="head is 3"):
        mask.plot(head=3)
    with pytest.raises(ValueError, match="seq is 1"):
        mask.plot(seq=1)
