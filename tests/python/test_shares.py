"""A share of 1 keeps everything, also blocks whose estimated mass underflows to 0."""

import numpy as np
import pytest

import flashprefill as fp

WHOLE = [
    fp.Sketch(mass=1.0, block_size=32),
    fp.XAttention(threshold=1.0, block_size=32),
    fp.XAttention(head_thresholds=(1.0, 1.0), block_size=32),
    fp.RRAttention(threshold=1.0, block_size=32),
    fp.FlexPrefill(gamma=1.0, block_size=32, min_budget=32),
    fp.FlexPrefill(gamma=1.0, tau=0.0, block_size=32, min_budget=32),
    fp.Prism(mass=1.0, block_size=32),
    fp.SampleAttention(coverage=1.0, block_size=32),
    fp.SpargeAttn(cdf=1.0, block_size=32),
    fp.SpargeAttn(topk=1.0, block_size=32),
    fp.FlashPrefill(alpha=0.0, block_size=32),
]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("policy", WHOLE, ids=str)
def test_a_share_of_1_keeps_everything(policy, backend):
    random = np.random.default_rng(0)
    q, k = (random.standard_normal((600, 2, 32), dtype=np.float32) * 40 for _ in range(2))  # exponents to 1e4
    mask = fp.select(q, k, policy, backend=backend)
    assert mask.density == 1.0
