"""Several models, one config: a model is sparse if and only if it was patched, whatever was copied when."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import subprocess
import sys

import pytest

import transformers_models
from transformers_models import KEEP, MODELS, STREAMING, TINY, fp, logits, make, tokens, torch, transformers

models, patched, quiet = transformers_models.models, transformers_models.patched, transformers_models.quiet


def twins(count=2, name="llama"):
    """Models that have one config object."""
    config_class, extra, _ = MODELS[name]
    config = getattr(transformers, config_class)(**{**TINY, **extra})
    kind = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    torch.manual_seed(0)
    made = [kind(config).eval() for _ in range(count)]
    assert all(model.config is config for model in made)
    return made


def is_sparse(model):
    with fp.collect_stats(model) as stats:
        got = logits(model, tokens())
    assert torch.isfinite(got).all()
    return stats.sparse_calls > 0


def implementations(model):
    return [getattr(config, "_attn_implementation", None) for config in configs(model)]


def configs(model):
    return [module.config for module in model.modules() if hasattr(module, "config")]


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_twin_stays_dense(name):
    model, twin = twins(2, name)
    wanted = logits(twin, tokens())
    config = twin.config
    fp.patch_model(model, STREAMING)
    assert twin.config is config and set(implementations(twin)) == {"sdpa"}
    assert is_sparse(model) and torch.equal(logits(twin, tokens()), wanted)
    with pytest.raises(ValueError, match="not patched"):
        fp.unpatch_model(twin)
    fp.unpatch_model(model)
    assert model.config is config and all(x is config for x in configs(model))
    assert not is_sparse(model) and torch.equal(logits(twin, tokens()), wanted)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_patched_and_unpatched_in_any_order(order):
    three = twins(3)
    wanted = [logits(model, tokens()) for model in three]
    config = three[0].config
    done = set()
    for place in order:
        fp.patch_model(three[place], STREAMING)
        done.add(place)
        assert [is_sparse(model) for model in three] == [i in done for i in range(3)]
    for place in (order[1], order[0], order[2]):
        fp.unpatch_model(three[place])
        done.discard(place)
        assert [is_sparse(model) for model in three] == [i in done for i in range(3)]
    for model, logits_before in zip(three, wanted, strict=True):
        assert model.config is config and torch.equal(logits(model, tokens()), logits_before)
    assert config._attn_implementation == "sdpa"


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: saved(model),
}


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", COPIES)
def test_copies_are_their_own(how):
    model, twin = twins()
    dense, dense_twin = COPIES[how](model), COPIES[how](twin)
    fp.patch_model(model, STREAMING)
    other = COPIES[how](model)
    assert [is_sparse(x) for x in (model, other, twin, dense, dense_twin)] == [
        True,
        True,
        False,
        False,
        False,
    ]
    again = COPIES[how](fp.unpatch_model(other))
    assert [is_sparse(x) for x in (model, other, again, twin)] == [True, False, False, False]
    assert set(implementations(other)) == {"sdpa"} and other.config is not twin.config
    fp.patch_model(again, KEEP)
    fp.unpatch_model(model)
    assert [is_sparse(x) for x in (model, other, again, twin)] == [False, False, True, False]
    assert model.config is twin.config


def test_a_file_of_a_patched_model_is_read_by_a_process_that_knows_nothing(tmp_path):
    torch.save(fp.patch_model(make("llama"), STREAMING), tmp_path / "model.pt")
    code = f"""
import torch
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
import flashprefill as fp
with torch.no_grad(), fp.collect_stats(model) as stats:
    model(torch.arange(2, 92).repeat(4)[None])
assert stats.sparse_calls == 2, stats
fp.unpatch_model(model)
assert model.config._attn_implementation == "sdpa" and type(model.config._attn_implementation) is str
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_model_made_from_a_patched_models_config_is_dense(tmp_path):
    model = fp.patch_model(make("llama"), STREAMING)
    made = type(model)(model.config).eval()
    by_auto = transformers.AutoModelForCausalLM.from_config(model.config).eval()
    of_copy = type(model)(copy.deepcopy(model.config)).eval()
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, config=model.config).eval()
    base = transformers.AutoModel.from_config(model.config).eval()
    for other in (made, by_auto, of_copy, loaded, base):
        assert set(implementations(other)) == {"sdpa"}
        with fp.collect_stats(other) as stats, torch.no_grad():
            other(tokens())
        assert not stats.sparse_calls
    assert is_sparse(model) and "prefill" not in (tmp_path / "config.json").read_text()
    by_name = transformers.AutoModelForCausalLM.from_config(model.config, attn_implementation="flashprefill")
    assert set(implementations(by_name.eval())) == {"sparse_prefill"}


def test_a_config_that_is_handed_on_by_hand_patches_nothing():
    model, other = fp.patch_model(make("llama"), STREAMING), make("llama")
    for module in other.modules():
        if hasattr(module, "config"):
            module.config = model.config
    with fp.collect_stats(other) as stats:
        logits(other, tokens())
    assert stats.fallbacks == {"unpatched": 2}


def test_the_twin_changes_its_attention_alone():
    model, twin = twins()
    fp.patch_model(model, STREAMING)
    twin.set_attn_implementation("eager")
    assert is_sparse(model) and not is_sparse(twin)
    model.set_attn_implementation("sdpa")
    assert not is_sparse(model) and set(implementations(twin)) == {"eager"}
    model.set_attn_implementation("flashprefill")
    assert is_sparse(model) and not is_sparse(type(model)(model.config).eval())
    fp.unpatch_model(model)
    assert not is_sparse(model) and model.config is twin.config


def test_what_was_set_while_patched_stays():
    model, twin = twins()
    fp.patch_model(model, STREAMING)
    model.config.use_cache = False
    model.config.something_of_mine = [1]
    assert twin.config.use_cache is True
    fp.unpatch_model(model)
    assert model.config.use_cache is False and model.config.something_of_mine == [1]


def test_a_part_and_the_whole_in_any_order():
    for first, second in itertools.permutations(("part", "whole")):
        model = make("llama")
        config, parts = model.config, {"part": model.model, "whole": model}
        fp.patch_model(parts[first], STREAMING)
        fp.patch_model(parts[second], STREAMING)
        assert is_sparse(model) and model.config is model.model.config
        fp.unpatch_model(model)
        assert not is_sparse(model) and all(x is config for x in configs(model))
    fp.patch_model(model, STREAMING)
    fp.unpatch_model(model.model)
    assert not is_sparse(model)
    fp.unpatch_model(model)
    assert all(x is config for x in configs(model))


def test_a_failed_patch_changes_nothing(monkeypatch):
    model = make("llama")
    config = model.config

    def fails(self, *args):
        raise ValueError("no")

    monkeypatch.setattr(type(model), "set_attn_implementation", fails)
    with pytest.raises(ValueError, match="no"):
        fp.patch_model(model, STREAMING)
    assert model.config is config and not hasattr(model, "_flashprefill_before")


def test_assistants_with_the_models_config():
    model, assistant = twins()
    ids = tokens()
    wanted = model.generate(ids, max_new_tokens=6, do_sample=False)
    for sparse, dense in ((model, assistant), (assistant, model)):
        fp.patch_model(sparse, KEEP)
        with fp.collect_stats(sparse) as stats, fp.collect_stats(dense) as others:
            got = model.generate(ids, max_new_tokens=6, do_sample=False, assistant_model=assistant)
        assert torch.equal(got, wanted) and stats.sparse_calls and not others.sparse_calls
        fp.unpatch_model(sparse)


def test_layers_copied_out_of_a_patched_model():
    model = fp.patch_model(make("llama"), STREAMING)
    layer = copy.deepcopy(model.model.layers[0])
    assert sum(p.numel() for p in layer.parameters()) == sum(
        p.numel() for p in model.model.layers[0].parameters()
    )
    model.model.layers.append(layer)
    fp.unpatch_model(model)
    assert not any(hasattr(module, "_flashprefill") for module in model.modules())
