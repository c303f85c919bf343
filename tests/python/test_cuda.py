"""The CUDA backend against the CPU's, on the same inputs. Skipped, visibly, where there is no device for it.

Outputs are compared under one mask. Masks are compared through the threshold: what is kept with a threshold
a little stricter must be kept, what is left out with one a little looser must be left out, so only energies
that near a tie may fall on either side.
"""

import dataclasses
import math
import os

import pytest
import torch

import flashprefill as fp
from oracle import TOLERANCE, error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not any(b.name == "cuda" and b.available for b in fp.backends()),
        reason="needs the CUDA backend and a GPU that it knows",
    ),
]

# Keys up to which the GPU keeps everything (src/cuda/common/heuristics.h).
TARGET = os.environ.get("FLASHPREFILL_TEST_TARGET") or next(
    (t for b in fp.backends() if b.name == "cuda" for t in b.targets), "sm90a"
)
SHORT = 2560 if TARGET.startswith("portable") else 3072

# For inputs whose keys and queries share a few directions that change along the text.
SPARSE = {
    "published": fp.FlashPrefill(alpha=0.5, window_blocks=1, sink_blocks=1, dense_tail_blocks=1),
    "pooled": fp.FlashPrefill(alpha=0.5, query_pool=16, window_blocks=2, min_blocks=2),
    "shared": fp.FlashPrefill(alpha=0.5, share_heads=True, mean_correction=True, dense_tail_blocks=0),
    "corrected": fp.FlashPrefill(alpha=0.8, mean_correction=True, sink_blocks=0, window_blocks=0),
    "sketch": fp.Sketch(mass=0.8, window_blocks=1, dense_tail_blocks=0),
    "sketch alpha": fp.Sketch(alpha=0.3, share_heads=True, outliers=2, window_blocks=1),
    "sketch gain": fp.Sketch(gain=0.05, query_metric=True, outliers=3, window_blocks=1, dense_tail_blocks=0),
    "sketch rows": fp.Sketch(alpha=0.3, query_pool=1, outliers=1, window_blocks=1),
    "pairs of rows": fp.FlashPrefill(alpha=0.5, query_pool=2, window_blocks=1),
    "streaming": fp.Streaming(sink_blocks=1, window_blocks=2, mean_correction=True),
    "blocks of 64": fp.FlashPrefill(alpha=0.5, block_size=64, query_pool=7, dense_tail_blocks=0),
    "dense": fp.Dense(),
}


def data(q_tokens, k_tokens, q_heads, kv_heads, dim, dtype, seed=0):
    """q, k, v in host memory, of about unit variance."""
    make = torch.Generator().manual_seed(seed)
    topics = torch.randn(8, dim, generator=make)
    k_topic = torch.randint(8, (math.ceil(k_tokens / 64), kv_heads), generator=make).repeat_interleave(64, 0)
    q_topic = torch.randint(8, (math.ceil(q_tokens / 200), q_heads), generator=make).repeat_interleave(200, 0)
    q = torch.randn(q_tokens, q_heads, dim, generator=make) + topics[q_topic[:q_tokens]]
    k = torch.randn(k_tokens, kv_heads, dim, generator=make) + topics[k_topic[:k_tokens]]
    v = torch.randn(k_tokens, kv_heads, dim, generator=make)
    return [(x / 2**0.5 if i < 2 else x).to(dtype) for i, x in enumerate((q, k, v))]


def moved(policy, factor):
    """The policy with its threshold made stricter (above 1) or looser."""
    fields = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}
    if fields.get("mass") is not None:
        fields["mass"] = min(1.0, fields["mass"] / factor)
    elif fields.get("gain") is not None:
        fields["gain"] = fields["gain"] * factor
    elif fields.get("alpha") is not None:
        fields["alpha"] = fields["alpha"] * factor
    return type(policy)(**fields)


PACKED = {  # four sequences, the second one empty
    "cu_seqlens_q": torch.tensor([0, 300, 300, 301, 1500], dtype=torch.int32),
    "cu_seqlens_k": torch.tensor([0, 700, 700, 1400, 2650], dtype=torch.int32),
    "max_seqlen_q": 1199,
    "max_seqlen_k": 1250,
}


def check(q, k, v, policy, sequences=1, move=moved, to_device=lambda x: x.cuda(), **layout):
    """Compare all three verbs with the CPU's; returns the density."""
    there = [to_device(x) for x in (q, k, v)]
    device_layout = {n: x.cuda() if torch.is_tensor(x) else x for n, x in layout.items()}
    mask = fp.select(there[0], there[1], policy, **device_layout)
    strict = fp.select(q, k, move(policy, 1.03), backend="cpu", **layout)
    loose = fp.select(q, k, move(policy, 1 / 1.03), backend="cpu", **layout)
    kept, visible = 0, 0
    for b in range(sequences):
        bits, inner, outer = (torch.as_tensor(m.dense(b)).cpu().bool() for m in (mask, strict, loose))
        assert not (inner & ~bits).any(), f"{int((inner & ~bits).sum())} of {inner.numel()} bits are missing"
        assert not (bits & ~outer).any(), f"{int((bits & ~outer).sum())} of {outer.numel()} bits are too many"
        kept, visible = kept + int(bits.sum()), visible + bits.numel()

    out, lse = fp.attend(*there, mask, return_lse=True, **device_layout)
    host_mask = fp.select(q, k, policy, backend="cpu", **layout)
    host_mask.bits.copy_(mask.bits.cpu())
    expected, expected_lse = fp.attend(q, k, v, host_mask, return_lse=True, backend="cpu", **layout)
    assert error(out.cpu(), expected) < TOLERANCE[q.dtype]
    finite = expected_lse.isfinite()
    assert torch.equal(finite, lse.cpu().isfinite())
    assert error(lse.cpu()[finite], expected_lse[finite]) < 1e-2

    both, both_lse, stats = fp.prefill_attention(
        *there, policy, return_lse=True, return_stats=True, **device_layout
    )
    if stats.fallback.tolist() == mask.stats.fallback.tolist():
        assert torch.equal(both, out)
        assert torch.equal(both_lse, lse)
    else:  # some sequence is too short to gain from a selection
        dense = fp.prefill_attention(q, k, v, fp.Dense(), backend="cpu", **layout)
        short = torch.as_tensor(stats.fallback).cpu() == 1
        assert (torch.as_tensor(stats.density)[short] == 1).all()
        if short.all():
            assert error(both.cpu(), dense) < TOLERANCE[q.dtype]
    return kept / max(1, visible)


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_policies(name, dtype):
    density = check(*data(2100, 2500, 8, 2, 128, dtype), SPARSE[name])
    if name != "dense":
        assert density < 0.5


@pytest.mark.parametrize("name", SPARSE)
def test_the_operator_is_select_then_attend(name):
    """Long enough that the operator selects."""
    q, k, v = (x.cuda() for x in data(4000, 4500, 16, 4, 128, torch.bfloat16))
    mask = fp.select(q, k, SPARSE[name])
    out, stats = fp.prefill_attention(q, k, v, SPARSE[name], return_stats=True)
    assert stats.fallback.tolist() == mask.stats.fallback.tolist()
    assert torch.equal(out, fp.attend(q, k, v, mask))


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("name", ["pooled", "shared", "dense"])
def test_head_dims(dim, name):
    check(*data(1000, 1000, 4, 2, dim, torch.bfloat16), SPARSE[name])


def test_sketch_with_the_largest_heads():
    """Shared memory has room for few stages of keys there: with two the kernel once waited for itself."""
    check(*data(300, 900, 4, 2, 256, torch.bfloat16), SPARSE["sketch"])


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_sketch_of_single_rows_over_several_steps(dim):
    """Warpgroups take turns at the steps of a tile: once the first waited for others that waited for it."""
    policy = fp.Sketch(mass=0.8, query_pool=1, block_size=64, dense_tail_blocks=0)
    check(*data(300, 12000, 2, 1, dim, torch.bfloat16), policy)


@pytest.mark.parametrize("group", [1, 2, 3, 5, 6, 7, 8, 12])
def test_groups(group):
    inputs = data(777, 1153, 2 * group, 2, 64, torch.bfloat16)
    for name in ("published", "shared", "sketch alpha"):
        check(*inputs, SPARSE[name])


@pytest.mark.parametrize(
    "q_len, k_len", [(1, 1), (1, 700), (127, 127), (128, 128), (129, 640), (509, 1021), (1025, 1025)]
)
def test_lengths(q_len, k_len):
    inputs = data(q_len, k_len, 4, 2, 128, torch.bfloat16)
    for name in ("published", "pooled", "shared", "dense"):
        check(*inputs, SPARSE[name])


@pytest.mark.parametrize("name", SPARSE)
def test_packed_with_an_empty_sequence(name):
    check(*data(1500, 2650, 4, 2, 128, torch.bfloat16), SPARSE[name], sequences=4, **PACKED)


def two_paged_sequences(page):
    """q, caches with pages in any order and NaN where none is used, the layout, each sequence's q and k."""
    lengths, rows = [900, 1333], [900, 600]
    pages_each = [math.ceil(n / page) for n in lengths]
    order = torch.randperm(sum(pages_each) + 3, generator=torch.Generator().manual_seed(page)).tolist()
    table = torch.zeros(2, max(pages_each), dtype=torch.int32)
    q, k, v = data(sum(rows), sum(lengths), 4, 2, 128, torch.bfloat16)
    caches = [torch.full((len(order), page, 2, 128), math.nan, dtype=q.dtype) for _ in range(2)]
    begin, parts = 0, []
    for b, n in enumerate(lengths):
        parts.append((q[sum(rows[:b]) : sum(rows[: b + 1])], k[begin : begin + n]))
        for i in range(pages_each[b]):
            table[b, i] = order.pop()
            tokens = slice(begin + i * page, begin + min(n, (i + 1) * page))
            for cache, source in zip(caches, (k, v), strict=True):
                cache[table[b, i], : tokens.stop - tokens.start] = source[tokens]
        begin += n
    layout = {
        "cu_seqlens_q": torch.tensor([0, rows[0], sum(rows)], dtype=torch.int32),
        "seqused_k": torch.tensor(lengths, dtype=torch.int32),
        "block_table": table,
        "max_seqlen_q": max(rows),
        "max_seqlen_k": max(lengths),
    }
    return q, caches, layout, parts


@pytest.mark.parametrize("page", [1, 16, 24, 64, 128])
@pytest.mark.parametrize("name", ["published", "shared", "corrected", "sketch"])
def test_pages_in_any_order(page, name):
    q, caches, layout, _ = two_paged_sequences(page)
    check(q, *caches, SPARSE[name], sequences=2, **layout)


def test_strides_of_a_fused_projection():
    q, k, v = data(1000, 1000, 4, 2, 128, torch.bfloat16)
    fused = torch.cat([q, k, v], dim=1).cuda()
    parts = [fused[:, :4], fused[:, 4:6], fused[:, 6:]]
    expected = fp.prefill_attention(q.cuda(), k.cuda(), v.cuda(), SPARSE["published"])
    assert torch.equal(fp.prefill_attention(*parts, SPARSE["published"]), expected)


def test_without_causal():
    inputs = data(700, 300, 4, 2, 128, torch.bfloat16)
    check(*inputs, fp.Dense(), causal=False)


@pytest.mark.parametrize("name", ["published", "corrected"])
def test_8bit_products(name):
    """Near the inputs' own products and not they, where there is a kernel; elsewhere the same bits."""
    there = [x.cuda() for x in data(4000, 4000, 4, 2, 128, torch.bfloat16)]
    own = fp.prefill_attention(*there, SPARSE[name])
    eight = fp.prefill_attention(*there, SPARSE[name], math="8bit")
    mask = fp.select(there[0], there[1], SPARSE[name])
    assert torch.equal(fp.attend(*there, mask, math="8bit"), eight)
    assert torch.equal(eight, own) == (TARGET != "sm90a")
    assert (eight.float() - own.float()).norm() < 0.06 * own.float().norm()
    small = [x.cuda() for x in data(700, 700, 4, 2, 64, torch.bfloat16)]
    assert torch.equal(fp.prefill_attention(*small, math="8bit"), fp.prefill_attention(*small))


def test_the_same_bits_a_hundred_times():
    there = [x.cuda() for x in data(4000, 4000, 8, 2, 128, torch.bfloat16)]
    first = fp.prefill_attention(*there, SPARSE["shared"])
    for _ in range(100):
        assert torch.equal(fp.prefill_attention(*there, SPARSE["shared"]), first)


def test_rows_never_depend_on_the_future():
    q, k, v = (x.cuda() for x in data(1000, 1000, 4, 2, 128, torch.bfloat16))
    mask = fp.select(q, k, SPARSE["published"])
    before = fp.attend(q, k, v, mask)
    k[700:], v[700:] = math.nan, 3e38
    after = fp.attend(q, k, v, mask)
    assert torch.equal(before[:700], after[:700])


def test_compiled_whole():
    policy = SPARSE["pooled"]
    there = [x.cuda() for x in data(1000, 1000, 4, 2, 128, torch.bfloat16)]
    compiled = torch.compile(lambda q, k, v: fp.prefill_attention(q, k, v, policy) * 2, fullgraph=True)
    assert torch.equal(compiled(*there), fp.prefill_attention(*there, policy) * 2)


def captured(call, *arguments, **keywords):
    """A graph of one call, which has run once before on a stream of its own."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(*arguments, **keywords)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(*arguments, **keywords)
    return graph


def test_graph_replays_with_other_lengths():
    q, k, v = (x.cuda() for x in data(9000, 9000, 4, 2, 128, torch.bfloat16))
    cu = torch.tensor([0, 4000, 9000], dtype=torch.int32).cuda()
    layout = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 9000, "max_seqlen_k": 9000}
    policy = SPARSE["shared"]
    out = torch.empty_like(q)
    graph = captured(fp.prefill_attention, q, k, v, policy, out=out, **layout)
    for middle in (4000, 1, 8999, 2500):
        cu[1] = middle
        graph.replay()
        assert torch.equal(out, fp.prefill_attention(q, k, v, policy, **layout))


def test_streams_at_once():
    sets = [[x.cuda() for x in data(4000, 4000, 4, 2, 128, torch.bfloat16, seed=i)] for i in range(4)]
    alone = [fp.prefill_attention(*one, SPARSE["published"]) for one in sets]
    streams = [torch.cuda.Stream() for _ in sets]
    torch.cuda.synchronize()
    together = []
    for one, stream in zip(sets, streams, strict=True):
        with torch.cuda.stream(stream):
            together.append(fp.prefill_attention(*one, SPARSE["published"]))
    torch.cuda.synchronize()
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b)


def test_what_it_does_not_do_it_says():
    q = torch.randn(200, 2, 64, device="cuda")
    with pytest.raises(fp.UnsupportedError, match="q.dtype"):
        fp.prefill_attention(q, q, q)
    half = q.bfloat16()
    with pytest.raises(ValueError, match="device"):
        fp.prefill_attention(half, half.cpu(), half)


def test_transformers_on_the_device():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=100, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).cuda().bfloat16().eval()
    tokens = torch.randint(0, 100, (1, 2000)).cuda()
    with torch.inference_mode():
        dense = model(tokens).logits
        fp.patch_model(model, fp.FlashPrefill(alpha=0.0))
        with fp.collect_stats(model) as stats:
            sparse = model(tokens).logits
    assert not torch.equal(sparse, dense)  # it was another kernel
    assert (sparse - dense).abs().max() < 0.1
    assert stats.density.shape[0] == 2


def test_strides_that_the_kernels_cannot_read_are_packed_anew():
    good = [x.cuda() for x in data(900, 900, 4, 2, 64, torch.bfloat16)]
    odd, across, shifted = [], [], []
    for x in good:
        odd.append(torch.cat([x, x[..., :4]], -1)[..., :64])  # rows of 136 bytes
        across.append(x.mT.contiguous().mT)  # columns far apart
        shifted.append(torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape))  # two bytes off
    assert odd[0].stride(1) == 68 and across[0].stride(2) != 1 and shifted[0].data_ptr() % 16 == 2
    for policy in (fp.Dense(), SPARSE["published"]):
        expected, lse = fp.prefill_attention(*good, policy, return_lse=True)
        mask = fp.select(*good[:2], policy)
        attended = fp.attend(*good, mask)
        for bad in (odd, across, shifted):
            out, bad_lse = fp.prefill_attention(*bad, policy, return_lse=True)
            assert torch.equal(out, expected) and torch.equal(bad_lse, lse)
            assert torch.equal(fp.select(*bad[:2], policy).bits, mask.bits)
            assert torch.equal(fp.attend(*bad, mask), attended)
            assert torch.equal(fp.prefill_attention(good[0], bad[1], good[2], policy), expected)


def test_bad_strides_are_refused_by_name():
    """Outputs, and caches, which are too large to copy."""
    good = torch.randn(300, 2, 64, device="cuda").bfloat16()
    odd = torch.randn(300, 2, 68, device="cuda").bfloat16()[..., :64]
    with pytest.raises(fp.UnsupportedError, match="out must be 16-byte aligned"):
        fp.prefill_attention(good, good, good, fp.Dense(), out=odd)
    cache = torch.randn(10, 30, 2, 64, device="cuda").bfloat16()
    odd_cache = torch.randn(10, 30, 2, 68, device="cuda").bfloat16()[..., :64]
    layout = {
        "cu_seqlens_q": torch.tensor([0, 300], dtype=torch.int32, device="cuda"),
        "seqused_k": torch.tensor([300], dtype=torch.int32, device="cuda"),
        "block_table": torch.arange(10, dtype=torch.int32, device="cuda")[None],
        "max_seqlen_q": 300,
        "max_seqlen_k": 300,
    }
    for name, caches in (("k", (odd_cache, cache)), ("v", (cache, odd_cache))):
        with pytest.raises(fp.UnsupportedError, match=f"{name} must be 16-byte aligned"):
            fp.prefill_attention(good, *caches, fp.Dense(), **layout)


@pytest.mark.parametrize("which", ["k", "v"])
def test_mixed_dtypes_are_refused_by_name(which):
    inputs = {name: torch.randn(300, 2, 64, device="cuda").bfloat16() for name in "qkv"}
    inputs[which] = inputs[which].half()
    with pytest.raises(fp.UnsupportedError, match=f"{which}.dtype"):
        fp.prefill_attention(*inputs.values(), fp.Dense())


def test_impossible_lengths_are_reported():
    """Fewer keys than rows, in device memory: that sequence is left out and said, the others are as ever."""
    q, k, v = (x.cuda() for x in data(1200, 2400, 4, 2, 128, torch.bfloat16))
    cu_q = torch.tensor([0, 500, 1200], dtype=torch.int32).cuda()
    cu_k = torch.tensor([0, 1400, 2400], dtype=torch.int32).cuda()
    layout = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": 700, "max_seqlen_k": 1400}
    expected = fp.prefill_attention(q, k, v, SPARSE["published"], **layout)
    used = torch.tensor([1400, 600], dtype=torch.int32).cuda()
    out, stats = fp.prefill_attention(
        q, k, v, SPARSE["published"], return_stats=True, seqused_k=used, **layout
    )
    assert stats.fallback.tolist() == [1, -1]
    assert stats.reasons == ["short", "impossible lengths"]
    assert "1 impossible lengths" in repr(stats)
    assert torch.equal(out[:500], expected[:500])


@pytest.mark.parametrize("tokens", [700, "most"])
def test_short_sequences_say_so(tokens):
    tokens = SHORT if tokens == "most" else tokens
    inputs = [x.cuda() for x in data(tokens, tokens, 4, 2, 128, torch.bfloat16)]
    policy = fp.FlashPrefill()
    out, stats = fp.prefill_attention(*inputs, policy, return_stats=True)
    assert stats.reasons == ["short"]
    assert torch.equal(out, fp.prefill_attention(*inputs, fp.Dense()))
    if tokens > 2000:  # a mask that was asked for is made
        assert fp.select(*inputs[:2], policy).stats.reasons == ["selected"]


@pytest.mark.parametrize("name", ["published", "shared", "sketch"])
def test_offsets_beyond_two_to_the_31_elements(name):
    """A view of a cache so large that the byte and element offsets of its end need more than 32 bits."""
    tokens, gap = 1024, 2_200_000  # tokens of distance between the two sequences: 2^31 elements and more
    q, k, v = data(2 * tokens, 2 * tokens, 8, 8, 128, torch.bfloat16)
    caches = []
    for x in (q, k, v):
        cache = torch.empty(gap + tokens, 8, 128, dtype=x.dtype, device="cuda")
        cache[:tokens], cache[gap:] = x[:tokens].cuda(), x[tokens:].cuda()
        caches.append(torch.as_strided(cache, (2, tokens, 8, 128), (gap * 1024, 1024, 128, 1)))
    assert caches[0].stride(0) > 2**31
    near = [x.view(2, tokens, 8, 128).cuda() for x in (q, k, v)]
    far_out = torch.empty_like(torch.empty(gap + tokens, 8, 128, dtype=q.dtype, device="cuda"))
    far_out = torch.as_strided(far_out, (2, tokens, 8, 128), (gap * 1024, 1024, 128, 1))
    policy = SPARSE[name]
    expected = fp.prefill_attention(*near, policy)
    assert torch.equal(fp.prefill_attention(*caches, policy), expected)
    assert torch.equal(fp.select(*caches[:2], policy).bits, fp.select(*near[:2], policy).bits)
    fp.prefill_attention(*caches, policy, out=far_out)
    assert torch.equal(far_out, expected)


@pytest.mark.parametrize("page", [16, 1])
def test_pages_beyond_two_to_the_31_elements(page):
    tokens = 1024
    q, k, v = data(tokens, tokens, 8, 8, 128, torch.bfloat16)
    count = 2_200_000 // page
    table = torch.randperm(count, generator=torch.Generator().manual_seed(1))[: tokens // page]
    table[-1] = count - 1
    caches = []
    for x in (k, v):
        cache = torch.zeros(count, page, 8, 128, dtype=x.dtype, device="cuda")
        cache[table.cuda()] = x.view(-1, page, 8, 128).cuda()
        caches.append(cache)
    assert caches[0].numel() > 2**31
    layout = {
        "cu_seqlens_q": torch.tensor([0, tokens], dtype=torch.int32).cuda(),
        "seqused_k": torch.tensor([tokens], dtype=torch.int32).cuda(),
        "block_table": table[None].int().cuda(),
        "max_seqlen_q": tokens,
        "max_seqlen_k": tokens,
    }
    for name in ("published", "corrected"):
        expected = fp.prefill_attention(q.cuda(), k.cuda(), v.cuda(), SPARSE[name])
        assert torch.equal(fp.prefill_attention(q.cuda(), *caches, SPARSE[name], **layout), expected)
        near = fp.select(q.cuda(), k.cuda(), SPARSE[name])
        assert torch.equal(fp.select(q.cuda(), caches[0], SPARSE[name], **layout).dense(), near.dense())


def test_quarter_of_a_million_tokens():
    """262,144 rows: the last tiles against the CPU, whose dense attention of all would take minutes."""
    tokens, last = 262144, 256
    q, k, v = data(tokens, tokens, 2, 1, 128, torch.bfloat16)
    there = [x.cuda() for x in (q, k, v)]
    policy = fp.FlashPrefill(alpha=0.5, query_pool=16)
    mask = fp.select(there[0], there[1], policy)
    assert mask.density < 0.2
    out, lse = fp.attend(*there, mask, return_lse=True)
    assert torch.equal(fp.prefill_attention(*there, policy), out)
    assert lse.isfinite().all()
    expected = fp.prefill_attention(q[-last:], k, v, fp.Dense(), backend="cpu")  # the dense tail
    assert error(out[-last:].cpu(), expected) < TOLERANCE[q.dtype]


def test_a_batch_of_mixed_lengths_is_its_parts():
    lengths = [5000, 64, 4097, 1, 700, SHORT, 129, SHORT + 1]
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    q, k, v = (x.cuda() for x in data(int(cu[-1]), int(cu[-1]), 8, 2, 128, torch.bfloat16))
    layout = {
        "cu_seqlens_q": cu.cuda(),
        "cu_seqlens_k": cu.cuda(),
        "max_seqlen_q": 5000,
        "max_seqlen_k": 5000,
    }
    for name in ("published", "pooled", "corrected"):
        out = fp.prefill_attention(q, k, v, SPARSE[name], **layout)
        for b in range(8):
            part = slice(int(cu[b]), int(cu[b + 1]))
            alone = fp.prefill_attention(q[part], k[part], v[part], SPARSE[name])
            assert torch.equal(out[part], alone), (name, b)


@pytest.mark.parametrize(
    "policy",
    [
        fp.Sketch(mass=1.0),
        fp.XAttention(threshold=1.0),
        fp.XAttention(head_thresholds=(1.0,) * 4),
        fp.RRAttention(threshold=1.0),
        fp.FlexPrefill(gamma=1.0),
        fp.Prism(mass=1.0),
        fp.SpargeAttn(cdf=1.0),
        fp.FlashPrefill(alpha=0.0),
    ],
    ids=str,
)
def test_a_share_of_1_keeps_everything(policy):
    make = torch.Generator("cuda").manual_seed(0)
    q, k = (torch.randn(2000, heads, 64, generator=make, device="cuda").bfloat16() * 40 for heads in (4, 2))
    assert fp.select(q, k, policy).density == 1.0
