"""The guard from Python: its arguments, what it finds and repairs, and states."""

import dataclasses
import json

import numpy as np
import pytest

import flashprefill as fp
from flashprefill.guard import GuardSummary, certificate, guard_of

LOW = fp.Sketch(gain=0.2, sink_blocks=0, window_blocks=1, dense_tail_blocks=0, block_size=64)


@pytest.fixture(scope="module")
def inputs():
    """Queries whose heads look at a few far keys and a little at all."""
    rng = np.random.default_rng(1)
    tokens, heads, kv_heads, dim = 1024, 4, 2, 32
    k = rng.standard_normal((tokens, kv_heads, dim)).astype(np.float32)
    q = rng.standard_normal((tokens, heads, dim)).astype(np.float32)
    v = rng.standard_normal((tokens, kv_heads, dim)).astype(np.float32)
    return 1.6 * q, k, v


def true_recall(q, k, keep, scale=None):
    """Recall of each row [heads, rows] under a dense mask [heads, tiles, blocks], in double."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    rows = []
    for head in range(q.shape[1]):
        z = scale * q[:, head].astype(float) @ k[:, head // (q.shape[1] // k.shape[1])].astype(float).T
        z = np.where(np.tril(np.ones_like(z)), z, -np.inf)
        e = np.exp(z - z.max(axis=1, keepdims=True))
        mine = np.repeat(np.repeat(keep[head], 128, axis=0), 64, axis=1)[: len(q), : len(k)]
        rows.append((e * mine).sum(axis=1) / e.sum(axis=1))
    return np.stack(rows)


def test_recall_is_the_true_one_where_all_rows_are_audited(inputs):
    q, k, _ = inputs
    mask = fp.select(q, k, LOW)
    report = fp.audit(q, k, mask, fp.Guard(rows=5000))
    true = true_recall(q, k, mask.dense())
    tiles = np.arange(8)
    sparse = np.repeat(mask.dense().sum(axis=2) < 2 * (tiles + 1), 128, axis=1)
    for head in range(4):
        assert report.rows_audited[0, head] == sparse[head].sum()
        assert report.recall[0, head] == pytest.approx(true[head][sparse[head]].mean(), abs=1e-5)
        assert report.recall_p05[0, head] == pytest.approx(
            np.quantile(true[head][sparse[head]], 0.05), abs=1e-5
        )
    assert report.recall_low == pytest.approx(report.recall)


def test_observing_changes_no_bit(inputs):
    q, k, v = inputs
    out, stats = fp.prefill_attention(q, k, v, LOW, return_stats=True)
    assert stats.guard is None
    seen, observed = fp.prefill_attention(q, k, v, LOW, guard="observe", return_stats=True)
    assert np.array_equal(out, seen)
    assert np.array_equal(stats.kept, observed.kept)
    report = fp.audit(q, k, fp.select(q, k, LOW))
    assert np.array_equal(report.recall, observed.guard.recall)
    assert (report.outcome == 4).all() and "4 of 4 heads below the target" in str(report)
    assert "recall 0." in repr(observed)


def test_repair_keeps_more_and_strict_everything(inputs):
    q, k, v = inputs
    before = fp.prefill_attention(q, k, v, LOW, guard=fp.Guard(rows=5000), return_stats=True)[1]
    after = fp.prefill_attention(q, k, v, LOW, guard=fp.Guard("repair", rows=5000), return_stats=True)[1]
    assert (after.guard.outcome == 2).all()
    assert (after.guard.recall > before.guard.recall).all()
    assert after.mean_density > before.mean_density
    out, strict = fp.prefill_attention(q, k, v, LOW, guard="strict", return_stats=True)
    assert (strict.guard.outcome == 3).all() and (strict.guard.recall == 1).all()
    assert strict.mean_density == 1
    np.testing.assert_allclose(out, fp.prefill_attention(q, k, v, fp.Dense()), atol=2e-6)


def test_same_seed_same_bits(inputs):
    q, k, _ = inputs
    mask = fp.select(q, k, LOW)
    one = fp.audit(q, k, mask, fp.Guard(seed=3), threads=1)
    assert np.array_equal(one.recall, fp.audit(q, k, mask, fp.Guard(seed=3), threads=3).recall)
    assert not np.array_equal(one.recall, fp.audit(q, k, mask, fp.Guard(seed=4)).recall)
    assert not np.array_equal(one.recall, fp.audit(q, k, mask, fp.Guard(seed=3, layer=1)).recall)


def test_masks_of_any_kind_are_audited_and_made_dense(inputs):
    q, k, _ = inputs
    keep = np.tril(np.ones((8, 8), bool), -4)[None] | np.eye(8, dtype=bool)[None]
    mask = fp.BlockMask.from_dense(np.repeat(keep, 4, axis=0), q_len=1024, k_len=1024)
    assert (fp.audit(q, k, mask).outcome == 4).all()
    with pytest.raises(fp.InvalidArgumentError, match="observe for a mask of one head"):
        fp.audit(q, k, fp.BlockMask.from_dense(keep, q_len=1024, k_len=1024), "strict")
    report = fp.audit(q, k, mask, "repair")
    assert (report.outcome == 3).all() and (report.recall == 1).all()
    assert mask.density == 1


def test_functions_of_the_users_are_guarded(inputs):
    q, k, v = inputs

    def diagonal(layer, q, k):
        return np.eye(8, dtype=bool)[None].repeat(4, axis=0)

    policy = fp.MaskPolicy(diagonal, sink_blocks=0, window_blocks=1, dense_tail_blocks=0)
    stats = fp.prefill_attention(q, k, v, policy, guard="observe", return_stats=True)[1]
    assert (stats.guard.outcome == 4).all()
    out, stats = fp.prefill_attention(q, k, v, policy, guard="repair", return_stats=True)
    assert (stats.guard.outcome == 3).all()
    np.testing.assert_allclose(out, fp.prefill_attention(q, k, v, fp.Dense()), atol=2e-6)


def test_a_state_learns_and_is_kept(inputs, tmp_path):
    q, k, v = inputs
    state = fp.GuardState()
    guard = fp.Guard("repair", target=0.5, state=state, layer=7)
    repaired = []
    for _ in range(4):
        stats = fp.prefill_attention(q, k, v, LOW, guard=guard, return_stats=True)[1]
        repaired.append(int((stats.guard.outcome == 2).sum()))
    assert repaired[0] == 4 and repaired[-1] < 4, "what was learned is used"
    assert (state.levels[7] > 0).all() and list(state.levels) == [7]
    state.save(tmp_path / "state.json")
    again = fp.GuardState.load(tmp_path / "state.json")
    np.testing.assert_allclose(again.levels[7], state.levels[7], atol=1e-4)
    for text in ("nonsense", '{"levels": {"0": [9]}}', '{"levels": {"x": [1]}}', "{}", "[]"):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(fp.InvalidArgumentError, match=r"guard's state is .*bad\.json"):
            fp.GuardState.load(tmp_path / "bad.json")
    with pytest.raises(fp.InvalidArgumentError, match="of 4 heads in layer 7"):
        fp.prefill_attention(q[:, :2], k, v, LOW, guard=guard)


def test_batches_prefixes_and_pages(inputs):
    q, k, v = inputs
    mask = fp.select(q, k, LOW)
    whole = fp.audit(q, k, mask, fp.Guard(rows=5000))
    # The same keys in pages, in another order, and the last rows behind them as a prefix.
    pages = np.random.default_rng(0).permutation(32)
    cache = np.zeros((32, 32, *k.shape[1:]), np.float32)
    cache[pages] = k.reshape(32, 32, *k.shape[1:])
    paged = {
        "cu_seqlens_q": [0, 1024],
        "block_table": pages[None],
        "seqused_k": [1024],
        "max_seqlen_k": 1024,
        "max_seqlen_q": 1024,
    }
    packed = fp.select(q, cache, LOW, **paged)
    assert np.array_equal(fp.audit(q, cache, packed, fp.Guard(rows=5000), **paged).recall, whole.recall)
    chunk = fp.select(q[512:], k, LOW)
    late = fp.audit(q[512:], k, chunk, fp.Guard(rows=5000))
    true = true_recall(q, k, np.concatenate([np.zeros((4, 4, 16), bool), chunk.dense()], axis=1))[:, 512:]
    np.testing.assert_allclose(late.recall[0], true.mean(axis=1), atol=1e-5)
    both = fp.audit(np.stack([q, q]), np.stack([k, k]), fp.select(np.stack([q, q]), np.stack([k, k]), LOW))
    assert both.recall.shape == (2, 4)
    assert not np.array_equal(both.recall[0], both.recall[1]), "sequences draw rows of their own"
    heads_first = fp.audit(q.swapaxes(0, 1), k.swapaxes(0, 1), mask, fp.Guard(rows=5000), layout="bhtd")
    assert np.array_equal(heads_first.recall, whole.recall)


def test_rows_by_default():
    q = np.ones((1024, 1, 8), np.float32)
    policy = dataclasses.replace(LOW, gain=0.9)
    assert fp.audit(q, q, fp.select(q, q, policy)).rows_audited[0, 0] == 32
    assert fp.audit(q[:512], q, fp.select(q[:512], q, policy)).rows_audited[0, 0] == 16, "half of the prompt"
    assert fp.audit(q[:64], q, fp.select(q[:64], q, policy)).rows_audited[0, 0] == 8


def test_texts():
    assert guard_of(None) is None
    assert guard_of("observe") == fp.Guard()
    assert guard_of(" Repair(target=0.95, rows=64, seed=3) ") == fp.Guard("repair", 0.95, 64, 3)
    assert json.loads(guard_of("strict").text)["mode"] == 2
    for text, message in (
        ("guess", "guard's mode is 'guess'; it must be one of observe, repair, strict"),
        ("repair(target=2)", "guard's target is 2; it must be above 0 and at most 1"),
        ("repair(0.9)", "guard is 'repair"),
        ("repair(", "guard is 'repair"),
        ("repair(state=1)", "guard is 'repair"),
        ("repair(goal=1)", "guard is 'repair"),
        ("repair(rows=-1)", "guard's rows is -1"),
        ("repair(rows=1.5)", "guard's rows is 1.5"),
    ):
        with pytest.raises((fp.InvalidArgumentError, fp.ArgumentTypeError)) as refusal:
            guard_of(text)
        assert message in str(refusal.value)
    with pytest.raises(fp.ArgumentTypeError, match="guard is 3; it must be a Guard, a text of one, or None"):
        fp.prefill_attention(*[np.ones((8, 1, 8), np.float32)] * 3, guard=3)
    with pytest.raises(fp.ArgumentTypeError, match="guard"):
        guard_of(fp.Guard(state=3))


def test_certificates(inputs):
    q, k, _ = inputs
    report = fp.audit(q, k, fp.select(q, k, LOW), fp.Guard(rows=200))
    one = report.certificate[0]
    assert 0 < one < report.recall.mean()
    both = GuardSummary.of([report, report])
    assert one < both.certificate < both.recall, "more rows, closer bound"
    assert both.heads == 8
    values = np.array([1.0, 0.9] * 2000)
    log = np.log(2000)
    wanted = 0.95 - np.sqrt(2 * values.var(ddof=1) * log / 4000) - 7 * log / (3 * 3999)
    assert certificate(np.array([4000, values.sum(), (values**2).sum()]), 1e-3) == pytest.approx(wanted)


def test_torch_and_compile(inputs):
    torch = pytest.importorskip("torch")
    q, k, v = map(torch.from_numpy, inputs)
    expected = fp.prefill_attention(*inputs, LOW, guard="repair", return_stats=True)[1].guard
    out, stats = fp.prefill_attention(q, k, v, LOW, guard="repair", return_stats=True)
    assert isinstance(stats.guard.recall, torch.Tensor)
    np.testing.assert_array_equal(stats.guard.recall.numpy(), expected.recall)

    def attend(q, k, v):
        return fp.prefill_attention(q, k, v, LOW, guard=repair)

    repair = fp.Guard("repair")
    assert torch.equal(torch.compile(attend, fullgraph=True, backend="aot_eager")(q, k, v), out)
    state = fp.GuardState()
    fp.prefill_attention(q, k, v, LOW, guard=fp.Guard("repair", state=state))
    assert (state.levels[0] == 1).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(inputs, dtype):
    torch = pytest.importorskip("torch")
    q, k, v = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in inputs)
    mask = fp.select(q, k, LOW)
    report = fp.audit(q, k, mask, fp.Guard(rows=300))
    wide = fp.audit(q.float(), k.float(), mask, fp.Guard(rows=300))
    np.testing.assert_allclose(report.recall, wide.recall, atol=1e-5)


def test_a_needle_that_means_hide_is_found_by_a_repair():
    """One key that some rows look for, in a block of a small mean, and decoys whose mean is larger."""
    rng = np.random.default_rng(0)
    u = np.eye(32, dtype=np.float32)[0]
    k = 0.05 * rng.standard_normal((1024, 1, 32)).astype(np.float32)
    v = rng.standard_normal((1024, 1, 32)).astype(np.float32)
    q = 0.05 * rng.standard_normal((1024, 1, 32)).astype(np.float32)
    k[70, 0], k[256:320, 0] = 10 * u, k[256:320, 0] + 0.5 * u
    q[640:768, 0] += 6.8 * u
    policy = fp.FlashPrefill(alpha=0.95, sink_blocks=0, window_blocks=1, dense_tail_blocks=0, block_size=64)
    dense = fp.prefill_attention(q, k, v, fp.Dense())[640:768]
    missed, seen = fp.prefill_attention(q, k, v, policy, guard=fp.Guard(rows=5000), return_stats=True)
    assert seen.guard.missed_block[0, 0] == 1 and seen.guard.recall_p05[0, 0] < 0.01
    found, stats = fp.prefill_attention(q, k, v, policy, guard="repair", return_stats=True)
    assert stats.guard.outcome[0, 0] == 2
    assert np.abs(missed[640:768] - dense).max() > 1
    assert np.abs(found[640:768] - dense).max() < 0.05
