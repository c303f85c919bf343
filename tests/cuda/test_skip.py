"""Attention that skips keys on a GPU (Dense(skip=...), SpargeAttn): the rule, against the reference.

Weights are powers of 4 or 2 and the threshold lies between two of them, so that nothing is decided by
rounding; what is skipped must then be equal, blocks and all. With other inputs the bound must hold. The small
cases are for compute-sanitizer as well: `-k small` (CONTRIBUTING.md).
"""

import math
import os

import numpy as np
import pytest
import torch

import flashprefill as fp

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
PORTABLE = not HOPPER or os.environ.get("FLASHPREFILL_TEST_TARGET", "sm90a") != "sm90a"
BF16, F16 = torch.bfloat16, torch.float16
SKIP = 2**-4.5
MIXED = [(9, 700), (0, 5), (1, 400), (333, 900), (128, 128), (3, 3)]


def inputs(q_tokens, k_tokens, dim=64, group=2, kv_heads=1, dtype=BF16, run=100):
    """Return q, k, v in host memory whose weights are powers of 2, equal for `run` neighbouring keys."""
    make = torch.Generator().manual_seed(q_tokens + k_tokens + dim + group)
    q = torch.zeros(q_tokens, group * kv_heads, dim)
    k = torch.zeros(k_tokens, kv_heads, dim)
    q[..., 3] = torch.randint(3, q.shape[:2], generator=make) / 2
    level = torch.randint(7, (math.ceil(k_tokens / run), kv_heads), generator=make)
    level *= torch.rand(level.shape, generator=make) < 0.4
    level[0] = 6
    k[..., 3] = (level * math.log(4)).repeat_interleave(run, 0)[:k_tokens]
    v = torch.randn(k.shape, generator=make)
    return [x.to(dtype) for x in (q, k, v)]


def packed(lengths, dim=64, **more):
    """Return inputs and layout of packed sequences of these lengths of queries and keys."""
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).to(torch.int32) for x in zip(*lengths, strict=True))
    layout = {
        "cu_seqlens_q": cu_q,
        "cu_seqlens_k": cu_k,
        "max_seqlen_q": max(q for q, _ in lengths),
        "max_seqlen_k": max(k for _, k in lengths),
    }
    return inputs(int(cu_q[-1]), int(cu_k[-1]), dim, **more), layout


def paged(lengths, page, dim=64):
    """Return the same with keys in pages, in falling order."""
    (q, _, _), layout = packed(lengths, dim)
    most = math.ceil(max(k for _, k in lengths) / page)
    _, k, v = inputs(1, len(lengths) * most * page, dim)
    del layout["cu_seqlens_k"]
    layout["seqused_k"] = torch.tensor([k_len for _, k_len in lengths], dtype=torch.int32)
    layout["block_table"] = (
        torch.arange(len(lengths) * most, dtype=torch.int32).flip(0).view(len(lengths), most)
    )
    return [q, *(x.view(-1, page, *x.shape[1:]) for x in (k, v))], layout


def both(make, density=1.0, **policy):
    """Return (out, lse, mask) of a GPU and of the reference, over equal random bits."""
    tensors, layout = make()
    there = {n: x.cuda() if torch.is_tensor(x) else x for n, x in layout.items()}
    policy = fp.Dense(skip=SKIP, **policy)
    mask = fp.select(*tensors[:2], policy, backend="reference", softmax_scale=1.0, **layout)
    if density < 1:
        chosen = np.random.default_rng(1).random((*mask.bits.shape, 64)) < density
        words = np.packbits(chosen, axis=-1, bitorder="little").view(np.int64)[..., 0]
        mask.bits &= torch.from_numpy(words)
    mask.skipped.fill_(0)
    own = mask.to("cuda")
    call = {"return_lse": True, "softmax_scale": 1.0}
    expected = fp.attend(*tensors, mask, backend="reference", **call, **layout)
    tensors = [x.cuda() for x in tensors]
    if not layout:  # so that each tile is seen to be written
        own.skipped[:, : -(-len(tensors[0]) // own.tile_tokens)] = -7
    found = fp.attend(*tensors, own, **call, **there)
    again = fp.attend(*tensors, own, **call, **there)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    return (*(x.cpu().float() for x in found), own.skipped.cpu()), (
        *(x.float() for x in expected),
        mask.skipped,
    )


def agree(make, **more):
    """Compare a GPU with the reference."""
    (out, lse, skipped), (expected, expected_lse, expected_skipped) = both(make, **more)
    assert torch.equal(skipped, expected_skipped)
    finite = torch.isfinite(expected_lse)
    assert torch.equal(finite, torch.isfinite(lse))
    assert (lse - expected_lse)[finite].abs().max() < 2e-3
    assert (out - expected).abs().max() < 2e-2
    return skipped


SMALL = {
    "plain": (lambda: (inputs(300, 1100, 128, 2, 2), {}), {}),
    "head_dim 64, fp16": (lambda: (inputs(200, 500, 64, dtype=F16), {}), {}),
    "shared": (lambda: (inputs(150, 400, group=3), {}), {"share_heads": True}),
    "packed": (lambda: packed(MIXED), {}),
    "pages of 16": (lambda: paged(MIXED, 16), {}),
    "half of the blocks": (lambda: (inputs(300, 1200), {}), {"density": 0.5, "block_size": 32}),
}
CASES = {
    **{f"blocks of {n}": (lambda: (inputs(500, 1300), {}), {"block_size": n}) for n in (16, 48, 64, 256)},
    **{
        f"blocks of {n}, some": (lambda: packed(MIXED), {"block_size": n, "density": 0.6})
        for n in (16, 32, 48, 64, 128, 256)
    },
    **{f"pages of {n}": (lambda n=n: paged(MIXED, n), {"density": 0.7}) for n in (1, 8, 32, 64, 128, 256)},
    **{f"head_dim {d}": (lambda d=d: (inputs(300, 700, d), {}), {}) for d in (8, 40, 96, 128)},
    **{
        f"groups of {g}": (lambda g=g: (inputs(300, 700, group=g), {}), {"share_heads": True, "density": 0.7})
        for g in (1, 2, 4, 5, 8)
    },
    "runs of 128": (lambda: (inputs(512, 2048, 128, run=128), {}), {}),
    "runs of 1": (lambda: (inputs(512, 1024, run=1), {}), {}),
    "little is kept": (lambda: (inputs(512, 3000), {}), {"density": 0.02, "block_size": 32}),
    "2,000 blocks": (lambda: (inputs(130, 32000, 64, 1, 1), {}), {"density": 0.1, "block_size": 16}),
    "many tiles": (lambda: (inputs(2048, 2048, 64, 8, 2, run=128), {}), {}),
}


@pytest.mark.parametrize("name", SMALL)
def test_small(name):
    """The rule in every layout."""
    make, more = SMALL[name]
    assert agree(make, **more).max() > 0


@pytest.mark.parametrize("name", CASES)
def test_equals_reference(name):
    """Blocks of all sizes, pages, groups; what tiles skip is counted as the reference counts."""
    make, more = CASES[name]
    agree(make, **more)


def test_many_blocks():
    """2,500: more than the portable kernels' list of a tile holds."""

    def make():
        return inputs(130, 40000, 64, 1, 1), {}

    if PORTABLE:
        with pytest.raises(fp.UnsupportedError, match="at most 2048 blocks per sequence"):
            agree(make, density=0.1, block_size=16)
    else:
        agree(make, density=0.1, block_size=16)


def test_skips_nothing_where_nothing_is_small():
    """Equal keys weigh the same: the output is that of dense attention, whose kernel is another."""
    q, k, v = (x.cuda() for x in inputs(700, 1500))
    k[...] = 1
    plain, lse = fp.prefill_attention(q, k, v, "dense", return_lse=True)
    out, its_lse, stats = fp.prefill_attention(
        q, k, v, fp.Dense(skip=0.9), return_lse=True, return_stats=True
    )
    assert (plain.float() - out.float()).abs().max() < 1e-2 and (lse - its_lse).abs().max() < 1e-4
    assert int(torch.as_tensor(stats.skipped).sum()) == 0


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("skip", [1e-5, 1e-3, 0.1, 0.9])
def test_the_bound(skip, causal):
    """No row loses more than docs/methods/dense.md allows, whatever the input is."""
    make = torch.Generator("cuda").manual_seed(3)
    q, k, v = (
        torch.randn(n, h, 128, generator=make, device="cuda").bfloat16()
        for n, h in ((777, 4), (3001, 2), (3001, 2))
    )
    q = q * 3
    exact, exact_lse = fp.prefill_attention(q, k, v, "dense", return_lse=True, causal=causal)
    out, lse, stats = fp.prefill_attention(
        q, k, v, fp.Dense(skip=skip), return_lse=True, return_stats=True, causal=causal
    )
    lost = (exact_lse - lse).double()
    assert lost.min() > -1e-3 and lost.max() < math.log1p(3001 * skip) + 1e-3
    share = 3001 * skip / (1 + 3001 * skip)
    reach = (v.float().amax(0) - v.float().amin(0)).repeat_interleave(2, 0)
    assert ((exact.float() - out.float()).abs() <= share * reach[None] + 2e-2).all()
    assert skip < 0.1 or int(torch.as_tensor(stats.skipped).sum()) > 0


@pytest.mark.parametrize("correct", [False, True])
def test_sparge_attn_skips_among_the_blocks_it_keeps(correct):
    """Both of its stages; means of the blocks left out count, and are never skipped."""
    q, k, v = inputs(300, 4000)  # more keys than prefill keeps whole
    policy = fp.SpargeAttn(cdf=0.9, similarity=0.1, skip=SKIP, mean_correction=correct)
    mask = fp.select(q.cuda(), k.cuda(), policy, softmax_scale=1.0)
    on_cpu = mask.to("cpu")
    out, lse = fp.attend(q.cuda(), k.cuda(), v.cuda(), mask, return_lse=True, softmax_scale=1.0)
    other, other_lse = fp.attend(q, k, v, on_cpu, return_lse=True, softmax_scale=1.0, backend="reference")
    assert (lse.cpu() - other_lse).abs().max() < 2e-3
    assert (out.cpu().float() - other.float()).abs().max() < 2e-2
    assert torch.equal(mask.skipped.cpu(), on_cpu.skipped) and int(mask.skipped.sum()) > 0
    whole = fp.prefill_attention(q.cuda(), k.cuda(), v.cuda(), policy, softmax_scale=1.0)
    assert torch.equal(whole, out)


def test_a_graph_replays():
    """Captured, with other keys at each replay; equal bits."""
    q, k, v = (x.cuda() for x in inputs(1000, 3500))
    policy = fp.Dense(skip=SKIP)
    out = torch.empty_like(q)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        fp.prefill_attention(q, k, v, policy, out=out, softmax_scale=1.0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fp.prefill_attention(q, k, v, policy, out=out, softmax_scale=1.0)
    for shift in (0, 500, 1111):
        k.copy_(k.roll(shift, 0))
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, fp.prefill_attention(q, k, v, policy, softmax_scale=1.0))


def test_refusals():
    """What the kernel has not, in words."""
    q, k, v = (x.cuda() for x in inputs(300, 600, 192))
    with pytest.raises(fp.UnsupportedError, match="head_dim of at most 128 in masks that skip"):
        fp.prefill_attention(q, k, v, fp.Dense(skip=0.1))
