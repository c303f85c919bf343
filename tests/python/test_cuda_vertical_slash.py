"""FlexPrefill and MInference on the GPU against the CPU's. Skipped, visibly, where there is no device for it.

As in test_cuda.py masks are compared through what decides: with a little less of it what is kept must be
kept, with a little more what is left out must be left out.
"""

import dataclasses
import math

import pytest
import torch

import flashprefill as fp
from flashprefill.flex_prefill import flex_prefill_attention
from oracle import TOLERANCE, error
from test_cuda import PACKED, captured, check, data, two_paged_sequences
from test_cuda import pytestmark as where_there_is_a_device

pytestmark = where_there_is_a_device

FLEX = {
    "lines": fp.FlexPrefill(gamma=0.7, tau=0.0, min_budget=128),
    "aware": fp.FlexPrefill(gamma=0.8, tau=10.0, min_budget=128),
    "both": fp.FlexPrefill(gamma=0.7, tau=0.0, min_budget=1, max_budget=700, cover="both"),
    "forced": fp.FlexPrefill(
        gamma=0.6, tau=10.0, min_budget=256, sink_blocks=2, window_blocks=2, dense_tail_blocks=2
    ),
    "corrected": fp.FlexPrefill(gamma=0.6, tau=10.0, min_budget=128, mean_correction=True),
    "blocks of 64": fp.FlexPrefill(gamma=0.8, tau=10.0, min_budget=64, block_size=64),
}
TOKENS = {
    "few": fp.MInference(vertical=40, slash=120),
    "more": fp.MInference(vertical=200, slash=300, block_size=128, sink_blocks=1, window_blocks=2),
    "corrected": fp.MInference(vertical=60, slash=150, mean_correction=True, dense_tail_blocks=1),
    "table": fp.MInference(
        heads=[("stream_llm", 100, 300), ("vertical_and_slash", 50, 150), ("vertical_and_slash", 200, 100),
               ("stream_llm", 0, 500)]
    ),
}  # fmt: skip
POLICIES = {**FLEX, **{f"MInference, {name}": policy for name, policy in TOKENS.items()}}


def moved(policy, factor):
    """The policy with a little less of what it keeps (factor above 1), or a little more."""
    fields = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}
    if isinstance(policy, fp.FlexPrefill):
        fields["gamma"] = min(1.0, fields["gamma"] / factor)
    elif policy.heads is None:
        fields["vertical"], fields["slash"] = (round(fields[name] / factor) for name in ("vertical", "slash"))
    else:
        lines = "vertical_and_slash"
        fields["heads"] = [
            (p, round(a / factor), round(b / factor)) if p == lines else (p, a, b) for p, a, b in policy.heads
        ]
    return type(policy)(**fields)


def compare(*inputs, **layout):
    """The density, if the GPU agrees with the CPU."""
    return check(*inputs, move=moved, **layout)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_policies(name, dtype):
    assert compare(*data(2100, 2500, 4, 2, 128, dtype), POLICIES[name]) < 0.6


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("name", ["lines", "aware", "MInference, few"])
def test_head_dims(dim, name):
    compare(*data(1300, 1300, 4, 2, dim, torch.bfloat16), POLICIES[name])


@pytest.mark.parametrize("group", [1, 2, 3, 5, 6, 7, 8, 12])
def test_groups(group):
    inputs = data(777, 1153, 2 * group, 2, 64, torch.bfloat16)
    for name in ("lines", "aware", "MInference, few"):
        compare(*inputs, POLICIES[name])


@pytest.mark.parametrize(
    "q_len, k_len",
    [(1, 1), (1, 700), (2, 900), (63, 700), (127, 127), (128, 128), (129, 640), (509, 1021), (1025, 1025)],
)
def test_lengths(q_len, k_len):
    inputs = data(q_len, k_len, 4, 2, 128, torch.bfloat16)
    for name in ("lines", "aware", "blocks of 64", "MInference, few", "MInference, table"):
        compare(*inputs, POLICIES[name])


@pytest.mark.parametrize("size", [16, 48, 80, 256, 1024])
def test_block_sizes(size):
    inputs = data(2500, 2600, 4, 2, 64, torch.bfloat16)
    for tau in (0.0, 10.0):
        compare(*inputs, fp.FlexPrefill(gamma=0.6, tau=tau, min_budget=size, block_size=size))
    compare(*inputs, fp.MInference(vertical=60, slash=150, block_size=size))


@pytest.mark.parametrize("name", POLICIES)
def test_packed_with_an_empty_sequence(name):
    compare(*data(1500, 2650, 4, 2, 128, torch.bfloat16), POLICIES[name], sequences=4, **PACKED)


@pytest.mark.parametrize("page", [1, 16, 24, 64, 128])
def test_pages_in_any_order(page):
    q, caches, layout, _ = two_paged_sequences(page)
    for name in ("lines", "aware", "MInference, few"):
        compare(q, *caches, POLICIES[name], sequences=2, **layout)


def foretold_distances(q, k, size):
    """By definition, of each head: how far pooled keys are from foretelling the columns of the last rows."""
    group = q.shape[1] // k.shape[1]
    n, rows = k.shape[0], min(size, q.shape[0])
    distances = []
    for head in range(q.shape[1]):
        last, keys = q[-rows:, head].double(), k[:, head // group].double()
        blocks = list(keys.split(size))
        scale = q.shape[-1] ** -0.5
        mean = last.mean(0).to(q.dtype).double()
        a = torch.stack([mean @ b.mean(0).to(k.dtype).double() * scale for b in blocks]).softmax(0)
        hidden = torch.arange(n)[None] > torch.arange(n - rows, n)[:, None]
        column = (last @ keys.T * scale).masked_fill(hidden, -math.inf).softmax(-1).mean(0)
        b = torch.stack([part.sum() for part in column.split(size)])
        m = (a + b) / 2
        distances.append(math.sqrt(float((a * (a / m).log() + b * (b / m).log()).sum() / 2)))
    return distances


def test_heads_of_both_kinds():
    """Tau in the widest gap between the heads' distances: some are query-aware, some are not."""
    q, k, v = data(3000, 3000, 8, 2, 128, torch.bfloat16)
    for h in range(8):  # heads of different sharpness
        q[:, h] *= 0.2 * (h + 1)
    d = sorted(foretold_distances(q, k, 128))
    gap = max(range(7), key=lambda i: d[i + 1] - d[i])
    compare(q, k, v, fp.FlexPrefill(gamma=0.7, tau=(d[gap] + d[gap + 1]) / 2, min_budget=128))


@pytest.mark.parametrize("name", ["aware", "lines", "MInference, few"])
def test_equal_keys(name):
    """Everything ties: the same choice each time, and about as much as the CPU chooses."""
    q, k, _ = data(1500, 1500, 4, 2, 128, torch.bfloat16)
    k[:] = k[:1]
    policy = POLICIES[name]
    first = fp.select(q.cuda(), k.cuda(), policy)
    assert torch.equal(first.bits, fp.select(q.cuda(), k.cuda(), policy).bits)
    if name == "aware":
        host = fp.select(q, k, policy, backend="cpu")
        assert abs(first.density - host.density) < 0.05


def test_a_map_of_ones():
    """Rows whose mass is all in one block: the crossing is among equals, which go by row."""
    q, k, _ = data(2560, 2560, 2, 2, 64, torch.bfloat16)
    q[:], k[:] = 0, 0
    for block in range(20):  # block r of queries sees key block r // 2 and nothing else
        k[128 * block : 128 * (block + 1), :, block] = 40
        q[128 * block : 128 * (block + 1), :, block // 2] = 40
    policy = fp.FlexPrefill(gamma=0.6, tau=10.0, min_budget=1)
    host = fp.select(q, k, policy, backend="cpu")
    assert torch.equal(fp.select(q.cuda(), k.cuda(), policy).bits.cpu(), host.bits)


def test_numbers_that_are_none():
    """Keys that are NaN or infinite speak for nobody."""
    for name in ("lines", "aware", "MInference, few"):
        q, k, v = data(1500, 1500, 4, 2, 128, torch.bfloat16)
        k[300], k[700], k[701], q[1400] = math.nan, math.inf, -math.inf, math.nan
        mask = fp.select(q.cuda(), k.cuda(), POLICIES[name])
        assert mask.density > 0
        assert torch.equal(mask.bits, fp.select(q.cuda(), k.cuda(), POLICIES[name]).bits)
    strict, loose = (
        fp.select(q, k, moved(POLICIES["MInference, few"], f), backend="cpu") for f in (1.03, 1 / 1.03)
    )
    bits, inner, outer = (torch.as_tensor(m.dense(0)).cpu().bool() for m in (mask, strict, loose))
    assert not (inner & ~bits).any() and not (bits & ~outer).any()


@pytest.mark.parametrize("name", ["lines", "aware", "corrected", "MInference, few"])
def test_the_same_bits_fifty_times(name):
    there = [x.cuda() for x in data(3000, 3000, 8, 2, 128, torch.bfloat16)]
    first = fp.select(there[0], there[1], POLICIES[name]).bits
    for _ in range(50):
        assert torch.equal(fp.select(there[0], there[1], POLICIES[name]).bits, first)


@pytest.mark.parametrize("name", ["aware", "both", "MInference, few"])
def test_graph_replays_with_other_lengths(name):
    q, k, v = (x.cuda() for x in data(2400, 2400, 4, 2, 128, torch.bfloat16))
    cu = torch.tensor([0, 1000, 2400], dtype=torch.int32).cuda()
    layout = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 2400, "max_seqlen_k": 2400}
    policy = POLICIES[name]
    out = torch.empty_like(q)
    graph = captured(fp.prefill_attention, q, k, v, policy, out=out, **layout)
    for middle in (1000, 1, 2399, 700):
        cu[1] = middle
        graph.replay()
        assert torch.equal(out, fp.prefill_attention(q, k, v, policy, **layout))
        parts = (slice(0, middle), slice(middle, 2400))
        alone = [fp.prefill_attention(q[p], k[p], v[p], policy) for p in parts]
        assert error(out.cpu(), torch.cat(alone).cpu()) < TOLERANCE[q.dtype]


@pytest.mark.parametrize("name", ["aware", "MInference, few"])
def test_impossible_lengths_are_reported(name):
    q, k, v = (x.cuda() for x in data(1200, 2400, 4, 2, 128, torch.bfloat16))
    cu_q = torch.tensor([0, 500, 1200], dtype=torch.int32).cuda()
    cu_k = torch.tensor([0, 1400, 2400], dtype=torch.int32).cuda()
    layout = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": 700, "max_seqlen_k": 1400}
    expected = fp.prefill_attention(q, k, v, POLICIES[name], **layout)
    for wrong in (600, -5, 1 << 30):
        used = torch.tensor([1400, wrong], dtype=torch.int32).cuda()
        out, stats = fp.prefill_attention(
            q, k, v, POLICIES[name], return_stats=True, seqused_k=used, **layout
        )
        assert stats.fallback.tolist() == [0, -1]
        assert torch.equal(out[:500], expected[:500])


def test_short_sequences_say_so():
    inputs = [x.cuda() for x in data(700, 700, 4, 2, 128, torch.bfloat16)]
    for policy in (fp.FlexPrefill(min_budget=700), fp.MInference()):
        out, stats = fp.prefill_attention(*inputs, policy, return_stats=True)
        assert stats.reasons == ["short"]
        dense = fp.Dense(block_size=policy.block_size)
        assert torch.equal(out, fp.prefill_attention(*inputs, dense))


def test_interleaved_heads():
    q, k, v = (x.cuda()[None] for x in data(1500, 1500, 6, 2, 64, torch.bfloat16))
    order = [0, 2, 4, 1, 3, 5]  # head h reads KV head h % 2: those of KV head 0 first
    out = flex_prefill_attention(q, k, v, 0.7, 0.0, min_budget=128, gqa_interleave=True)
    straight = flex_prefill_attention(q[:, :, order], k, v, 0.7, 0.0, min_budget=128)
    assert torch.equal(out[:, :, order], straight)


def test_keys_that_the_kernels_cannot_read_are_packed_anew():
    q, k, _ = (x.cuda() for x in data(1500, 1500, 2, 2, 64, torch.bfloat16))
    odd = torch.cat([k, k[..., :4]], -1)[..., :64]  # rows of 136 bytes
    for policy in (FLEX["lines"], TOKENS["few"]):
        assert torch.equal(fp.select(q, odd, policy).bits, fp.select(q, k, policy).bits)


@pytest.mark.parametrize("name", ["lines", "aware", "MInference, few", "MInference, more"])
def test_long(name):
    """So many tokens that several CTAs share a head's."""
    compare(*data(256, 40000, 2, 1, 128, torch.bfloat16), POLICIES[name])


def test_long_and_equal():
    """Columns that tie, in the parts of several CTAs: the first ones win."""
    q, k, _ = data(300, 40000, 2, 2, 64, torch.bfloat16)
    k[:] = 0
    mask = fp.select(q.cuda(), k.cuda(), fp.MInference(vertical=20000, slash=50))
    kept = torch.as_tensor(mask.dense(0)).cpu()
    assert kept[:, 0, :312].all() and not kept[:, 0, 313:600].any()  # 20000 tokens are 312.5 blocks of 64
