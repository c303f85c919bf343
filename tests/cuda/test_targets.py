"""The targets of a GPU against each other: on Hopper its own kernels, and the portable ones of other GPUs.

Masks may differ where an energy is near its threshold alone, which a share of the blocks' number bounds;
outputs under one mask agree to the dtype's rounding, and a target's bits are the same every time.
"""

import pytest
import torch

import flashprefill as fp
from attend_case import Case

TARGETS = next((b.targets for b in fp.backends() if b.name == "cuda"), ())
OTHERS = [t for t in TARGETS if t != TARGETS[0]] or ["portable"]
POLICIES = {
    "rows": fp.FlashPrefill(alpha=0.3),
    "pooled": fp.FlashPrefill(alpha=0.3, query_pool=16),
    "shared, corrected": fp.FlashPrefill(alpha=0.3, query_pool=16, share_heads=True, mean_correction=True),
    "sketch": fp.Sketch(mass=0.9),
    "sketch, rows": fp.Sketch(alpha=0.2, query_pool=1),
    "flexprefill": fp.FlexPrefill(gamma=0.9, min_budget=256),
    "minference": fp.MInference(vertical=200, slash=500),
    "xattention": fp.XAttention(threshold=0.8, stride=16),
    "rrattention": fp.RRAttention(threshold=0.8),
    "streaming": fp.Streaming(sink_blocks=1, window_blocks=3, dense_tail_blocks=1),
}
MOST_APART = 5e-3  # of the blocks that may be kept


def inputs(tokens, dim=128, dtype=torch.bfloat16):
    """Return q, k, v with topics that keys and queries share."""
    make = torch.Generator("cuda").manual_seed(tokens + dim)
    topics = torch.randn(8, dim, generator=make, device="cuda")

    def rows(heads, run):
        topic = torch.randint(8, (-(-tokens // run), heads), generator=make, device="cuda")
        noise = torch.randn(tokens, heads, dim, generator=make, device="cuda")
        return ((noise + topics[topic.repeat_interleave(run, 0)[:tokens]]) / 2**0.5).to(dtype)

    return rows(8, 200), rows(2, 64), rows(2, 64)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("target", OTHERS)
def test_masks_agree(target, name, dim):
    q, k, _ = inputs(4500, dim)
    policy = POLICIES[name]
    first = fp.select(q, k, policy, target=TARGETS[0])
    other = fp.select(q, k, policy, target=target)
    apart = (first.dense() != other.dense()).sum().item()
    assert apart <= MOST_APART * first.dense().numel() / 2, apart
    assert torch.equal(other.bits, fp.select(q, k, policy, target=target).bits)
    assert first.stats.reasons == other.stats.reasons


@pytest.mark.parametrize("correct", [False, True])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("target", OTHERS)
def test_outputs_agree(target, dim, correct):
    q, k, v = inputs(3000, dim)
    mask = fp.select(
        q, k, fp.FlashPrefill(alpha=0.3, query_pool=16, mean_correction=correct), target=TARGETS[0]
    )
    first, first_lse = fp.attend(q, k, v, mask, return_lse=True, target=TARGETS[0])
    other, lse = fp.attend(q, k, v, mask, return_lse=True, target=target)
    assert (first - other).abs().max() < 2e-2
    assert (first_lse - lse).abs().max() < 2e-3
    assert torch.equal(other, fp.attend(q, k, v, mask, target=target))


@pytest.mark.parametrize("target", TARGETS)
def test_a_graph_replays_with_other_lengths(target):
    """Lengths and masks that change between replays of a captured graph."""
    q, k, v = inputs(2000)
    cu = torch.tensor([0, 900, 2000], dtype=torch.int32, device="cuda")
    layout = {
        "cu_seqlens_q": cu,
        "cu_seqlens_k": cu,
        "max_seqlen_q": 2000,
        "max_seqlen_k": 2000,
        "target": target,
    }
    policy = fp.FlashPrefill(alpha=0.3, query_pool=16, window_blocks=1)
    out = torch.empty_like(q)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        fp.prefill_attention(q, k, v, policy, out=out, **layout)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fp.prefill_attention(q, k, v, policy, out=out, **layout)
    for middle in (900, 130, 1999):
        cu[1] = middle
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, fp.prefill_attention(q, k, v, policy, **layout)), middle


def test_more_than_2048_blocks():
    """Lists of kept blocks hold 2,048; a tile that sees more has several."""
    for target in TARGETS:
        tokens = 200
        q, k, v = (
            torch.randn(1, n, h, 64, device="cuda").bfloat16()
            for n, h in ((tokens, 2), (70000, 1), (70000, 1))
        )
        case = Case(q, k, v, block_size=16, correct=True, target=target)
        keep = torch.rand(2, 2, 4375, device="cuda") < 0.02
        for m in range(2):
            full, visible = case.full_visible(0, m)
            keep[:, m, full:visible] = True
        case.keep = [keep]
        case.prepare()
        case.launch()
        error, lse_error = case.errors()
        assert error < 1.5e-2 and lse_error < 2e-3, (target, error, lse_error)


def test_unknown_target_is_refused():
    q, k, v = inputs(300)
    with pytest.raises(fp.InvalidArgumentError, match="target is sm_75"):
        fp.prefill_attention(q, k, v, fp.Dense(), target="sm_75")


def test_a_target_is_said():
    cuda = next(b for b in fp.backends() if b.name == "cuda")
    assert "target" in cuda.description and cuda.targets[0] in ("sm90a", "portable")
    assert "portable" in cuda.targets
