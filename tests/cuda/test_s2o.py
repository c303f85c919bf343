"""S2O's selection on a GPU, against the reference and by hand. How lists are attended to: test_gather.py.

Keys are ranked by energies of 16 bits, so that near ties come in any order and a group of 128 may have
another last key; where a ratio is near tau, a list may be a group longer or shorter. So lists are compared
through a tau a little larger and smaller. The small cases are for compute-sanitizer as well: `-k small`.
"""

import dataclasses
import math
import os

import pytest
import torch

import flashprefill as fp
from test_gather import LENGTHS, bits_of, lists_of, seed  # noqa: F401 (a fixture)
from test_select import F16, inputs, packed
from test_select import paged as paged_inputs

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
TARGET = os.environ.get("FLASHPREFILL_TEST_TARGET", "sm90a")
pytestmark = pytest.mark.skipif(not HOPPER or TARGET != "sm90a", reason="S2O selects on Hopper")

BASE = {"sink_blocks": 1, "window_blocks": 2, "dense_tail_blocks": 0, "block_size": 32}
POLICIES = {
    "plain": fp.S2O(tau=0.1, segment=256),
    "authors' order of things": fp.S2O(),
    "a list per KV head": fp.S2O(tau=0.1, segment=256, share_heads=True, **BASE),
    "few rows": fp.S2O(tau=0.2, stop_rows=1, segment=384, **BASE),
    "all rows": fp.S2O(tau=0.1, stop_rows=1000, segment=128, **BASE),
    "more rows than a panel": fp.S2O(tau=0.1, stop_rows=100, segment=256, share_heads=True, **BASE),
    "segments of a tile": fp.S2O(tau=0.1, segment=1, **BASE),
    "it stops at once": fp.S2O(tau=0.99, segment=256, **BASE),
    "it never stops": fp.S2O(tau=1e-9, segment=256, **BASE),
    "dense tail": fp.S2O(tau=0.1, segment=300, **{**BASE, "dense_tail_blocks": 5}),
    "blocks of 48, no sink": fp.S2O(tau=0.1, **{**BASE, "block_size": 48, "sink_blocks": 0}),
    "full lists": fp.S2O(tau=1e-6, max_keys=200, **BASE),
}


def differences(policy, q, k, sequences=1, **layout):
    """Return how the GPU's mask differs from the reference's, in words, or nothing."""
    there = {n: x.cuda() if torch.is_tensor(x) else x for n, x in layout.items()}
    masks = [fp.select(q.cuda(), k.cuda(), policy, **there) for _ in range(2)]
    exact, strict, loose = (
        fp.select(
            q, k, dataclasses.replace(policy, tau=min(0.999, policy.tau * f)), backend="reference", **layout
        )
        for f in (1.0, 1.05, 1 / 1.05)
    )
    found, again, inner, outer = (lists_of(m, sequences) for m in (*masks, strict, loose))
    wrong = []
    missing = sum(len(a - b) for a, b in zip(inner, found, strict=True))
    extra = sum(len(a - b) for a, b in zip(found, outer, strict=True))
    most = 0.02 * sum(map(len, outer)) + 2 * len(outer)
    if found != again:
        wrong.append("lists changed")
    if missing > most or extra > most:
        wrong.append(f"{missing} keys missing, {extra} too many, of {sum(map(len, found))}")
    for b in range(sequences):
        for head in masks[0].keys(b):
            if any(list(one) != sorted(set(one.tolist())) for one in head):
                wrong.append("lists out of order")
        if not torch.equal(*(bits_of(m, b) for m in (masks[0], exact))):
            wrong.append(f"bits of sequence {b}")
    return ", ".join(wrong)


def cases():
    """Return named makers of (policy, inputs, layout)."""
    made = {}
    for name, policy in POLICIES.items():
        made[name] = lambda p=policy: (p, inputs(1000, 1500, dim=64), {})
    for name in ("plain", "a list per KV head"):
        made[f"{name}, packed"] = lambda p=POLICIES[name]: (p, *packed(LENGTHS, dim=64))
    main = POLICIES["plain"]
    for page in (16, 1):
        made[f"pages of {page}"] = lambda page=page: (main, *paged_inputs(LENGTHS, page, dim=64))
    for dim in (80, 128, 256):
        made[f"head_dim {dim}"] = lambda dim=dim: (main, inputs(500, 1300, dim=dim), {})
    made["fp16"] = lambda: (main, inputs(500, 1300, dim=64, dtype=F16), {})
    for group in (1, 3, 7):
        made[f"group {group}"] = lambda group=group: (
            POLICIES["a list per KV head"],
            inputs(300, 1300, 2 * group, 2, 64),
            {},
        )
    made["more keys than a bitmap"] = lambda: (fp.S2O(tau=0.02, **BASE), inputs(200, 140000, 2, 1, 64), {})
    made["long"] = lambda: (fp.S2O(tau=0.02, **BASE), inputs(200, 20000, 2, 1, 64), {})
    return [pytest.param(make, id=name) for name, make in made.items()]


@pytest.mark.parametrize("name", ["plain", "a list per KV head"])
def test_small(name):
    """Few tokens."""
    assert differences(POLICIES[name], *inputs(300, 900, dim=64)) == ""


@pytest.mark.parametrize("make", cases())
def test_selection_equals_reference(make):
    """Keys equal but for near ties, equal bits, ascending, all layouts."""
    policy, (q, k), layout = make()
    assert differences(policy, q, k, len(LENGTHS) if layout else 1, **layout) == ""


def by_hand(group=1):
    """128 queries after 512 keys whose weights are by 128 keys 1, 64, 16, 4; the segment's own weigh 64."""
    q, k = torch.zeros(128, group, 8), torch.zeros(640, 1, 8)
    q[..., 0] = 1
    k[:, 0, 0] = torch.tensor([1, 64, 16, 4, 64]).log().repeat_interleave(128)
    return q.bfloat16().cuda(), k.bfloat16().cuda()


@pytest.mark.parametrize(
    "policy, first, last, wanted",
    [
        # One row, the last, has its own 128 keys: 8192. In order the groups add 8192, 2048, 512 and 128:
        #     8192 / 8192 = 1    2048 / 16384 = 0.125    512 / 18432 = 0.0278    128 / 18944 = 0.00676
        # Both groups that stop it are kept.
        (fp.S2O(tau=0.2, stop_rows=1), 128, 512, 384),
        (fp.S2O(tau=0.1, stop_rows=1), 0, 512, 512),
        (fp.S2O(tau=0.005, stop_rows=1), 0, 512, 512),
        # Two rows are 63 and 127. The first has 4096 at first: 2 and 1, then 2048 / 12288 = 0.167 and 0.125,
        # 0.146 on average; 0.0357 and 0.0278.
        (fp.S2O(tau=0.16, stop_rows=2), 128, 512, 384),
        (fp.S2O(tau=0.13, stop_rows=2), 0, 512, 512),
        # A full list holds the best, and wants one more at least; it may stop in time.
        (fp.S2O(tau=0.05, stop_rows=1, max_keys=256), 128, 384, 257),
        (fp.S2O(tau=0.2, stop_rows=1, max_keys=384), 128, 512, 384),
    ],
)
def test_by_hand(policy, first, last, wanted):
    """As src/methods/s2o/s2o_test.cc has it."""
    q, k = by_hand()
    mask = fp.select(q, k, dataclasses.replace(policy, block_size=64), softmax_scale=1.0)
    assert mask.keys()[0][0].tolist() == list(range(first, last))
    assert mask.key_lists[0, 0, :2].tolist() == [last - first, wanted]


def test_an_order_per_query_head():
    """Of a head that sees all keys alike they come by their indices, and add 128 to 128, 256, 384, 512."""
    q, k = by_hand(2)
    q[:, 1] = 0
    for tau, head, keys in ((0.6, 1, (0, 384)), (0.4, 1, (0, 512)), (0.2, 0, (128, 512))):
        mask = fp.select(q, k, fp.S2O(tau=tau, stop_rows=1, block_size=64), softmax_scale=1.0)
        assert mask.keys()[head][0].tolist() == list(range(*keys)), tau


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_scores_that_are_no_numbers_count_for_nothing(bad):
    """One bad key is in no list, and the others are as without it."""
    q, k = inputs(500, 1300, dim=64)
    k[200] = bad
    assert differences(POLICIES["plain"], q, k) == ""


def test_prefill_equals_select_and_attend():
    """The operator's bits are those of its parts, in a graph too, with other keys at a replay."""
    q, k = (x.cuda() for x in inputs(4500, 4500, 8, 2))
    v = torch.randn_like(k)
    policy = fp.S2O(tau=0.1)
    out = fp.prefill_attention(q, k, v, policy)
    assert torch.equal(out, fp.attend(q, k, v, fp.select(q, k, policy)))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        fp.prefill_attention(q, k, v, policy, out=out)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fp.prefill_attention(q, k, v, policy, out=out)
    for shift in (0, 777):
        k.copy_(k.roll(shift, 0))
        out.fill_(math.nan)
        graph.replay()
        assert torch.equal(out, fp.prefill_attention(q, k, v, policy))


def test_refusals():
    """What the kernels have not, in words."""
    q, k = (x.cuda() for x in inputs(3000, 3000, 8, 1, 64))
    with pytest.raises(fp.UnsupportedError, match="stop_rows times the query heads"):
        fp.select(q, k, fp.S2O(stop_rows=512, share_heads=True))
    q, k = (x.cuda() for x in inputs(300, 40000, 2, 1, 64))
    with pytest.raises(fp.UnsupportedError, match="fewer max_keys on this GPU"):
        fp.select(q, k, fp.S2O(max_keys=40000))
    with pytest.raises(fp.UnsupportedError, match="S2O selects on Hopper"):
        fp.select(q, k, fp.S2O(), target="portable")
