"""S2O: the rule said a second time in PyTorch, in float64."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

import flashprefill as fp
from oracle import TOLERANCE, attention, error, tensors
from test_gather import kept_keys


def expected_lists(q, k, policy):
    """For each mask head and segment: the keys, and whether a ratio was near tau or the cut near a tie."""
    (q_len, heads, dim), (k_len, kv_heads, _) = q.shape, k.shape
    group, prefix, size = heads // kv_heads, k_len - q_len, policy.block_size
    tile = 128 // group if policy.share_heads else 128
    segment = max(1, policy.segment // tile) * tile
    tail = -(-policy.dense_tail_blocks * size // tile)
    each = group if policy.share_heads else 1
    lists = []
    for first_head in range(0, heads, each):
        lists.append([])
        keys = k[:, first_head // group].double()
        for begin in range(0, q_len, segment):
            end = min(begin + segment, q_len)
            first = policy.sink_blocks * size
            last = max(0, (prefix + begin) // size - max(0, policy.window_blocks - 1)) * size
            if begin // tile >= -(-q_len // tile) - tail or first >= last:
                lists[-1].append(([], False))
                continue
            queries = q[:, first_head : first_head + each].double()
            means = [q[begin:end, first_head + h].double().mean(0).to(q.dtype).double() for h in range(each)]
            seen = keys[: prefix + end]
            energy = torch.stack([(dim**-0.5 * seen @ m).softmax(0) for m in means]).square().mean(0).sqrt()
            energy = energy[first:last].numpy()
            order = np.argsort(-energy, kind="stable")
            rows = min(policy.stop_rows, end - begin)
            places = [begin + (r + 1) * (end - begin) // rows - 1 for r in range(rows)]
            z = dim**-0.5 * torch.einsum("rhd,td->rht", queries[places], keys)
            weights = z.exp()
            for r, i in enumerate(places):
                weights[r, :, prefix + i + 1 :] = 0
            have = weights[..., :first].sum(-1) + weights[..., last:].sum(-1)
            near, below, kept = False, 0, min(len(order), policy.max_keys)
            for at in range(0, kept, 128):
                group_keys = torch.from_numpy(order[at : min(at + 128, kept)] + first)
                added = z[..., group_keys].exp().sum(-1)
                ratio = float((added / have).mean())
                near |= abs(ratio / policy.tau - 1) < 0.1
                below = below + 1 if ratio < policy.tau else 0
                have = have + added
                if below == 2:
                    kept = min(at + 128, kept)
                    break
            if kept < len(order):
                near |= energy[order[kept]] > energy[order[kept - 1]] * (1 - 2e-3)
            lists[-1].append((sorted((order[:kept] + first).tolist()), near))
    return lists


POLICIES = [
    fp.S2O(tau=0.3, segment=128, block_size=64),
    fp.S2O(tau=0.1, segment=256, share_heads=True, sink_blocks=1, window_blocks=2),
    fp.S2O(tau=0.2, segment=512, stop_rows=7, dense_tail_blocks=1, block_size=64),
    fp.S2O(tau=0.05, max_keys=200, share_heads=True, stop_rows=1000),
]


@given(
    q_len=st.integers(1, 500),
    prefix=st.sampled_from([0, 3, 300, 900]),
    group=st.sampled_from([1, 3, 4]),
    policy=st.sampled_from(POLICIES),
    seed=st.integers(0, 99),
)
def test_lists_and_attention(engine, q_len, prefix, group, policy, seed):
    k_len = q_len + prefix
    q, k, v = tensors(seed, (q_len, 2 * group, 24), (k_len, 2, 24))
    q = q + 2 * torch.randn(2 * group, 24, generator=torch.Generator().manual_seed(seed))
    mask = fp.select(q, k, policy, **engine)
    for have, want in zip(mask.keys(), expected_lists(q, k, policy), strict=True):
        for keys, (expected, near) in zip(have, want, strict=True):
            assert near or keys.tolist() == expected
            assert len(keys) <= policy.max_keys and (np.diff(keys) > 0).all()
    out, lse, stats = fp.prefill_attention(q, k, v, policy, return_lse=True, return_stats=True, **engine)
    expected, expected_lse = attention(q, k, v, kept_keys(mask, 2 * group, q_len, k_len))
    assert error(out, expected) <= TOLERANCE[torch.float32]
    assert error(lse, expected_lse) <= TOLERANCE[torch.float32]


def test_a_smaller_tau_keeps_more(engine):
    q, k, _ = tensors(5, (700, 4, 32), (1500, 2, 32))
    q = q + 1.5
    density = [fp.select(q, k, fp.S2O(tau=tau), **engine).density for tau in (0.9, 0.3, 0.1, 0.02)]
    assert density == sorted(density) and density[0] < 0.8 * density[-1]
    assert fp.select(q, k, fp.S2O(tau=0), **engine).stats.reasons == ["dense"]
    assert fp.S2O(tau=0.02, share_heads=True).text == "s2o(tau=0.02, share_heads=true)"
