"""Attention that skips keys (Dense(skip=...), SpargeAttn): the rule a second time, and the bound."""

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flashprefill as fp
from oracle import TOLERANCE, error, tensors


def expected(q, k, v, skip, block_size):
    """Causal attention in float64 in which each row skips chunks, its lse, and blocks that tiles skipped."""
    (rows, heads, dim), keys, group = q.shape, len(k), q.shape[1] // k.shape[1]
    prefix = keys - rows
    out, lse = (
        torch.zeros(rows, heads, dim, dtype=torch.float64),
        torch.zeros(heads, rows, dtype=torch.float64),
    )
    skipped, nearest = np.zeros((heads, -(-rows // 128)), np.int64), math.inf  # pairs of a row and a key
    for i in range(rows):
        begin, end = i // 128 * 128, min(i // 128 * 128 + 128, rows)
        full = (prefix + begin) // block_size * block_size  # keys before the diagonal's blocks
        chunks = [range(a, min(a + 128, full)) for a in range(0, full, 128)]
        chunks += [range(a, min(a + 128, prefix + end)) for a in range(full, prefix + end, 128)]
        for h in range(heads):
            z = q[i, h].double() @ k[:, h // group].double().T / math.sqrt(dim)
            heaviest, kept = -math.inf, []
            for chunk in chunks:
                seen = torch.tensor([t for t in chunk if t <= prefix + i])
                if not len(seen):
                    continue
                largest = float(z[seen].max())
                nearest = min(nearest, abs(largest - heaviest - math.log(skip)))
                if largest < heaviest + math.log(skip):
                    skipped[h, i // 128] += len(seen)
                    continue
                heaviest = max(heaviest, largest)
                kept.append(seen)
            kept = torch.cat(kept)
            out[i, h] = z[kept].softmax(0) @ v[kept, h // group].double()
            lse[h, i] = z[kept].logsumexp(0)
    tokens = np.minimum(128, rows - 128 * np.arange(skipped.shape[1]))
    return out, lse, (skipped + tokens * block_size // 2) // (tokens * block_size), nearest


@pytest.mark.parametrize("block_size", [128, 48])
@pytest.mark.parametrize("lengths", [(300, 300), (140, 500)])
def test_the_rule(engine, lengths, block_size):
    q, k, v = tensors(1, (lengths[0], 2, 16), (lengths[1], 1, 16))
    q, k = q.mul(8).round().div(2), k.mul(4).round().div(2)  # scores are exact in fp32
    skip = 0.223
    out, lse, skipped, nearest = expected(q, k, v, skip, block_size)
    assert nearest > 1e-5 and skipped.sum() > 0
    policy = fp.Dense(skip=skip, block_size=block_size)
    result, result_lse, stats = fp.prefill_attention(
        q, k, v, policy, return_lse=True, return_stats=True, **engine
    )
    assert error(result, out) <= TOLERANCE[torch.float32]
    assert error(result_lse, lse.float()) <= TOLERANCE[torch.float32]
    assert np.asarray(stats.skipped)[0].tolist() == skipped.sum(axis=1).tolist()
    assert "attention skipped" in repr(stats)


@given(
    rows=st.integers(1, 400),
    prefix=st.sampled_from([0, 1, 200, 555]),
    group=st.sampled_from([1, 3]),
    shared=st.booleans(),
    skip=st.sampled_from([1e-4, 1e-2, 0.3]),
    seed=st.integers(0, 99),
)
def test_the_bound(engine, rows, prefix, group, shared, skip, seed):
    q, k, v = tensors(seed, (rows, 2 * group, 24), (rows + prefix, 2, 24))
    exact, exact_lse = fp.prefill_attention(3 * q, k, v, "dense", return_lse=True, backend="reference")
    policy = fp.Dense(skip=skip, share_heads=shared)
    out, lse = fp.prefill_attention(3 * q, k, v, policy, return_lse=True, **engine)
    mass = skip * torch.arange(prefix + 1, prefix + rows + 1)
    share = (mass / (1 + mass))[:, None, None]
    span = (v.cummax(0).values - v.cummin(0).values)[prefix:].repeat_interleave(group, dim=1)
    assert ((out - exact).abs() <= share * span + 1e-4).all()
    lost = exact_lse - lse
    assert (lost >= -1e-4).all() and (lost <= mass.log1p() + 1e-4).all()


def test_masks_and_texts(engine):
    q, k, v = tensors(2, (300, 4, 32), (600, 2, 32))
    q = 4 * q
    policy = fp.Dense(skip=0.05)
    assert policy.text == "dense(skip=0.05)" and pickle.loads(pickle.dumps(policy)) == policy
    assert not policy.exact and fp.Dense().exact and fp.Dense().text == "dense"
    mask = fp.select(q, k, policy, **engine)
    assert mask.skip == pytest.approx(0.05) and int(mask.stats.skipped.sum()) == 0
    out = fp.attend(q, k, v, mask, **engine)
    assert int(mask.stats.skipped.sum()) > 0 and (mask.stats.skipped <= mask.stats.kept).all()
    whole, stats = fp.prefill_attention(q, k, v, "dense(skip=0.05)", return_stats=True, **engine)
    assert torch.equal(out, whole) and torch.equal(stats.skipped, mask.stats.skipped)
    arrays = fp.prefill_attention(*(x.numpy() for x in (q, k, v)), policy, **engine)
    assert np.array_equal(arrays, out.numpy())
    assert torch.equal(fp.attend(q, k, v, fp.select(q.numpy(), k.numpy(), policy, **engine), **engine), out)
    compiled = torch.compile(
        lambda *x: fp.prefill_attention(*x, policy, **engine), backend="eager", fullgraph=True
    )
    assert torch.equal(compiled(q, k, v), out)
    for bad in (1.0, -0.1, math.nan):
        with pytest.raises(fp.InvalidArgumentError, match="skip is"):
            fp.Dense(skip=bad)


def test_sparge_attn_skips_among_what_it_keeps(engine):
    q, k, v = tensors(3, (400, 2, 32), (400, 2, 32))
    q = 8 * q
    first = fp.SpargeAttn(topk=0.5)
    both = fp.SpargeAttn(topk=0.5, skip=0.3)
    assert both.text == "spargeattn(topk=0.5, skip=0.3)"
    stages = [fp.select(q, k, policy, **engine) for policy in (first, both)]
    assert torch.equal(stages[0].bits, stages[1].bits)  # the first stage is the same
    kept, kept_lse = fp.attend(q, k, v, stages[0], return_lse=True, **engine)
    out, lse = fp.attend(q, k, v, stages[1], return_lse=True, **engine)
    assert int(stages[1].stats.skipped.sum()) > 0
    mass = 0.3 * torch.arange(1, 401)
    assert ((kept_lse - lse) <= mass.log1p() + 1e-4).all() and (kept_lse - lse >= -1e-4).all()
    assert (out - kept).abs().max() > 1e-4
