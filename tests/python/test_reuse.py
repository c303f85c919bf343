"""Reuse: plans and their files, whose masks layers get, and what planning chooses."""

import copy
import itertools
import json
import pickle
import threading

import numpy as np
import pytest

import flashprefill as fp
from flashprefill._masks_held import HeldMasks
from flashprefill.policies.reuse import SCHEMA

INNER = fp.FlashPrefill(alpha=1.0, block_size=16, sink_blocks=1, window_blocks=1, dense_tail_blocks=0)


def plan(*sources, heads=None):
    return fp.ReusePlan(tuple(None if s is None else fp.Borrowed(s, heads) for s in sources))


def arrays(rows, keys=None, seed=0):
    draw = np.random.default_rng(seed)
    q = draw.normal(size=(rows, 4, 16)).astype(np.float32)
    k, v = (draw.normal(size=(keys or rows, 2, 16)).astype(np.float32) for _ in range(2))
    return q, k, v


# ------------------------------------------------------------------ plans


def test_plan_files(tmp_path):
    made = fp.ReusePlan(
        (None, fp.Borrowed(0, (1, 0, 3, 3)), None), "sketch(mass=0.9)", "tiny", {"share": 0.33}
    )
    made.save(tmp_path / "plan.json")
    again = fp.ReusePlan.load(tmp_path / "plan.json")
    assert again == made and again.notes["share"] == 0.33
    assert made.sources == {0: 1} and made.share == pytest.approx(1 / 3)
    policy = fp.Reuse(tmp_path / "plan.json")
    assert policy.policy == fp.Sketch(mass=0.9)
    text = f"reuse(plan='{tmp_path / 'plan.json'}', inner=flashprefill(alpha=0.5))"
    assert fp.policies.text.parse(text).policy == fp.FlashPrefill(alpha=0.5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"schema": "other"}, "of another kind; it must be a file of `flashprefill plan-reuse`"),
        ({"layers": 3}, "layers is int; it must be a list"),
        ({"layers": [{"source": 0}]}, "layer 0's source is 0; it must be an earlier layer"),
        ({"layers": [None, {"source": 0}, {"source": 1}]}, "it must be a layer that selects for itself"),
        ({"layers": [None, {"heads": [0]}]}, "plan's layer 1 is"),
        ({"layers": [None, {"source": 0, "heads": [-1]}]}, "a head of layer 1 is -1"),
        ({"layers": [None, {"source": 0, "heads": "01"}]}, "layer 1's heads is"),
    ],
)
def test_damaged_plans(tmp_path, change, message):
    content = {"schema": SCHEMA, "layers": [None], **change}
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises((ValueError, TypeError), match=message):
        fp.Reuse(tmp_path / "plan.json", INNER)


def test_refusals(tmp_path):
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(ValueError, match="which cannot be read"):
        fp.Reuse(tmp_path / "plan.json")
    with pytest.raises(ValueError, match="inner is None; it must be a policy"):
        fp.Reuse(plan(None, 0))
    with pytest.raises(ValueError, match="a policy that selects"):
        fp.Reuse(plan(None, 0), fp.Reuse(plan(None, 0), INNER))
    with pytest.raises(NotImplementedError, match="not over ranks"):
        fp.Reuse(plan(None, 0), INNER)._at_heads(0, 2, 4)
    from flashprefill.engines import options

    with pytest.raises(ValueError, match="Reuse's masks are for Transformers"):
        options._alone(fp.Reuse(plan(None, 0), INNER))


class Config:
    num_attention_heads, num_key_value_heads, num_hidden_layers = 4, 2, 2


def test_a_model_that_the_plan_is_not_for():
    fp.Reuse(plan(None, 0), INNER).check_model(Config())
    with pytest.raises(ValueError, match="plan is of 3 layers; it must be of the model's 2"):
        fp.Reuse(plan(None, 0, 0), INNER).check_model(Config())
    with pytest.raises(ValueError, match="plan's layer 1 is of 3 heads; it must be of the model's 4"):
        fp.Reuse(plan(None, 0, heads=(0, 1, 2)), INNER).check_model(Config())


# ------------------------------------------------------------------ calls


def test_layers_read_what_their_source_kept(engine):
    """Layer 1 has layer 0's mask, head by head as the plan says, and layer 2 its own."""
    whole = fp.Reuse(plan(None, 0, None, heads=(2, 2, 0, 1)), INNER)
    first, second = whole.at_layer(0), whole.at_layer(1)
    assert whole.at_layer(2) == INNER
    q, k, v = arrays(400)
    q1, k1, v1 = arrays(400, seed=1)
    mask = fp.select(q, k, INNER, **engine)
    out = fp.prefill_attention(q, k, v, first, **engine)
    np.testing.assert_array_equal(out, fp.prefill_attention(q, k, v, INNER, **engine))
    out, stats = fp.prefill_attention(q1, k1, v1, second, return_stats=True, **engine)
    keep = mask.dense()[[2, 2, 0, 1]]
    wanted = fp.BlockMask.from_dense(keep, q_len=400, k_len=400, block_size=16)
    np.testing.assert_array_equal(out, fp.attend(q1, k1, v1, wanted, **engine))
    assert stats.mean_density == pytest.approx(wanted.density)
    assert whole.held.count() == 0  # the last reader was there


@pytest.mark.parametrize(
    "inner", ["gather(budget=0.2)", "minference(vertical=30, slash=50, rounding=tokens)"]
)
def test_finer_keys_come_along(inner):
    inner = fp.policies.text.parse(inner)
    whole = fp.Reuse(plan(None, 0), inner)
    (q, k, v), (q1, k1, v1) = arrays(700), arrays(700, seed=1)
    mask = fp.select(q, k, inner)
    fp.prefill_attention(q, k, v, whole.at_layer(0))
    out = fp.prefill_attention(q1, k1, v1, whole.at_layer(1))
    np.testing.assert_array_equal(out, fp.attend(q1, k1, v1, mask))


def test_a_forward_that_ended_early_leaves_nothing():
    whole = fp.Reuse(plan(None, 0, 0), INNER)
    layers = [whole.at_layer(n) for n in range(3)]
    (q, k, v), (q1, k1, v1) = arrays(300), arrays(300, seed=1)
    fp.prefill_attention(q, k, v, layers[0])
    fp.prefill_attention(q, k, v, layers[1])
    assert whole.held.count() == 1  # layer 2 was to read it
    fp.prefill_attention(q1, k1, v1, layers[0])
    out = fp.prefill_attention(q, k, v, layers[1])
    np.testing.assert_array_equal(out, fp.attend(q, k, v, fp.select(q1, k1, INNER)))
    # Its source not called, or called with other lengths: the layer selects.
    out = fp.prefill_attention(q, k, v, layers[1])
    np.testing.assert_array_equal(out, fp.prefill_attention(q, k, v, INNER))
    fp.prefill_attention(*arrays(200), layers[0])
    out = fp.prefill_attention(q, k, v, layers[1])
    np.testing.assert_array_equal(out, fp.prefill_attention(q, k, v, INNER))


def test_threads_have_their_own():
    whole = fp.Reuse(plan(None, 0), INNER)
    first, second = whole.at_layer(0), whole.at_layer(1)
    inputs = [arrays(300, seed=n) for n in range(4)]
    wanted = [fp.attend(*inputs[0], fp.select(*one[:2], INNER)) for one in inputs]
    barrier, wrong = threading.Barrier(len(inputs)), []

    def forward(number):
        for _ in range(5):
            fp.prefill_attention(*inputs[number], first, threads=1)
            barrier.wait()
            out = fp.prefill_attention(*inputs[0], second, threads=1)
            if not np.array_equal(out, wanted[number]):
                wrong.append(number)

    threads = [threading.Thread(target=forward, args=(n,)) for n in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_parts_of_a_call_are_in_order():
    held = HeldMasks({0: 2})
    for forward in range(2):
        with held.call(0):
            held.put(0, (forward, "a"))
            held.put(0, (forward, "b"))
        for layer in (1, 2):
            with held.call(layer):
                assert [held.take(0) for _ in range(3)] == [(forward, "a"), (forward, "b"), None]
        assert held.count() == 0
    held.put(5, "of a layer that no other reads")
    assert held.count() == 0


def test_copies():
    policy = fp.Reuse(plan(None, 0), INNER)
    layers = [policy.at_layer(n) for n in range(2)]
    again = pickle.loads(pickle.dumps(layers))
    assert again[0].text == layers[0].text and again[0].held is again[1].held
    assert copy.deepcopy(layers)[0].held is not layers[0].held


# ------------------------------------------------------------------ in a model


def forward(model, ids, policy, **more):
    torch = pytest.importorskip("torch")
    fp.patch_model(model, policy)
    try:
        with torch.no_grad(), fp.collect_stats(model) as stats:
            return model(ids, **more).logits, stats
    finally:
        fp.unpatch_model(model)


def tiny(layers=3):
    models = pytest.importorskip("transformers_models")
    config, fields, _ = models.MODELS["llama"]
    settings = {**models.TINY, **fields, "num_hidden_layers": layers}
    models.torch.manual_seed(0)
    own = getattr(models.transformers, config)(**settings)
    return models.transformers.AutoModelForCausalLM.from_config(own).eval()


def test_in_a_model():
    """One layer's masks for all: a batch, padded or not, is what its sequences are alone."""
    torch = pytest.importorskip("torch")
    model = tiny()
    policy = fp.Reuse(plan(None, 0, 0, heads=(0, 1, 2, 3)), INNER)
    torch.manual_seed(1)
    ids = torch.randint(3, 90, (2, 300))
    both, stats = forward(model, ids, policy)
    assert [bool(call.reason) for call in stats.calls] == [False] * 3
    density = [call.counts()[0].tolist() for call in stats.calls]
    assert density[0] == density[1] == density[2]
    for row in range(2):
        alone, _ = forward(model, ids[row : row + 1], policy)
        torch.testing.assert_close(both[row : row + 1], alone, atol=1e-4, rtol=1e-4)
    mask = torch.ones_like(ids)
    mask[1, :80] = 0
    padded, _ = forward(model, ids, policy, attention_mask=mask)
    alone, _ = forward(model, ids[1:, 80:], policy)
    torch.testing.assert_close(padded[1:, 80:], alone, atol=1e-4, rtol=1e-4)
    own, _ = forward(model, ids, INNER)
    assert not torch.allclose(own, both, atol=1e-4)
    nothing, _ = forward(model, ids, fp.Reuse(plan(None, None, None), INNER))
    torch.testing.assert_close(own, nothing)


def test_generate_in_chunks():
    torch = pytest.importorskip("torch")
    model = tiny()
    policy = fp.Reuse(plan(None, 0, 0), fp.FlashPrefill(alpha=0.0, block_size=16))
    torch.manual_seed(1)
    ids = torch.randint(3, 90, (1, 400))
    arguments = dict(max_new_tokens=4, do_sample=False, prefill_chunk_size=160)
    wanted = model.generate(ids, **arguments)
    fp.patch_model(model, policy)
    assert model.generate(ids, **arguments).tolist() == wanted.tolist()
    fp.unpatch_model(model)


def test_a_compiled_model_selects_in_every_layer():
    torch = pytest.importorskip("torch")
    whole = fp.Reuse(plan(None, 0), INNER)
    layers = [whole.at_layer(n) for n in range(2)]

    def both(q, k, v):
        return [fp.prefill_attention(q, k, v, policy) for policy in layers]

    q, k, v = map(torch.from_numpy, arrays(300))
    compiled = torch.compile(both, backend="eager")(q, k, v)
    for out in compiled:
        torch.testing.assert_close(out, fp.prefill_attention(q, k, v, INNER))


# ------------------------------------------------------------------ plans that are made


def test_sources_are_the_best_of_all():
    """Against all ways: the least worst loss, of those the least sum."""
    from flashprefill.apps.reuse.choose import sources

    def worst_and_sum(loss, found):
        each = [max(0.0, loss[s, j]) for j, s in enumerate(found) if s is not None]
        return (max(each, default=0.0), pytest.approx(sum(each)))

    draw = np.random.default_rng(0)
    for layers, borrow in ((4, 2), (5, 2), (6, 3)):
        loss = np.round(draw.random((layers, layers)), 1)
        ways = []
        for chosen in itertools.combinations(range(1, layers), borrow):
            found, last = [], 0
            for j in range(layers):
                last = last if j in chosen else j
                found.append(last if j in chosen else None)
            each = [loss[s, j] for j, s in enumerate(found) if s is not None]
            ways.append((max(each), sum(each)))
        assert worst_and_sum(loss, sources(loss, borrow)) == min(ways)


def test_sources_by_hand():
    """Layer 2 loses least under 1, layer 1 under 0; both at once cost 2's loss under 0, since 1 borrows."""
    from flashprefill.apps.reuse.choose import sources

    loss = np.full((3, 3), np.inf)
    loss[0, 1], loss[0, 2], loss[1, 2] = 0.2, 0.5, 0.1
    assert sources(loss, 0) == [None, None, None]
    assert sources(loss, 1) == [None, None, 1]
    assert sources(loss, 2) == [None, 0, 0]
    with pytest.raises(ValueError, match="no plan has 3 of 3"):
        sources(loss, 3)


def test_plan_reuse(model, tmp_path, capsys):
    """A plan of a tiny model: written, readable, and what the table says is what the plan does."""
    pytest.importorskip("transformers", minversion="5")
    from flashprefill.apps.reuse import Options, run

    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 400, encoding="utf-8")
    out = tmp_path / "plan.json"
    policy = "flashprefill(alpha=1.0, block_size=16, sink_blocks=1, window_blocks=1)"
    run(Options(model=model, policy=policy, share=0.5, tokens=512, sequences=1, text=text, held_out=text,
                against=("streaming",), device="cpu", dtype="fp32", out=out))  # fmt: skip
    made = fp.ReusePlan.load(out)
    assert made.share == pytest.approx(2 / 3) and made.policy == fp.policies.text.parse(policy).text
    rows = made.notes["held_out"]
    assert len(rows) == 3 and all(0 < row["recall"] <= 1 for row in rows)
    assert "layers that borrow" in capsys.readouterr().out
