"""Gather, and masks with lists of keys: the rule and attention said a second time in PyTorch, in float64."""

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flashprefill as fp
from oracle import TOLERANCE, attention, error, tensors, token_mask


def expected_lists(q, k, policy, margin=2e-3):
    """For each mask head and segment: the keys that are surely in, and those that may be."""
    (q_len, heads, dim), (k_len, kv_heads, _) = q.shape, k.shape
    group, prefix, size = heads // kv_heads, k_len - q_len, policy.block_size
    tile = 128 // group if policy.share_heads else 128
    segment = max(1, policy.segment // tile) * tile
    tail = -(-policy.dense_tail_blocks * size // tile)
    lists = []
    for members in (
        [range(g * group, g * group + group) for g in range(kv_heads)]
        if policy.share_heads
        else [[h] for h in range(heads)]
    ):
        lists.append([])
        for begin in range(0, q_len, segment):
            before = prefix + begin
            first = policy.sink_blocks * size
            end = max(0, before // size - max(0, policy.window_blocks - 1)) * size
            if begin // tile >= -(-q_len // tile) - tail or first >= end:
                lists[-1].append((set(), set()))
                continue
            keys = k[: prefix + min(begin + segment, q_len), members[0] // group].double()
            means = [q[begin : begin + segment, h].double().mean(0).to(q.dtype).double() for h in members]
            shares = (
                torch.stack([(dim**-0.5 * keys @ mean).softmax(0) for mean in means]).square().mean(0).sqrt()
            )
            energy = shares[first:end].numpy()
            order = np.argsort(-energy, kind="stable")
            rest = np.cumsum(energy[order][::-1])[::-1]
            if policy.budget is not None:
                wanted = most = math.ceil(policy.budget * len(order) - 1e-6)
            else:
                worth = 128 * energy[order] * np.sqrt(rest)
                wanted = int((worth >= policy.gain * (1 + margin)).sum())
                most = int((worth >= policy.gain * (1 - margin)).sum())
            wanted, most = min(wanted, policy.max_keys), min(most, policy.max_keys)
            sure = energy > energy[order[wanted]] * (1 + margin) if wanted < len(order) else energy >= 0
            sure &= np.isin(np.arange(len(order)), order[:wanted])
            open_ = energy >= energy[order[most - 1]] * (1 - margin) if most else energy < 0
            lists[-1].append(
                (set((np.flatnonzero(sure) + first).tolist()), set((np.flatnonzero(open_) + first).tolist()))
            )
    return lists


def kept_keys(mask, heads, q_len, k_len):
    """Bool [heads, rows, keys]: what each row attends to under a mask with lists."""
    bits = np.asarray(mask._blocks(0))
    allowed = token_mask(bits, heads, q_len, k_len, mask.block_size, mask.tile_tokens)
    lists, each = mask.keys(), heads // mask.heads
    tokens = mask.segment_tiles * mask.tile_tokens
    for h in range(heads):
        for i, keys in enumerate(lists[h // each]):
            allowed[h, i * tokens : (i + 1) * tokens, torch.as_tensor(keys, dtype=torch.long)] = True
    return allowed & (torch.arange(k_len)[None] <= torch.arange(q_len)[:, None] + (k_len - q_len))


POLICIES = [
    fp.Gather(gain=0.2, block_size=64, dense_tail_blocks=0),
    fp.Gather(gain=0.05, block_size=32, sink_blocks=0, window_blocks=1, segment=256, dense_tail_blocks=1),
    fp.Gather(budget=0.1, block_size=16, share_heads=False, dense_tail_blocks=0),
    fp.Gather(budget=0.9, block_size=64, max_keys=128, dense_tail_blocks=0),
]


@given(
    q_len=st.integers(1, 500),
    prefix=st.sampled_from([0, 3, 200, 777]),
    group=st.sampled_from([1, 3, 4]),
    policy=st.sampled_from(POLICIES),
    seed=st.integers(0, 99),
)
def test_lists_and_attention(engine, q_len, prefix, group, policy, seed):
    k_len = q_len + prefix
    q, k, v = tensors(seed, (q_len, 2 * group, 24), (k_len, 2, 24))
    q = q + 2 * torch.randn(
        2 * group, 24, generator=torch.Generator().manual_seed(seed)
    )  # means that say something
    mask = fp.select(q, k, policy, **engine)
    for have, want in zip(mask.keys(), expected_lists(q, k, policy), strict=True):
        for keys, (sure, perhaps) in zip(have, want, strict=True):
            assert sure <= set(keys.tolist()) <= perhaps
            assert len(keys) <= policy.max_keys and (np.diff(keys) > 0).all()
    out, lse, stats = fp.prefill_attention(q, k, v, policy, return_lse=True, return_stats=True, **engine)
    expected, expected_lse = attention(q, k, v, kept_keys(mask, 2 * group, q_len, k_len))
    assert error(out, expected) <= TOLERANCE[torch.float32]
    assert error(lse, expected_lse) <= TOLERANCE[torch.float32]
    assert stats.mean_density == pytest.approx(mask.density)
    assert torch.equal(fp.attend(q, k, v, mask, **engine), out)


def test_paged_and_packed_select_the_same(engine):
    """Layouts change nothing: batches, packed tokens, pages of any order."""
    policy = fp.Gather(gain=0.05, block_size=64, dense_tail_blocks=0)
    lengths = [(300, 500), (200, 200)]
    parts = [tensors(i, (q_len, 6, 32), (k_len, 2, 32)) for i, (q_len, k_len) in enumerate(lengths)]
    parts = [(q + 1.5, k, v) for q, k, v in parts]
    q, k, v = (torch.cat([part[i] for part in parts]) for i in range(3))
    lists = [fp.select(part[0], part[1], policy, **engine).keys() for part in parts]
    cu_q, cu_k = torch.tensor([0, 300, 500]), torch.tensor([0, 500, 700])
    packed = fp.select(q, k, policy, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **engine)
    out = fp.attend(q, k, v, packed, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **engine)
    pages = torch.randperm(60, generator=torch.Generator().manual_seed(1))[: 32 + 13].int()
    table = torch.zeros(2, 32, dtype=torch.int32)
    table[0], table[1, :13] = pages[:32], pages[32:]
    k_pages, v_pages = torch.full((60, 16, 2, 32), math.nan), torch.full((60, 16, 2, 32), math.nan)
    for b, (_, k_part, v_part) in enumerate(parts):
        for t in range(len(k_part)):
            k_pages[table[b, t // 16], t % 16] = k_part[t]
            v_pages[table[b, t // 16], t % 16] = v_part[t]
    places = {"cu_seqlens_q": cu_q, "seqused_k": torch.tensor([500, 200]), "block_table": table}
    paged = fp.select(q, k_pages, policy, **places, **engine)
    for b in range(2):
        for mask in (packed, paged):
            for have, want in zip(mask.keys(b), lists[b], strict=True):
                for one, other in zip(have, want, strict=True):
                    assert np.array_equal(one, other)
    assert torch.equal(fp.attend(q, k_pages, v_pages, paged, **places, **engine), out)


def test_chunks_gather_from_their_prefix(engine):
    """A chunk's segments rank all keys before them, as those of the whole prompt do."""
    policy = fp.Gather(gain=0.05, block_size=64, window_blocks=2, dense_tail_blocks=0)
    q, k, _ = tensors(3, (768, 3, 32), (768, 1, 32))
    q = q + 1.5
    whole = fp.select(q, k, policy, **engine).keys()[0]
    chunk = fp.select(q[504:], k, policy, final_chunk=False, **engine).keys()[
        0
    ]  # four segments of 126 tokens
    assert any(len(keys) for keys in chunk)
    for one, other in zip(whole[4:], chunk, strict=True):
        assert np.array_equal(one, other)


def test_masks_by_hand(engine):
    """from_dense takes lists, keys returns them, and a key in a list and in a block counts once."""
    q, k, v = tensors(1, (300, 4, 16), (420, 2, 16))
    rng = np.random.default_rng(0)
    keep = rng.random((4, 3, 7)) < 0.4
    keep[:, :, 0] = True  # so that every row sees something
    lists = [[np.flatnonzero(rng.random(420) < share) for share in (0.1, 0.0)] for _ in range(4)]
    mask = fp.BlockMask.from_dense(
        torch.from_numpy(keep), q_len=300, k_len=420, block_size=64, keys=lists, segment_tiles=2
    )
    for have, want in zip(mask.keys(), lists, strict=True):
        assert all(np.array_equal(one, other) for one, other in zip(have, want, strict=True))
    out, lse = fp.attend(q, k, v, mask, return_lse=True, **engine)
    expected, expected_lse = attention(q, k, v, kept_keys(mask, 4, 300, 420))
    assert error(out, expected) <= TOLERANCE[torch.float32]
    assert error(lse, expected_lse) <= TOLERANCE[torch.float32]
    holds = keep.copy()
    for head in range(4):
        for tile in range(3):
            holds[head, tile, np.asarray(lists[head][tile // 2], int) // 64] = True
    last = np.minimum(np.arange(1, 4) * 128, 300) - 1 + 120
    assert np.array_equal(np.asarray(mask.dense()), holds & (np.arange(7) * 64 <= last[:, None]))
    copy = pickle.loads(pickle.dumps(mask))
    assert torch.equal(fp.attend(q, k, v, copy, **engine), out)
    numpy_mask = fp.BlockMask.from_dense(
        keep, q_len=300, k_len=420, block_size=64, keys=lists, segment_tiles=2
    )
    assert torch.equal(fp.attend(q, k, v, numpy_mask, **engine), out)
    assert numpy_mask.density == pytest.approx(mask.density)


def test_one_head_of_lists_serves_all(engine):
    q, k, v = tensors(1, (200, 4, 16), (200, 2, 16))
    keep = np.zeros((1, 2, 4), bool)
    mask = fp.BlockMask.from_dense(keep, q_len=200, k_len=200, block_size=64, keys=[[[0, 5, 150], [7]]])
    out = fp.attend(q, k, v, mask, **engine)
    four = fp.BlockMask.from_dense(
        np.repeat(keep, 4, 0), q_len=200, k_len=200, block_size=64, keys=[[[0, 5, 150], [7]]] * 4
    )
    assert torch.equal(fp.attend(q, k, v, four, **engine), out)


def test_lists_by_hand_are_checked():
    keep = np.zeros((1, 1, 2), bool)
    for keys, says in (
        ([[[3, 3]]], "ascending, from 0 to 99"),
        ([[[3, 100]]], "ascending, from 0 to 99"),
        ([[[-1]]], "ascending"),
        ([[[1], [2]]], "(1, 1): heads, segments"),
        ([[[0.5]]], "a list of integers"),
    ):
        with pytest.raises((ValueError, TypeError)) as caught:
            fp.BlockMask.from_dense(keep, q_len=100, k_len=100, block_size=64, keys=keys)
        assert says in str(caught.value)


def test_a_full_list_shows_in_stats(engine):
    q, k, v = tensors(1, (256, 2, 16), (1024, 1, 16))
    policy = fp.Gather(budget=0.5, max_keys=128, block_size=64, window_blocks=2, dense_tail_blocks=0)
    stats = fp.prefill_attention(q, k, v, policy, return_stats=True, **engine)[1]
    assert stats.overflowed.tolist() == [[2]]
    assert "2 key lists too short" in repr(stats)
    policy = fp.Gather(budget=0.5, block_size=64, window_blocks=2, dense_tail_blocks=0)
    stats = fp.prefill_attention(q, k, v, policy, return_stats=True, **engine)[1]
    assert stats.overflowed.tolist() == [[0]] and "key list" not in repr(stats)


def test_correction_counts_what_no_list_holds(engine):
    """With a block's keys all alike, its mean is exact: gathered and corrected attention is dense."""
    q, k, v = tensors(5, (192, 2, 16), (640, 1, 16))
    k, v = (x.view(10, 64, 1, 16)[:, :1].expand(-1, 64, -1, -1).reshape(640, 1, 16) for x in (k, v))
    forced = {"block_size": 64, "window_blocks": 2, "dense_tail_blocks": 0}
    policy = fp.Gather(budget=0.3, mean_correction=True, **forced)
    out = fp.prefill_attention(q, k, v, policy, **engine)
    assert error(out, fp.prefill_attention(q, k, v, fp.Dense(), **engine)) <= 2e-5
    plain = fp.prefill_attention(q, k, v, fp.Gather(budget=0.3, **forced), **engine)
    assert error(plain, out) > 1e-3


def test_text_and_fields():
    assert fp.Gather().text.startswith("gather(gain=")
    assert fp.Gather(budget=0.1).gain is None
    assert fp.Gather().share_heads is True
    assert fp.Gather(share_heads=False).text.endswith("share_heads=false)")
    with pytest.raises(ValueError, match="one of the two decides"):
        fp.Gather(gain=0.1, budget=0.1)
    with pytest.raises(ValueError, match="max_keys is 1; it must be from 128"):
        fp.Gather(max_keys=1)


def test_torch_compile():
    q, k, v = tensors(1, (256, 2, 16), (256, 1, 16))
    policy = fp.Gather(budget=0.2, block_size=64, dense_tail_blocks=0)
    compiled = torch.compile(lambda q, k, v: fp.prefill_attention(q, k, v, policy), fullgraph=True)
    assert torch.equal(compiled(q, k, v), fp.prefill_attention(q, k, v, policy))
