"""train-indexer: the true masses, that it learns, that it goes on where it stopped."""

import json
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import flashprefill as fp  # noqa: E402
from flashprefill.apps.errors import UsageError  # noqa: E402
from flashprefill.apps.indexer import masses as truth  # noqa: E402
from flashprefill.apps.indexer.harvest import LayerData  # noqa: E402
from flashprefill.apps.indexer.masses import far_masses, masses  # noqa: E402
from flashprefill.apps.indexer.trainer import Trainer  # noqa: E402
from flashprefill.policies.indexer import Indexer  # noqa: E402


@pytest.mark.parametrize("tokens, tile", [(1, 16), (37, 16), (64, 16), (65, 256)])
def test_masses(tokens, tile):
    """By column and by diagonal of whole softmaxes."""
    torch.manual_seed(tokens)
    q, k = torch.randn(tokens, 4, 8), torch.randn(tokens, 2, 8)
    by_key, by_distance = masses(q, k, 0.5, tile)
    for head in range(2):
        share = torch.zeros(tokens, tokens)
        for member in (2 * head, 2 * head + 1):
            score = (q[:, member] @ k[:, head].T) * 0.5
            score = score.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf)
            share += score.softmax(dim=-1) / 2
        diagonals = torch.stack([share.diagonal(-d).sum() for d in range(tokens)])
        torch.testing.assert_close(by_key[head], share.sum(dim=0) / tokens)
        torch.testing.assert_close(by_distance[head], diagonals / tokens)


def test_masses_by_hand():
    """Two tokens, scores 0: rows (1) and (1/2, 1/2). By key 3/4, 1/4; by distance (1 + 1/2) / 2, 1/4."""
    by_key, by_distance = masses(torch.zeros(2, 1, 4), torch.randn(2, 1, 4), 1.0)
    torch.testing.assert_close(by_key, torch.tensor([[0.75, 0.25]]))
    torch.testing.assert_close(by_distance, torch.tensor([[0.75, 0.25]]))


@pytest.mark.parametrize("tokens, tile", [(1, 16), (37, 16), (65, 256)])
def test_far_masses(tokens, tile, monkeypatch):
    """Means over the rows that see a key, or a distance, beyond sink and window; entry 0 is a whole row."""
    sink, window, least = 3, 5, 8
    for name, value in (("SINK", sink), ("WINDOW", window), ("LEAST_ROWS", least)):
        monkeypatch.setattr(truth, name, value)
    torch.manual_seed(tokens)
    q, k = torch.randn(tokens, 4, 8), torch.randn(tokens, 2, 8)
    by_key, by_distance = far_masses(q, k, 0.5, tile)
    for head in range(2):
        keys, distances = torch.zeros(tokens), torch.zeros(tokens)
        for member in (2 * head, 2 * head + 1):
            for i in range(tokens):
                share = ((q[i, member] @ k[: i + 1, head].T) * 0.5).softmax(dim=-1)
                for j in range(sink, i + 1 - window):
                    keys[j] += share[j] / 2
                    distances[i - j] += share[j] / 2
        place = torch.arange(tokens)
        keys /= (tokens - place - window).clamp(min=least)
        distances /= (tokens - place - sink).clamp(min=least)
        keys[0] = distances[0] = 1
        torch.testing.assert_close(by_key[head], keys / keys.sum())
        torch.testing.assert_close(by_distance[head], distances / distances.sum())


def test_far_masses_by_hand(monkeypatch):
    """Four tokens, scores 0, sink and window of one: row 2 gives key 1 a third, row 3 keys 1 and 2 a quarter.

    Rows that see them from beyond the window: two for key 1, one for key 2. So 7/24 and 1/4, beside 1 for
    what is kept anyway. Distance 1 lies beyond in rows 2 and 3: 1/3 + 1/4 over two; distance 2 in row 3.
    """
    for name, value in (("SINK", 1), ("WINDOW", 1), ("LEAST_ROWS", 1)):
        monkeypatch.setattr(truth, name, value)
    by_key, by_distance = far_masses(torch.zeros(4, 1, 4), torch.randn(4, 1, 4), 1.0)
    keys = torch.tensor([1, 7 / 24, 1 / 4, 0])
    distances = torch.tensor([1, 7 / 24, 1 / 4, 0])
    torch.testing.assert_close(by_key, (keys / keys.sum())[None])
    torch.testing.assert_close(by_distance, (distances / distances.sum())[None])


def sequence(tokens=192, kv_heads=2, dim=16):
    """One layer's data, with attention that is not flat."""
    torch.manual_seed(0)
    q, k = 2 * torch.randn(tokens, 2 * kv_heads, dim), torch.randn(tokens, kv_heads, dim)
    v = torch.randn(tokens, kv_heads, dim)
    inputs = torch.cat([k, v], dim=-1).transpose(0, 1).contiguous()
    return {0: LayerData(inputs, *masses(q, k, dim**-0.5))}


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_it_overfits_one_sequence(kind):
    data = sequence()
    trainer = Trainer(data, hidden=128, rate=1e-2, steps=300, seed=0, device="cpu")
    before = trainer.evaluate(data)
    for _ in range(300):
        trainer.step(data, kind)
    after = trainer.evaluate(data)
    assert sum(before) > 0.2
    assert sum(after) < 0.05


def test_layers_together_learn_what_each_learns_alone():
    """One product of all layers, two of them at a time, one by one, and a layer without the others."""
    data = sequence()[0]
    layers = {n: LayerData(data.inputs * n, data.by_key.roll(n, 1), data.by_distance) for n in (1, 3, 4)}
    trained = []
    for room, some in ((0, (1, 3, 4)), (1e9, (1, 3, 4)), (2 * 6 * 4 * 2 * 24 * 192, (1, 3, 4)), (0, (3,))):
        harvest = {n: layers[n] for n in some}
        trainer = Trainer(harvest, hidden=24, rate=1e-2, steps=30, seed=0, device="cpu")
        trainer.room = room
        for _ in range(30):
            trainer.step(harvest)
        trained.append((trainer.weights(), trainer.evaluate(harvest)))
    for weights, found in trained[1:]:
        for number, one in weights.items():
            for part, same in zip(one, trained[0][0][number], strict=True):
                np.testing.assert_allclose(part, same, rtol=1e-3, atol=1e-4)
        if len(weights) == 3:
            assert found == pytest.approx(trained[0][1], rel=1e-4)


def test_what_it_learns_is_what_the_policy_selects(tmp_path):
    """The saved weights, with the normalisation folded in, predict what the trainer's do."""
    data = sequence()
    trainer = Trainer(data, hidden=16, rate=1e-2, steps=60, seed=0, device="cpu")
    for _ in range(60):
        trainer.step(data)
    Indexer(trainer.weights(), "tiny").save(tmp_path / "i.safetensors", "fp32")
    layer = Indexer.load(tmp_path / "i.safetensors").layers[0]
    with torch.no_grad():
        vertical, _ = trainer.logits(data[0].inputs)
    x = data[0].inputs[1].numpy().astype(float)
    z = x @ layer.up[1].astype(float).T + layer.bias[1]
    np.testing.assert_allclose(z / (1 + np.exp(-z)) @ layer.vertical[1], vertical[1], atol=1e-3)
    k, v = (data[0].inputs.transpose(0, 1)[..., part].numpy() for part in (slice(16), slice(16, None)))
    policy = fp.VSPrefill(tmp_path / "i.safetensors", 0.3, 1e-3, "blocks", 16, sink_blocks=0, window_blocks=0)
    mask = fp.select(np.zeros((192, 4, 16), np.float32), np.ascontiguousarray(k), policy, v=v).dense()
    best = int(vertical[1].argmax())
    assert mask[2:, best // 128 :, best // 16].all()


def options(model, path, **more):
    pytest.importorskip("transformers", minversion="5")
    from flashprefill.apps.indexer import Options

    text = path.with_name("text.txt")
    text.write_text("The quick brown fox jumps over the lazy dog. " * 400, encoding="utf-8")
    return Options(
        model=model, text=text, held_out=text, tokens=256, sequences=3, steps=6, hidden=8, device="cpu",
        dtype="fp32", out=path, **more,
    )  # fmt: skip


def test_a_run_goes_on(model, tmp_path, monkeypatch):
    """Stopped after 3 of 6 steps and resumed, it ends where an uninterrupted run does."""
    from flashprefill.apps.indexer import run, trainer

    results = run(options(model, tmp_path / "whole.safetensors"))
    assert results["curve"][-1]["step"] == 6
    step, calls = trainer.Trainer.step, []

    def three(self, *arguments):
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(sys.modules[run.__module__], "SAVE_EVERY", 0.0)
    monkeypatch.setattr(trainer.Trainer, "step", three)
    with pytest.raises(KeyboardInterrupt):
        run(options(model, tmp_path / "part.safetensors"))
    monkeypatch.setattr(trainer.Trainer, "step", step)
    run(options(model, tmp_path / "part.safetensors", resume=True))
    one, other = (Indexer.load(tmp_path / f"{name}.safetensors") for name in ("whole", "part"))
    assert one == other
    assert one.kv_heads and "trained_on" in one.notes
    assert json.loads((tmp_path / "whole.json").read_text())["texts"] == ["text.txt"]
    wrong = options(model, tmp_path / "part.safetensors", resume=True)
    wrong.hidden = 9
    with pytest.raises(UsageError, match="--hidden 9: the run to go on with had 8"):
        run(wrong)
    with pytest.raises(UsageError, match="--resume: there is no"):
        run(options(model, tmp_path / "none.safetensors", resume=True))


def test_a_model_reads_with_what_was_trained(model, tmp_path):
    from flashprefill.apps import models
    from flashprefill.apps.indexer import run

    run(options(model, tmp_path / "i.safetensors"))
    loaded = models.load(model, "fp32")
    fp.patch_model(loaded.model, fp.VSPrefill(tmp_path / "i.safetensors", 0.5, 0.5, block_size=16))
    with torch.no_grad(), fp.collect_stats(loaded.model) as stats:
        loaded.model(torch.randint(3, 50, (1, 400)))
    assert all(not call.reason for call in stats.calls)


def test_every_option_of_the_command_line_arrives(monkeypatch):
    pytest.importorskip("transformers", minversion="5")
    pytest.importorskip("tqdm")
    from flashprefill import cli
    from flashprefill.apps import indexer

    given: list[indexer.Options] = []
    monkeypatch.setattr(indexer, "run", given.append)
    values = {
        "tokens": 128, "sequences": 3, "steps": 7, "hidden": 9, "rate": 0.5, "kl": "reverse",
        "targets": "published", "pool": 2, "seed": 5, "device": "cpu", "dtype": "fp32", "threads": 1,
    }  # fmt: skip
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    paths = ["--model", "m", "--text", "t", "--held-out", "h", "--out", "o.safetensors"]
    cli.main(["train-indexer", *words, *paths, "--layers", "1,4", "--resume"])
    (options,) = given
    named = {name: str(value) for name, value in vars(options).items()}
    assert named == {name: str(value) for name, value in values.items()} | {
        "model": "m", "text": "t", "held_out": "h", "out": "o.safetensors", "layers": "(1, 4)",
        "resume": "True",
    }  # fmt: skip
