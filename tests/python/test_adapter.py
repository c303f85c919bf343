"""train-adapter: its sequences, that it learns, goes on where it stopped, and is read everywhere."""

import json
import random

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5")
pytest.importorskip("safetensors")

import demo_model  # noqa: E402
import flashprefill as fp  # noqa: E402
from flashprefill import cli  # noqa: E402
from flashprefill.apps import models  # noqa: E402
from flashprefill.apps.adapter import lora, run, tasks  # noqa: E402
from flashprefill.apps.errors import UsageError  # noqa: E402

TEXT = "The quick brown fox jumps over the lazy dog. "


def letters(text):
    """A tokenizer whose ids are code points."""
    return [ord(letter) for letter in text]


def words_of(ids):
    return "".join(map(chr, ids))


@pytest.fixture(scope="module")
def maker():
    return tasks.Maker(letters, letters(TEXT * 50))


@pytest.mark.parametrize("kind", list(tasks.KINDS))
def test_sequences(maker, kind):
    """Of the length asked for, the same for one draw; all that is learnt stands in the facts before."""
    for number in range(12):
        tokens = 4000 + 37 * number
        made = maker.make(random.Random(number), tokens, kind)
        again = maker.make(random.Random(number), tokens, kind)
        np.testing.assert_array_equal(made.ids, again.ids)
        assert len(made.ids) == len(made.learnt) == tokens
        assert 3 <= made.learnt.sum() < tokens // 2
        first = int(made.learnt.argmax())
        before = words_of(made.ids[:first])
        answers = "".join(chr(i) if yes else "|" for i, yes in zip(made.ids, made.learnt, strict=True))
        for answer in filter(None, (part.strip(" .\n") for part in answers.split("|"))):
            pieces = answer.split(", ") if kind in ("needles", "pairs") else answer.split()
            pieces = [piece for piece in pieces if not piece.endswith(".")]  # the numbers of a list
            assert pieces
            assert all(piece in before for piece in pieces)


def test_variables_by_hand(maker):
    """All names of a chain, in its order, are those whose value the question asks for."""
    asked = tasks.variables(random.Random(3), 4000, letters)
    held = {}
    for fact in asked.facts:
        name, value = fact[4:].split(" = ")
        held[name] = held[value[4:]] if value.startswith("VAR ") else value
    for question, answer in asked.questions:
        value = question.partition("assigned the value ")[2].split()[0]
        assert answer.split() == [name for name, its in held.items() if its == value]
        assert f" {len(answer.split())} variables" in question


def test_common_words(maker):
    """The ten words of the answer appear more often than any other."""
    asked = tasks.words(random.Random(1), 20000, letters)
    entries = [fact.partition(". ")[2] for fact in asked.facts]
    said = [word for word in asked.questions[0][1].split() if not word.endswith(".")]
    most = max(entries.count(word) for word in set(entries) - set(said))
    assert len(said) == 10
    assert min(map(entries.count, said)) > most


def test_a_needle_stands_at_its_depth(maker):
    asked = tasks.single(random.Random(0))
    made = maker.filled(random.Random(0), 6000, asked, 0.25)
    assert 0.2 < words_of(made.ids).find(asked.facts[0]) / 6000 < 0.3


def test_too_short_for_its_question(maker):
    with pytest.raises(UsageError, match="a question alone takes"):
        maker.make(random.Random(0), 100, "needles")


def options(folder, tmp_path, **more):
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 100, encoding="utf-8")
    given = {
        "model": folder,
        "text": text,
        "tokens": 1024,
        "batch": 1024,
        "minutes": None,
        "steps": 8,
        "rank": 4,
        "needles": 0,
        "device": "cpu",
        "dtype": "fp32",
        "threads": 1,
        "out": tmp_path / "adapter",
    }
    return run.Options(**{**given, **more})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return demo_model.save(tmp_path_factory.mktemp("tiny"))


def test_loss_falls(folder, tmp_path):
    """On short sequences of a random model: the digits' and letters' frequencies are learnt at once."""
    run.run(options(folder, tmp_path, steps=40, tokens=512, batch=512, rate=2e-2, needles=1))
    lines = [json.loads(line) for line in (tmp_path / "adapter/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 41))
    losses = [line["loss"] for line in lines]
    assert np.mean(losses[-8:]) < 0.8 * np.mean(losses[:8])
    results = json.loads((tmp_path / "adapter/results.json").read_text())
    assert results["context"] == 4096
    assert results["rope_theta"] == 10000.0  # 512 tokens are within the model's context
    assert list(results["needles"][-1]["needles"]) == ["512"]


class Stopped(Exception):
    pass


def test_resume_is_exact(folder, tmp_path, monkeypatch):
    whole = options(folder, tmp_path, out=tmp_path / "whole")
    run.run(whole)
    part = options(folder, tmp_path, out=tmp_path / "part")
    step = run.Run.step

    def stops(self, maker):
        if self.step_number == 5:
            raise Stopped
        return step(self, maker)

    with monkeypatch.context() as patch:
        patch.setattr(run, "SAVE_EVERY", -1.0)
        patch.setattr(run.Run, "step", stops)
        with pytest.raises(Stopped):
            run.run(part)
    with pytest.raises(UsageError, match="--rank 8: the run to go on with had 4"):
        run.run(options(folder, tmp_path, out=tmp_path / "part", rank=8, resume=True))
    run.run(options(folder, tmp_path, out=tmp_path / "part", resume=True))
    ours, theirs = (lora.load(tmp_path / name)[0] for name in ("whole", "part"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(bool(ours[name].any()) for name in ours if "lora_B" in name)
    log = (tmp_path / "part/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == list(range(1, 9))


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """An adapter that changes much, for 8,192 tokens of a model that reads 4,096."""
    tmp_path = tmp_path_factory.mktemp("trained")
    given = options(folder, tmp_path, tokens=8192, batch=2048, steps=3, rate=0.05)
    run.run(given)
    return given.out


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_it_is_read_by_our_loader_and_by_peft(folder, trained):
    ids = torch.randint(2, 200, (1, 300), generator=torch.Generator().manual_seed(0))
    plain = models.load(folder, "fp32")
    ours = models.load(folder, "fp32", adapter=trained)
    assert ours.context == 8192
    assert ours.name == f"{plain.name} with adapter"
    assert lora.reach_of(ours.model.config).rope_theta == 40000.0
    said = logits_of(ours.model, ids)
    assert (said - logits_of(plain.model, ids)).abs().max() > 0.1
    peft = pytest.importorskip("peft")
    other = models.load(folder, "fp32").model
    lora.set_reach(other, lora.Reach(40000.0, 8192))
    wrapped = peft.PeftModel.from_pretrained(other, str(trained))
    torch.testing.assert_close(logits_of(wrapped, ids), said, atol=1e-4, rtol=1e-4)


def test_a_fresh_model_of_that_base_is_the_same(folder, trained):
    """set_reach leaves nothing of the old base behind: a model made with the new one says the same."""
    from transformers import AutoConfig, AutoModelForCausalLM

    ids = torch.arange(2, 202)[None]
    ours = models.load(folder, "fp32", adapter=trained).model
    config = AutoConfig.from_pretrained(folder)
    config.rope_parameters = {**config.rope_parameters, "rope_theta": 40000.0}
    fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    fresh.load_state_dict(ours.state_dict())
    torch.testing.assert_close(logits_of(fresh.eval(), ids), logits_of(ours, ids))


def test_the_door_takes_it(folder, trained):
    """Dense attention of the door on the model with its adapter is the model's own."""
    ids = torch.arange(2, 202)[None].repeat(1, 3)
    model = models.load(folder, "fp32", adapter=trained).model
    before = logits_of(model, ids)
    fp.patch_model(model, fp.FlashPrefill(alpha=0.0, dense_tail_blocks=0))
    torch.testing.assert_close(logits_of(model, ids), before, atol=1e-4, rtol=1e-4)
    fp.unpatch_model(model)


def test_eval_reads_with_it(folder, trained, tmp_path):
    for module in ("lm_eval", "wonderwords", "nltk", "scipy", "matplotlib"):
        pytest.importorskip(module)
    arguments = ["eval", "niah_single_1", "--model", str(folder), "--device", "cpu", "--dtype", "fp32"]
    arguments += ["--pattern", "dense", "--lengths", "6K", "--samples", "1", "--max-tokens", "2"]
    assert cli.main([*arguments, "--out", str(tmp_path / "without")]) == 2  # beyond its own context
    out = tmp_path / "with"
    assert cli.main([*arguments, "--adapter", str(trained), "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["model"]["name"].endswith("with adapter")
    assert results["model"]["context"] == 8192


@pytest.mark.parametrize(
    "change, words",
    [
        ({"steps": 0}, "--steps 0"),
        ({"tokens": 100}, "--tokens 100"),
        ({"rate": 0.0}, "--rate 0"),
        ({"needles": -1}, "--needles -1"),
        ({"resume": True}, "--resume: there is no"),
    ],
)
def test_refusals(folder, tmp_path, change, words):
    with pytest.raises(UsageError, match=words):
        run.run(options(folder, tmp_path, **change))


def test_what_is_no_adapter_is_refused(folder, trained, tmp_path):
    with pytest.raises(UsageError, match="there is no adapter_model.safetensors"):
        lora.load(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(UsageError, match="--adapter"):
        lora.load(tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match="is not one of"):
        lora.load(folder / "model.safetensors")
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    config.num_key_value_heads = 4
    with pytest.raises(UsageError, match="its model.layers.0.self_attn.k_proj is 32 by 64"):
        lora.attach(AutoModelForCausalLM.from_config(config), trained)
    config.num_key_value_heads, config.num_hidden_layers = 2, 2
    with pytest.raises(UsageError, match=r"this model has no model.layers.2"):
        lora.attach(AutoModelForCausalLM.from_config(config), trained)
