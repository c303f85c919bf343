"""The guard on a GPU against the CPU's, for the same mask, on every target.

Both draw the same rows and add up in fp32, so recalls agree to a few units of 1e-5; what they are of the true
recall the CPU's tests say. The small cases are for compute-sanitizer too: `-k small` (CONTRIBUTING.md).
"""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch

import flashprefill as fp
from test_select import inputs, packed, paged

# The audit is one for all targets; selection and attention are not.
TARGETS = next((b.targets[:2] for b in fp.backends() if b.name == "cuda"), ()) or ("sm90a",)
RAGGED = [(100, 300), (0, 0), (1, 130), (333, 700)]
LOW = {"sink_blocks": 0, "window_blocks": 1, "dense_tail_blocks": 0}


@pytest.fixture(autouse=True)
def seed():
    """Make a case the same whichever cases run before it."""
    np.random.seed(2)


def random_mask(q, k, block_size=128, share=False, density=0.3, causal=True, **layout):
    """Return a mask on the host of blocks drawn at random, with the diagonal, and some rows of all blocks."""
    group = q.shape[-2] // k.shape[-2]
    heads, tile = (k.shape[-2], 128 // group) if share else (q.shape[-2], 128)
    lengths = lengths_of(q, k, layout)

    def keep(q_len, k_len):
        tiles, blocks = -(-q_len // tile), -(-k_len // block_size)
        kept = np.random.rand(heads, tiles, blocks) < density
        for m in range(tiles if causal else 0):
            first = k_len - q_len + m * tile
            kept[:, m, first // block_size : (first + tile) // block_size + 1] = True
        kept[:, 3::5] = True
        kept[1:2] = True  # a head that leaves nothing out
        return torch.from_numpy(kept)

    made = [keep(*pair) for pair in lengths]
    rules = {"block_size": block_size, "share_heads": share, "group": group, "causal": causal}
    if "cu_seqlens_q" in layout:
        cu_k = torch.tensor([0, *np.cumsum([k_len for _, k_len in lengths])], dtype=torch.int32)
        return fp.BlockMask.from_dense(made, cu_seqlens_q=layout["cu_seqlens_q"], cu_seqlens_k=cu_k, **rules)
    return fp.BlockMask.from_dense(made[0], q_len=lengths[0][0], k_len=lengths[0][1], **rules)


def lengths_of(q, k, layout):
    """Return the lengths of queries and keys of each sequence."""
    if "cu_seqlens_q" not in layout:
        return [(q.shape[0], k.shape[0])]
    used = layout["seqused_k"] if "seqused_k" in layout else layout["cu_seqlens_k"].diff()
    return list(zip(layout["cu_seqlens_q"].diff().tolist(), used.tolist(), strict=True))


def on_gpu(layout):
    """Return the layout with its tensors on the GPU."""
    return {n: x.cuda() if torch.is_tensor(x) else x for n, x in layout.items()}


def compare(q, k, mask, guard, target, **layout):
    """Compare the audit of a mask, of which host and GPU have a copy, and what it did to it."""
    here, there, another = (copy.deepcopy(mask).to(device) for device in ("cpu", "cuda", "cuda"))
    expected = fp.audit(q, k, here, guard, **layout)
    found = fp.audit(q.cuda(), k.cuda(), there, guard, target=target, **on_gpu(layout))
    assert found.recall.is_cuda
    assert torch.equal(found.rows_audited.cpu(), expected.rows_audited)
    for name, most in (("recall", 2e-4), ("recall_low", 2e-3), ("recall_p05", 2e-3)):
        apart = (getattr(found, name).cpu() - getattr(expected, name)).abs().max()
        assert apart <= most, (name, apart)
    apart = (found.missed_block.cpu() != expected.missed_block).sum()
    assert apart <= 0.1 * expected.missed_block.numel(), "only of two blocks that weigh the same"
    near = (expected.recall_low - guard.target).abs() < 2e-3
    assert (near | (found.outcome.cpu() == expected.outcome)).all()
    np.testing.assert_allclose(found.certificate, expected.certificate, atol=2e-4)
    np.testing.assert_allclose(found._moments.cpu(), expected._moments, rtol=2e-4)
    if not near.any():
        assert all(torch.equal(here.dense(b), there.dense(b).cpu()) for b in range(len(expected.recall)))
    again = fp.audit(q.cuda(), k.cuda(), another, guard, target=target, **on_gpu(layout))
    for name in ("_shares", "_numbers", "_moments"):
        assert torch.equal(getattr(again, name), getattr(found, name)), "other bits the second time"
    return found


def cases():
    """Return named makers of (inputs, layout, options of the mask, guard)."""
    some = fp.Guard(rows=30, seed=5, layer=2)
    made = {
        "small, plain": lambda: (inputs(300, 700), {}, {}, fp.Guard()),
        "small, ragged": lambda: (*packed(RAGGED), {"block_size": 64}, fp.Guard()),
        "small, pages of 16": lambda: (*paged(RAGGED, 16), {"block_size": 64}, fp.Guard()),
        "small, shared": lambda: (*packed(RAGGED), {"share": True, "block_size": 32}, some),
        "small, all rows": lambda: (inputs(200, 333), {}, {"block_size": 48}, fp.Guard(rows=5000)),
        "pages of 1": lambda: (*paged(RAGGED, 1), {}, some),
        "pages of 100": lambda: (*paged(RAGGED, 100), {}, some),
        "one query": lambda: (inputs(1, 900), {}, {}, some),
        "everything kept": lambda: (inputs(700, 900), {}, {"density": 1.0}, some),
        "nothing but the diagonal": lambda: (inputs(700, 900), {}, {"density": 0.0}, some),
        "rows of a chunk": lambda: (inputs(512, 8192), {}, {"density": 0.1}, fp.Guard()),
        "8K": lambda: (inputs(8192, 8192, 8, 2), {}, {"density": 0.1}, fp.Guard()),
        "not causal": lambda: (inputs(500, 900), {"causal": False}, {"causal": False}, some),
        "many rows": lambda: (inputs(4000, 4000, 8, 2), {}, {"density": 0.1}, fp.Guard(rows=3000)),
        "70000 keys": lambda: (inputs(150, 70000, 2, 1, 64), {}, {"density": 0.05}, fp.Guard(rows=20)),
    }
    for dim in (64, 80, 256):
        made[f"small, head_dim {dim}"] = lambda d=dim: (inputs(300, 900, dim=d), {}, {}, some)
        made[f"head_dim {dim}, many rows"] = lambda d=dim: (
            inputs(900, 1500, 8, 2, d), {}, {"density": 0.2}, fp.Guard(rows=100)
        )  # fmt: skip
    made["fp16"] = lambda: (inputs(700, 1300, dtype=torch.float16), {}, {}, some)
    for size in (16, 32, 48, 64, 80, 112, 208, 512, 1024):
        made[f"blocks of {size}"] = lambda s=size: (inputs(500, 2500), {}, {"block_size": s}, some)
        made[f"blocks of {size}, head_dim 256"] = lambda s=size: (
            inputs(300, 1500, 2, 1, 256), {}, {"block_size": s}, some
        )  # fmt: skip
    for group in (1, 3, 5, 7, 8, 12, 32):
        for share in (False, True):
            made[f"group {group}, shared {share}"] = lambda g=group, s=share: (
                inputs(400, 1300, 2 * g, 2, 64), {}, {"share": s}, some
            )  # fmt: skip
    return [pytest.param(make, id=name) for name, make in made.items()]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("make", cases())
def test_agrees_with_the_cpu(make, target):
    """All layouts, shapes and block sizes."""
    (q, k), layout, options, guard = make()
    mask = random_mask(q, k, **options, **{n: x for n, x in layout.items() if n != "causal"})
    compare(q, k, mask, guard, target, **layout)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("kind", ["rect", "ragged", "pages of 16", "long"])
def test_key_lists_agree_with_the_cpu(kind, share, target):
    """What lists keep counts."""
    policy = fp.Gather(gain=0.05, block_size=32, share_heads=share, sink_blocks=1, window_blocks=2)
    lengths = [(100, 300), (0, 0), (333, 1700)]
    (q, k), layout = (
        (inputs(700, 1500), {}) if kind == "rect"
        else packed(lengths) if kind == "ragged"
        else (inputs(100, 50000, 2, 1, 64), {}) if kind == "long"
        else paged(lengths, 16)
    )  # fmt: skip
    policy = dataclasses.replace(policy, dense_tail_blocks=0, segment=256)
    mask = fp.select(q.cuda(), k.cuda(), policy, target=target, **on_gpu(layout))
    with_lists = compare(q, k, mask, fp.Guard(rows=40), target, **layout)
    assert (with_lists.recall < 1).any()
    compare(q, k, mask, fp.Guard("strict", rows=40, target=0.97), target, **layout)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("block_size", [48, 80, 208])
def test_lists_beside_blocks_that_end_inside_of_a_word(block_size, target):
    """Steps then begin between the 64 keys of a word of the lists' bits."""
    q, k = inputs(300, 1700)
    policy = fp.Gather(gain=0.05, block_size=block_size, sink_blocks=1, window_blocks=1, dense_tail_blocks=0)
    found = compare(q, k, fp.select(q, k, policy), fp.Guard(rows=40), target)
    assert (found.recall < 1).any()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("goal", [0.5, 0.97, 1.0])
def test_strict_agrees_with_the_cpu(goal, target):
    """The same heads are made whole, in the mask too, and audited once more."""
    for share in (False, True):
        for make in (
            lambda: (inputs(700, 1500, 8, 2), {}),
            lambda: packed(RAGGED),
            lambda: paged(RAGGED, 16),
        ):
            (q, k), layout = make()
            mask = random_mask(q, k, 64, share, 0.7, **layout)
            compare(q, k, mask, fp.Guard("strict", goal), target, **layout)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_scores_that_are_no_numbers_count_nothing(bad, target):
    """Bad keys and queries."""
    q, k = inputs(500, 900)
    k[200], q[333, 0] = bad, bad
    compare(q, k, random_mask(q, k), fp.Guard(rows=500), target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("scale", [30.0, 1000.0])
def test_large_scores(scale, target):
    """References move, and nothing overflows."""
    q, k = inputs(500, 3000)
    compare(scale * q, k, random_mask(q, k), fp.Guard(rows=50), target)


@pytest.mark.parametrize("target", TARGETS)
def test_lengths_of_the_device_are_not_trusted(target):
    """Impossible lengths lead nowhere outside of the arrays."""
    (q, k), layout = packed(RAGGED)
    mask = random_mask(q, k, **layout).to("cuda")
    layout = on_gpu(layout)
    layout["cu_seqlens_k"][1:] = torch.tensor([10**9, -5, 7, 2**31 - 1], device="cuda", dtype=torch.int32)
    report = fp.audit(q.cuda(), k.cuda(), mask, fp.Guard(rows=64), target=target, **layout)
    assert ((report.recall >= 0) & (report.recall <= 1)).all()


# ---------------------------------------------------------------- the operator


def operands(tokens=4000, heads=8, kv_heads=2, dim=128):
    """Return q, k, v on the GPU. Queries of the upper half of the heads look at their own position alone."""
    q, k = inputs(tokens, tokens, heads, kv_heads, dim)
    q[:, heads // 2 :] = 2 * k.repeat_interleave(heads // kv_heads, 1)[:, heads // 2 :]
    v = torch.randn(tokens, kv_heads, dim, generator=torch.Generator().manual_seed(3)).bfloat16()
    return [x.cuda() for x in (q, k, v)]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "policy", [fp.FlashPrefill(alpha=0.6, **LOW), fp.Streaming(1, 2, 0)], ids=["flashprefill", "streaming"]
)
def test_strict_attends_to_the_changed_mask(policy, target):
    """Output and counts of the operator are those of audit and attend, and observing changes no bit."""
    q, k, v = operands()
    guard = fp.Guard("strict", target=0.8)
    mask = fp.select(q, k, policy, target=target)
    before = mask.stats.kept
    report = fp.audit(q, k, mask, guard, target=target)
    dense = report.outcome[0].cpu().numpy() == 3
    assert 0 < dense.sum() < len(dense), "some heads, not all"
    out, stats = fp.prefill_attention(q, k, v, policy, guard=guard, return_stats=True, target=target)
    assert torch.equal(out, fp.attend(q, k, v, mask, target=target))
    assert torch.equal(stats.guard.recall, report.recall) and torch.equal(stats.guard.outcome, report.outcome)
    kept, total = stats.kept[0], int(stats.total[0])
    assert (kept[dense] == total).all() and np.array_equal(kept[~dense], before[0][~dense])
    observed = fp.prefill_attention(q, k, v, policy, guard="observe", target=target)
    assert torch.equal(observed, fp.prefill_attention(q, k, v, policy, target=target))


REPAIRED = {
    "flashprefill": fp.FlashPrefill(alpha=0.9, query_pool=16, **LOW),
    "corrected": fp.FlashPrefill(alpha=0.9, mean_correction=True, share_heads=True, **LOW),
    "sketch": fp.Sketch(gain=0.2, **LOW),
    "xattention": fp.XAttention(threshold=0.4, **LOW),
    "xattention by head": fp.XAttention(head_thresholds=[0.3] * 4 + [0.5] * 4, **LOW),
    "flexprefill": fp.FlexPrefill(gamma=0.3, min_budget=128, **LOW),
    "gather": fp.Gather(gain=0.1, segment=256, **LOW),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", REPAIRED)
def test_repair(name, target):
    """Heads that keep too little keep more and the others what they did; as much as on the CPU."""
    policy = REPAIRED[name]
    q, k, v = operands()
    look, act = fp.Guard(rows=300, target=0.9), fp.Guard("repair", rows=300, target=0.9)
    _, before = fp.prefill_attention(q, k, v, policy, guard=look, return_stats=True, target=target)
    out, after = fp.prefill_attention(q, k, v, policy, guard=act, return_stats=True, target=target)
    repaired = (after.guard.outcome == 2)[0].cpu()
    assert torch.equal(repaired, (before.guard.outcome == 4)[0].cpu()) and 0 < repaired.sum() < 8
    kept, more = before.kept[0], after.kept[0]
    heads = np.logical_or.reduceat(repaired.numpy(), np.arange(0, 8, 8 // len(kept)))
    assert (more[heads] > kept[heads]).all() and np.array_equal(more[~heads], kept[~heads])
    gain = (after.guard.recall - before.guard.recall)[0].cpu()
    assert (gain[repaired] > 0).all()
    host = fp.prefill_attention(q.cpu(), k.cpu(), v.cpu(), policy, guard=act, return_stats=True)[1]
    apart = np.abs(host.guard.recall.numpy() - after.guard.recall.cpu().numpy()).max()
    assert apart < 0.03, "selections differ in near ties alone"
    assert abs(after.kept.sum() - host.kept.sum()) < 0.02 * host.kept.sum()
    for _ in range(3):
        assert torch.equal(out, fp.prefill_attention(q, k, v, policy, guard=act, target=target))
    dense = fp.prefill_attention(q, k, v, fp.Dense(), target=target).float()
    plain = fp.prefill_attention(q, k, v, policy, target=target).float()
    errors = [(x - dense).square().mean((0, 2)).cpu() for x in (plain, out.float())]
    assert (errors[1][repaired] < errors[0][repaired]).all()


@pytest.mark.parametrize("target", TARGETS)
def test_what_has_no_budget_becomes_dense(target):
    """Streaming repairs as strict does."""
    q, k, v = operands()
    policy = fp.Streaming(1, 2, 0)
    results = [
        fp.prefill_attention(q, k, v, policy, guard=fp.Guard(m, 0.8), target=target, return_stats=True)
        for m in ("repair", "strict")
    ]
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1].guard.outcome, results[1][1].guard.outcome)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("mode", ["observe", "strict", "repair"])
def test_a_graph_replays_with_other_inputs(mode, target):
    """A captured call audits and repairs what it finds at each replay, with the same bits every time."""
    policy, guard = fp.FlashPrefill(alpha=0.6, query_pool=16, **LOW), fp.Guard(mode, target=0.8)
    q, k, v = operands()

    def call():
        return fp.prefill_attention(q, k, v, policy, guard=guard, target=target, return_stats=True)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, stats = call()
    for factor in (1.0, 0.25, 8.0, 0.0, 1.0):
        q.mul_(factor) if factor else q.copy_(operands()[0].flip(1))
        for _ in range(3):
            out.fill_(float("nan"))
            graph.replay()
            expected, own = call()
            assert torch.equal(out, expected)
            for name in ("_shares", "_numbers", "_moments"):
                assert torch.equal(getattr(stats.guard, name), getattr(own.guard, name)), factor
    assert "recall 0." in str(stats.guard) or "1.000" in str(stats.guard)


@pytest.mark.parametrize("target", TARGETS)
def test_attention_beside_a_report_sees_its_own_mask(target):
    """Two prompts by turns, without a wait: outputs as without a guard, reports as fp.audit's."""
    policy, guard = fp.FlashPrefill(alpha=0.6, query_pool=16, **LOW), fp.Guard(rows=64)
    q, k, v = operands(8000)
    prompts = [(q.clone(), k.clone()), (q.flip(0), k.flip(0))]
    expected = [fp.prefill_attention(*prompt, v, policy, target=target) for prompt in prompts]
    audits = [fp.audit(*p, fp.select(*p, policy, target=target), guard, target=target) for p in prompts]
    found = []
    for i in range(100):
        q.copy_(prompts[i % 2][0])
        k.copy_(prompts[i % 2][1])
        out, stats = fp.prefill_attention(q, k, v, policy, guard=guard, target=target, return_stats=True)
        found.append((torch.equal(out, expected[i % 2]) if i % 10 == 9 else out, stats.guard.recall.clone()))
    for i, (out, recall) in enumerate(found):
        assert out if isinstance(out, bool) else torch.equal(out, expected[i % 2])
        assert torch.equal(recall, audits[i % 2].recall), i


def test_a_function_of_the_users_is_guarded():
    """Masks that Python makes become dense where they keep too little."""
    q, k, v = operands(1000)

    def diagonal(layer, q, k):
        return torch.eye(8, dtype=torch.bool, device=q.device).repeat(8, 1, 1)

    policy = fp.MaskPolicy(diagonal, **LOW)
    out, stats = fp.prefill_attention(q, k, v, policy, guard="repair(target=1)", return_stats=True)
    assert (stats.guard.outcome == 3).all()
    assert (out.float() - fp.prefill_attention(q, k, v, fp.Dense()).float()).abs().max() < 2e-2


def test_a_model_is_guarded():
    """patch_model takes a guard on a GPU too."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=8192, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()
    ids = torch.randint(128, (1, 4096), device="cuda")
    fp.patch_model(model, fp.Streaming(1, 2, 0), guard="observe(target=1)")
    with torch.no_grad(), fp.collect_stats(model) as stats:
        model(ids, logits_to_keep=1)
    assert stats.guard.heads == 8 and stats.guard.outcomes["low"] == 8
    assert math.isclose(stats.guard.recall, stats.recall.mean(), abs_tol=1e-4) and 0 < stats.guard.recall < 1
    fp.patch_model(model, fp.FlashPrefill(), guard=fp.Guard("repair", state=fp.GuardState()))
    with pytest.raises(fp.UnsupportedError, match="guard's state is given"):
        model(ids)


def test_refusals():
    """Levels of single heads, by name."""
    q, k, v = operands(1000)
    with pytest.raises(fp.UnsupportedError, match="guard's state is given; it must be None on a GPU"):
        fp.prefill_attention(q, k, v, fp.Sketch(), guard=fp.Guard("repair", state=fp.GuardState()))
