"""XAttention and RRAttention on a GPU against their definition, said again with float64 products.

A mask is right if its tiles keep the forced blocks, no block before a heavier one, and as few as hold the
threshold: each to within TOLERANCE, because masses that are nearly alike may come in either order.
"""

import math

import pytest
import torch

import flashprefill as fp
from oracle import TOLERANCE, error
from test_cuda import PACKED, captured, data, pytestmark, two_paged_sequences  # noqa: F401 (marks this file too)

POLICIES = {
    "stride 16": fp.XAttention(threshold=0.7),
    "stride 8": fp.XAttention(threshold=0.8, stride=8, sink_blocks=0),
    "stride 4": fp.XAttention(threshold=0.5, stride=4, dense_tail_blocks=1, window_blocks=2),
    "stride 32": fp.XAttention(threshold=0.7, stride=32, norm=0.5),
    "stride 128": fp.XAttention(threshold=0.7, stride=128),
    "blocks of 64": fp.XAttention(threshold=0.7, block_size=64),
    "blocks of 48": fp.XAttention(threshold=0.7, block_size=48),
    "blocks of 1024": fp.XAttention(threshold=0.4, block_size=1024, stride=4, window_blocks=0),
    "corrected": fp.XAttention(threshold=0.5, mean_correction=True),
    "forced alone": fp.XAttention(threshold=0.0, window_blocks=3),
    "rr 8": fp.RRAttention(threshold=0.8),
    "rr 16": fp.RRAttention(threshold=0.6, stride=16, sink_blocks=0),
    "rr 128": fp.RRAttention(threshold=0.5, stride=128, block_size=256),
}
FEW = ("stride 16", "blocks of 48", "rr 8")


TOLERANCE_OF_MASS = 2e-3  # relative; the project's rule for 16 bits allows 1e-2


def on_device(layout):
    return {n: x.cuda() if torch.is_tensor(x) else x for n, x in layout.items()}


def padded(x, stride):
    """[heads, cells, stride, dim] of [tokens, heads, dim], zeros past the end."""
    x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -len(x) % stride))
    return x.view(-1, stride, *x.shape[1:]).permute(2, 0, 1, 3)


def masses(q, k, policy, causal=True):
    """Mass of each block for each tile of each head of a sequence, [heads, tiles, blocks]."""
    (q_len, heads, dim), (k_len, kv_heads, _), stride = q.shape, k.shape, policy.stride
    q, k, dtype = q.double(), k.double(), k.dtype
    row = torch.arange(-(-q_len // stride), device=q.device)
    if isinstance(policy, fp.XAttention):
        rows = padded(q, stride).flip(2).flatten(2)
        cells = padded(k, stride).flatten(2)
        last = ((row + 1) * stride).clamp(max=q_len)[None] - 1
        factor = dim**-0.5 / (stride * policy.norm)
    else:
        place = stride - 1 - torch.arange(heads, device=q.device)[:, None] % stride
        last = (row * stride + place).clamp(max=q_len - 1)
        rows = q[last, torch.arange(heads, device=q.device)[:, None]]
        keys = torch.full((k_len,), 1.0, device=q.device, dtype=q.dtype)[:, None, None]
        cells = padded(k, stride).sum(2) / padded(keys, stride).sum(2)
        cells = cells.to(dtype).double()  # means are rounded once
        factor = dim**-0.5
    cells = cells.repeat_interleave(heads // kv_heads, 0)
    seen = (k_len - q_len + last if causal else torch.full_like(last, k_len - 1)) // stride
    score = factor * rows @ cells.mT
    score[(torch.arange(cells.shape[1], device=q.device) > seen[..., None]) | ~score.isfinite()] = -math.inf
    share = score.softmax(-1).nan_to_num()
    tiles, blocks = -(-q_len // 128), -(-k_len // policy.block_size)
    a_tile, a_block = 128 // stride, policy.block_size // stride
    share = torch.nn.functional.pad(
        share, (0, blocks * a_block - share.shape[2], 0, tiles * a_tile - share.shape[1])
    )
    return share.view(heads, tiles, a_tile, blocks, a_block).sum((2, 4))


def check_sequence(kept, q, k, policy, thresholds, causal=True):
    """Assert that the bits [heads, tiles, blocks] of a sequence are right; counts kept and visible ones."""
    heads, tiles, blocks = kept.shape
    prefix, size = k.shape[0] - q.shape[0], policy.block_size
    begin = prefix + 128 * torch.arange(tiles, device=q.device)
    end = (begin + 128).clamp(max=k.shape[0])
    block = torch.arange(blocks, device=q.device)
    visible = block[None] <= ((end - 1) // size)[:, None]
    window = begin // size - max(0, policy.window_blocks - 1)
    if not causal:
        visible, window = torch.ones_like(visible), torch.full_like(window, blocks)
    forced = ((block[None] < policy.sink_blocks) | (block[None] >= window[:, None])) & visible
    tail = -(-policy.dense_tail_blocks * size // 128)
    chosen = tiles - tail
    if chosen <= 0 or policy.sink_blocks >= window[chosen - 1]:
        chosen = 0  # short: everything is kept
    assert (kept[:, chosen:] == visible[chosen:]).all()
    assert not (kept & ~visible).any()
    kept_of, forced, visible_of = kept[:, :chosen], forced[None, :chosen], visible[:chosen]
    assert (kept_of | ~forced).all()
    mass = masses(q, k, policy, causal)[:, :chosen]
    total = mass.sum(-1)
    first = forced if isinstance(policy, fp.XAttention) else torch.zeros_like(forced)
    inside, outside = kept_of & ~forced, ~kept_of & visible_of
    lightest = mass.masked_fill(~inside, math.inf).amin(-1)
    heaviest = mass.masked_fill(~outside, -math.inf).amax(-1)
    assert (lightest >= heaviest * (1 - TOLERANCE_OF_MASS)).all(), "a block is kept before a heavier one"
    held = (mass * (kept_of | first)).sum(-1)
    least, most = ((thresholds[:, None] + sign * TOLERANCE_OF_MASS) * total for sign in (-1, 1))
    assert ((held >= least) | ~outside.any(-1)).all(), "too little is kept"
    # Without its lightest block a tile must fall short; forced blocks of RRAttention don't count.
    if isinstance(policy, fp.XAttention):
        assert ((held - lightest < most) | lightest.isinf()).all(), "too much is kept"
    else:
        needed = (mass * (kept_of & (mass >= lightest[..., None]))).sum(-1) - lightest
        assert ((needed < most) | lightest.isinf()).all(), "too much is kept"
    return int(kept.sum()), heads * int(visible.sum())


def check_bits(q, k, policy, parts=None, **layout):
    """Check the mask of sequences `parts` ([(q, k)]; default: the only one); returns it and its density."""
    mask = fp.select(q.cuda(), k.cuda(), policy, **on_device(layout))
    thresholds = getattr(policy, "head_thresholds", None) or [policy.threshold] * q.shape[-2]
    thresholds = torch.tensor(thresholds, dtype=torch.float64, device="cuda")
    counts = [0, 0]
    for b, (one_q, one_k) in enumerate(parts or [(q, k)]):
        if len(one_q) == 0:
            continue
        kept = torch.as_tensor(mask.dense(b)).bool().cuda()
        causal = layout.get("causal", True)
        numbers = check_sequence(kept, one_q.cuda(), one_k.cuda(), policy, thresholds, causal)
        counts = [x + y for x, y in zip(counts, numbers, strict=True)]
    assert int(mask.stats.kept.sum()) == counts[0]
    host = fp.select(q, k, policy, backend="cpu", **layout)
    assert mask.stats.fallback.tolist() == host.stats.fallback.tolist()
    return mask, counts[0] / max(1, counts[1])


def check(q, k, v, policy, parts=None, **layout):
    """Check the mask, and compare prefill with select and attend; returns the density."""
    mask, density = check_bits(q, k, policy, parts, **layout)
    there, layout = [x.cuda() for x in (q, k, v)], on_device(layout)
    out, lse = fp.attend(*there, mask, return_lse=True, **layout)
    both, both_lse = fp.prefill_attention(*there, policy, return_lse=True, **layout)
    assert torch.equal(both, out)
    assert torch.equal(both_lse, lse)
    return density


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_policies(name, dtype):
    q, k, v = data(2100, 2500, 8, 2, 128, dtype)
    assert check(q, k, v, POLICIES[name]) < 0.95
    out = fp.prefill_attention(q.cuda(), k.cuda(), v.cuda(), POLICIES[name])
    mask = fp.select(q.cuda(), k.cuda(), POLICIES[name])
    host_mask = fp.select(q, k, POLICIES[name], backend="cpu")
    host_mask.bits.copy_(mask.bits.cpu())
    assert error(out.cpu(), fp.attend(q, k, v, host_mask, backend="cpu")) < TOLERANCE[dtype]


@pytest.mark.parametrize("dim", [20, 64, 80, 96, 128, 256])
def test_head_dims(dim):
    q, k, v = data(1000, 1000, 4, 2, dim, torch.bfloat16)
    for name in FEW:
        if dim % 8 == 0:
            check(q, k, v, POLICIES[name])
        else:
            check_bits(q, k, POLICIES[name])  # attend does not do it


@pytest.mark.parametrize("group", [1, 2, 3, 5, 6, 7, 8, 12])
def test_groups(group):
    inputs = data(777, 1153, 2 * group, 2, 64, torch.bfloat16)
    for name in (*FEW, "stride 4"):
        check(*inputs, POLICIES[name])


@pytest.mark.parametrize(
    "q_len, k_len",
    [(1, 1), (1, 700), (1, 4097), (127, 127), (128, 128), (129, 640), (509, 1021), (1025, 1025), (130, 9000)],
)
def test_lengths(q_len, k_len):
    inputs = data(q_len, k_len, 4, 2, 128, torch.bfloat16)
    for name in (*FEW, "stride 4", "stride 128"):
        check(*inputs, POLICIES[name])


@pytest.mark.parametrize(
    "q_len, k_len", [(700, 700), (1300, 200), (200, 1300), (1, 500), (257, 1), (300, 9000), (2048, 2048)]
)
def test_without_causal(q_len, k_len):
    """As in images, clips and encoders; more queries than keys too."""
    inputs = data(q_len, k_len, 4, 2, 128, torch.bfloat16)
    for name in ("stride 16", "stride 8", "stride 128", "blocks of 48", "blocks of 64", "corrected"):
        check(*inputs, POLICIES[name], causal=False)
    with pytest.raises(ValueError, match="causal"):
        fp.select(inputs[0].cuda(), inputs[1].cuda(), fp.RRAttention(), causal=False)


def test_without_causal_in_batches():
    q, k, v = data(1500, 2650, 4, 2, 128, torch.bfloat16)
    cu_q, cu_k = PACKED["cu_seqlens_q"], PACKED["cu_seqlens_k"]
    parts = [(q[cu_q[b] : cu_q[b + 1]], k[cu_k[b] : cu_k[b + 1]]) for b in range(4)]
    check(q, k, v, POLICIES["stride 16"], parts, causal=False, **PACKED)
    batch = [x[:1400].view(2, 700, *x.shape[1:]) for x in (q, k, v)]
    check(*batch, POLICIES["stride 16"], list(zip(batch[0], batch[1], strict=True)), causal=False)
    q, caches, layout, parts = two_paged_sequences(16)
    check(q, *caches, POLICIES["stride 16"], parts, causal=False, **layout)


def test_longer_than_a_chunk_of_tiles():
    """Enough rows for several rounds of the three kernels, and more than one key tile."""
    inputs = data(5000, 20000, 64, 8, 64, torch.bfloat16)
    for name in ("stride 4", "rr 8"):
        check(*inputs, POLICIES[name])


@pytest.mark.parametrize("name", POLICIES)
def test_packed_with_an_empty_sequence(name):
    q, k, v = data(1500, 2650, 4, 2, 128, torch.bfloat16)
    cu_q, cu_k = PACKED["cu_seqlens_q"], PACKED["cu_seqlens_k"]
    parts = [(q[cu_q[b] : cu_q[b + 1]], k[cu_k[b] : cu_k[b + 1]]) for b in range(4)]
    check(q, k, v, POLICIES[name], parts, **PACKED)


def test_rectangular_batches():
    q, k, v = data(3 * 700, 3 * 900, 4, 2, 128, torch.bfloat16)
    batch = [q.view(3, 700, 4, 128), k.view(3, 900, 2, 128), v.view(3, 900, 2, 128)]
    for name in FEW:
        check(*batch, POLICIES[name], list(zip(batch[0], batch[1], strict=True)))
        apart = [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 9)).cuda()[:, : x.shape[1]] for x in batch]
        mask = fp.select(apart[0], apart[1], POLICIES[name])
        assert torch.equal(mask.bits, fp.select(batch[0].cuda(), batch[1].cuda(), POLICIES[name]).bits)


@pytest.mark.parametrize("page", [1, 16, 24, 64, 128])
@pytest.mark.parametrize("name", [*FEW, "corrected"])
def test_pages_in_any_order(page, name):
    q, caches, layout, parts = two_paged_sequences(page)
    check(q, *caches, POLICIES[name], parts, **layout)


def test_strides_and_transposed_layouts():
    q, k, v = data(1000, 1000, 4, 2, 128, torch.bfloat16)
    fused = torch.cat([q, k, v], dim=1).cuda()
    across = [x.cuda().transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k)]
    for name in FEW:
        expected = fp.select(q.cuda(), k.cuda(), POLICIES[name]).bits
        assert torch.equal(fp.select(fused[:, :4], fused[:, 4:6], POLICIES[name]).bits, expected)
        assert torch.equal(fp.select(*across, POLICIES[name]).bits, expected)


def test_a_threshold_for_each_head():
    q, k, v = data(1500, 1500, 4, 2, 128, torch.bfloat16)
    there = [x.cuda() for x in (q, k)]
    thresholds = [0.0, 0.3, 0.6, 0.9]
    mask = fp.select(*there, fp.XAttention(head_thresholds=thresholds)).dense(0)
    for h, threshold in enumerate(thresholds):
        alone = fp.select(*there, fp.XAttention(threshold=threshold)).dense(0)
        assert (mask[h] == alone[h]).all()
    many = torch.zeros(600, 1024, 16, dtype=q.dtype, device="cuda")
    with pytest.raises(fp.UnsupportedError, match="512 query heads"):
        fp.select(many, many[:, :8], fp.XAttention(head_thresholds=[0.5] * 1024))


def test_what_is_no_number_counts_as_nothing():
    q, k, _ = data(1500, 1500, 4, 2, 128, torch.bfloat16)
    k[300, 0, 5], q[700, 1, 3], k[900, 1] = math.nan, math.inf, -math.inf
    for name in FEW:
        check_bits(q, k, POLICIES[name])
    nothing = torch.full_like(k, math.nan)
    for name in FEW:
        check_bits(q, nothing, POLICIES[name])


def test_equal_keys_are_taken_by_index():
    q, k = torch.ones(1500, 4, 64).bfloat16(), torch.ones(1500, 2, 64).bfloat16()
    for name in FEW:
        mask, _ = check_bits(q, k, POLICIES[name])
        size, bits = POLICIES[name].block_size, torch.as_tensor(mask.dense(0)).bool().cpu()
        for tile in range(bits.shape[1]):  # of whole blocks that are not forced, the first are kept
            inner = bits[:, tile, 1 : 128 * tile // size].int()
            assert (inner.diff(dim=-1) <= 0).all()


def test_the_same_bits_a_hundred_times():
    q, k, _ = (x.cuda() for x in data(4000, 4000, 8, 2, 128, torch.bfloat16))
    for name in FEW:
        first = fp.select(q, k, POLICIES[name]).bits
        for _ in range(100):
            assert torch.equal(fp.select(q, k, POLICIES[name]).bits, first)


def test_graph_replays_with_other_lengths():
    q, k, v = (x.cuda() for x in data(2400, 2400, 4, 2, 128, torch.bfloat16))
    cu = torch.tensor([0, 1000, 2400], dtype=torch.int32).cuda()
    layout = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 2400, "max_seqlen_k": 2400}
    for name in FEW:
        policy = POLICIES[name]
        out = torch.empty_like(q)
        cu[1] = 1000
        graph = captured(fp.prefill_attention, q, k, v, policy, out=out, **layout)
        for middle in (1000, 1, 2399, 1777):
            cu[1] = middle
            graph.replay()
            assert torch.equal(out, fp.prefill_attention(q, k, v, policy, **layout))
            parts = [fp.prefill_attention(*(x[part] for x in (q, k, v)), policy)
                     for part in (slice(0, middle), slice(middle, 2400))]  # fmt: skip
            assert torch.equal(out, torch.cat(parts))


def test_lengths_that_make_no_sense():
    """Whatever the device arrays hold, memory stays whole, and other sequences are as ever."""
    q, k, v = (x.cuda() for x in data(1200, 2400, 4, 2, 128, torch.bfloat16))
    cu_q = torch.tensor([0, 500, 1200], dtype=torch.int32).cuda()
    cu_k = torch.tensor([0, 1400, 2400], dtype=torch.int32).cuda()
    layout = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": 700, "max_seqlen_k": 1400}
    policy = POLICIES["stride 16"]
    expected = fp.prefill_attention(q, k, v, policy, **layout)
    used = torch.tensor([1400, 600], dtype=torch.int32).cuda()
    out, stats = fp.prefill_attention(q, k, v, policy, return_stats=True, seqused_k=used, **layout)
    assert stats.reasons == ["selected", "impossible lengths"]
    assert torch.equal(out[:500], expected[:500])
    for bad in ([0, -5, 1200], [0, 5000, 1200], [900, 100, 1200], [0, 2**31 - 1, -(2**31)]):
        cu_q.copy_(torch.tensor(bad, dtype=torch.int32))
        fp.prefill_attention(q, k, v, policy, **layout)
        fp.prefill_attention(q, k, v, POLICIES["rr 8"], **layout)
    torch.cuda.synchronize()
