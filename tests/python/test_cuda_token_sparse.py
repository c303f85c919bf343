"""TokenSparse on a GPU: its scores are the host's, and attention over what it keeps is exact."""

import numpy as np
import pytest
import torch

import flashprefill as fp
from flashprefill._tokens import kept_tokens, scores
from oracle import TOLERANCE, error
from test_cuda import data, pytestmark  # noqa: F401 (marks this file too)
from test_token_sparse import dense_over


def test_scores_are_the_hosts():
    q, k, _ = data(900, 900, 6, 2, 64, torch.bfloat16)
    k[100, 0], k[200, 1] = float("nan"), float("inf")
    assert np.allclose(
        scores(q.cuda(), k.cuda(), 0.125, 64, 5), scores(q, k, 0.125, 64, 5), rtol=1e-3, atol=1e-9
    )


@pytest.mark.parametrize("per_kv_head", [False, True])
def test_dense_over_what_is_kept(per_kv_head):
    q, k, v = data(1200, 1200, 4, 2, 64, torch.bfloat16)
    policy = fp.TokenSparse(coverage=0.2, window=64, pool=5, min_tokens=100, per_kv_head=per_kv_head)
    there = [x.cuda() for x in (q, k, v)]
    out, lse, stats = fp.prefill_attention(*there, policy, return_lse=True, return_stats=True)
    tokens = kept_tokens(scores(*there[:2], 64**-0.5, 64, 5), policy, 2)
    expected, expected_lse = dense_over(q, k, v, tokens.tolist())
    assert error(out.cpu(), expected) < TOLERANCE[q.dtype]
    finite = expected_lse.isfinite()
    assert torch.equal(finite, lse.cpu().isfinite())
    assert (lse.cpu()[finite] - expected_lse[finite]).abs().max() < 1e-2
    assert 0 < float(np.mean(np.asarray(torch.as_tensor(stats.density).cpu()))) < 1


def test_a_policy_inside_and_a_packed_batch():
    q, k, v = data(5000, 5000, 4, 2, 64, torch.bfloat16)
    cu = torch.tensor([0, 4200, 5000], dtype=torch.int32)
    layout = {"max_seqlen_q": 4200, "max_seqlen_k": 4200}
    policy = fp.TokenSparse(fp.Sketch(mass=0.9), coverage=0.2, window=64, pool=5, min_tokens=100)
    there = [x.cuda() for x in (q, k, v)]
    out = fp.prefill_attention(*there, policy, cu_seqlens_q=cu.cuda(), cu_seqlens_k=cu.cuda(), **layout)
    alone = [
        fp.prefill_attention(*(x[part] for x in there), policy)
        for part in (slice(0, 4200), slice(4200, 5000))
    ]
    assert torch.equal(out, torch.cat(alone))
