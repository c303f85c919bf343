"""for_model: a model, a config, a hub id or a family's name give the values that authors publish."""

from types import SimpleNamespace

import pytest

import flashprefill as fp
from flashprefill.policies.presets import PRESETS

LLAMA = {"rope_type": "llama3", "factor": 8.0}


@pytest.mark.parametrize(
    ("model", "alpha"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", 0.18),
        ("meta-llama/Meta-Llama-3.1-8B", 0.18),
        ("/models/llama-3.1-8b/", 0.18),
        ("Qwen/Qwen2.5-7B-Instruct-1M", 0.08),
        ("Qwen2-7B", 0.08),
        ("Qwen/Qwen2.5-VL-7B-Instruct", 0.10),
        ("qwen2_5_vl", 0.10),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", 0.12),
        ("qwen3_moe", 0.12),
        ("Qwen/Qwen3-VL-30B-A3B-Instruct", 0.22),
    ],
)
def test_names(model, alpha):
    policy = fp.FlashPrefill.for_model(model, query_pool=16)
    assert policy == fp.FlashPrefill(alpha=alpha, query_pool=16)
    assert policy.source.startswith("alpha of FlashPrefill's evaluation scripts for ")
    config = SimpleNamespace(model_type="", _name_or_path=model)
    if "_" not in model:
        assert fp.FlashPrefill.for_model(config) == fp.FlashPrefill(alpha=alpha)


KINDS = {kind.kind: kind for kind in fp.Policy.__subclasses__() if kind.kind in PRESETS}
# Ways to say which family a model is of: names, and what its config holds.
FAMILIES = {
    "llama-3.1": (
        ["llama-3.1", "llama3.1", "meta-llama/Llama-3.1-8B-Instruct", "/models/Meta-Llama-3.1-8B/"],
        [{"model_type": "llama", "rope_scaling": LLAMA}, {"model_type": "llama", "rope_parameters": LLAMA}],
    ),
    "qwen2": (["qwen2", "Qwen-2", "Qwen/Qwen2-7B-Instruct"], [{"model_type": "qwen2"}]),
    "qwen2.5": (["qwen2.5", "Qwen/Qwen2.5-7B-Instruct-1M"], []),  # its config's type is qwen2
    "qwen2-vl": (["qwen2-vl", "Qwen/Qwen2-VL-7B-Instruct", "qwen2_vl"], [{"model_type": "qwen2_vl"}]),
    "qwen2.5-vl": (["qwen2.5-vl", "Qwen/Qwen2.5-VL-7B-Instruct"], [{"model_type": "qwen2_5_vl"}]),
    "qwen3-30b": (["qwen3-30b", "Qwen/Qwen3-30B-A3B"], []),
    "qwen3-moe": (["qwen3-moe", "qwen3_moe"], [{"model_type": "qwen3_moe"}]),
    "qwen3-vl-30b": (["qwen3-vl-30b", "Qwen/Qwen3-VL-30B-A3B-Instruct"], [{"model_type": "qwen3_vl_moe"}]),
    "glm-4": (
        ["glm-4", "THUDM/glm-4-9b-chat-1m"],
        [{"model_type": "glm", "vocab_size": 151552}, {"model_type": "chatglm", "padded_vocab_size": 151552}],
    ),
    "yi-9b-200k": (["yi-9b-200k", "01-ai/Yi-9B-200K"], []),
    "mistral-nemo": (["mistral-nemo", "mistralai/Mistral-Nemo-Instruct-2407"], []),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_policies_agree_on_families(family):
    """Every way to say a family gives a policy's values for it, or is refused by a policy without any."""
    names, configs = FAMILIES[family]
    given = [*names, *(SimpleNamespace(**config) for config in configs)]
    given += [SimpleNamespace(model_type="", _name_or_path=name) for name in names if "_" not in name]
    given += [SimpleNamespace(config=SimpleNamespace(**config)) for config in configs]
    for method, kind in KINDS.items():
        preset = PRESETS[method].get(family)
        for model in given:
            if preset is None:
                with pytest.raises(ValueError, match="of a family with published values"):
                    kind.for_model(model)
                continue
            policy = kind.for_model(model)
            assert policy == kind(**preset.values) and policy.source == preset.source
    assert any(family in presets for presets in PRESETS.values())


def test_all_families_are_tried():
    assert set(FAMILIES) == {family for presets in PRESETS.values() for family in presets}


def test_xattention():
    """The papers' values, other fields beside them, and a repeated source."""
    assert fp.XAttention.for_model("llama-3.1") == fp.XAttention(threshold=0.9, stride=8)
    policy = fp.XAttention.for_model("Qwen/Qwen2-VL-7B-Instruct", dense_tail_blocks=2)
    assert policy == fp.XAttention(threshold=0.9, stride=16, dense_tail_blocks=2)
    assert policy.source.startswith("threshold and stride of XAttention's paper for Qwen2-VL-7B-Instruct")
    assert fp.XAttention.for_model("llama-3.1", stride=16).stride == 16


@pytest.mark.parametrize("kind", KINDS.values())
@pytest.mark.parametrize("name", ["llama-3.1", "llama-3.1-8b", "meta-llama/Llama-3.1-8B-Instruct"])
def test_policies_agree_on_names(kind, name):
    assert kind.for_model(name) == kind.for_model("llama-3.1") and kind.for_model(name).source
    config = SimpleNamespace(model_type="llama", _name_or_path="", rope_scaling=LLAMA)
    assert kind.for_model(config) == kind.for_model(SimpleNamespace(config=config)) == kind.for_model(name)


@pytest.mark.parametrize(
    ("checkpoint", "gamma"),
    [
        ("THUDM/glm-4-9b-chat-1m", 0.95),
        ("zai-org/glm-4-9b-chat-1m-hf", 0.95),
        ("/models/GLM-4-9B-Chat-1M", 0.95),
        ("01-ai/Yi-9B-200K", 0.9),
        ("yi-9b-200k", 0.9),
    ],
)
def test_checkpoints_as_flexprefill_names_them(checkpoint, gamma):
    policy = fp.FlexPrefill.for_model(checkpoint)
    assert policy.gamma == gamma and policy.source.startswith("gamma, tau and min_budget of FlexPrefill's")


@pytest.mark.parametrize(
    ("fields", "gamma"),
    [
        ({"model_type": "qwen2"}, 0.9),
        ({"model_type": "chatglm", "padded_vocab_size": 151552}, 0.95),
        ({"model_type": "llama", "_name_or_path": "01-ai/Yi-9B-200K"}, 0.9),
    ],
)
def test_configs(fields, gamma):
    assert fp.FlexPrefill.for_model(SimpleNamespace(**fields)).gamma == gamma


def test_a_transformers_config_and_model():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.Qwen3MoeConfig(**sizes, num_key_value_heads=1, num_experts=2, vocab_size=64)
    assert fp.FlashPrefill.for_model(config).alpha == 0.12
    config = transformers.Qwen2Config(**sizes, num_key_value_heads=1, vocab_size=64)
    assert fp.FlashPrefill.for_model(transformers.Qwen2ForCausalLM(config)).alpha == 0.08
    rope = {**LLAMA, "rope_theta": 5e5, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8192
    config = transformers.LlamaConfig(**sizes, rope_scaling=rope)
    assert fp.FlashPrefill.for_model(config).alpha == 0.18


@pytest.mark.parametrize(
    "model",
    ["gpt-2", "Qwen/Qwen3-8B", "meta-llama/Llama-3.2-1B", "Qwen2-VL-7B", "zai-org/GLM-4-9B-0414", "llama"],
)
def test_what_nobody_publishes_is_refused(model):
    with pytest.raises(ValueError, match=r"; it must be of a family with published values: .*llama-3\.1"):
        fp.FlexPrefill.for_model(model)


def test_other_refusals():
    with pytest.raises(ValueError, match="nothing is published for sketch by model"):
        fp.Sketch.for_model("llama-3.1")
    with pytest.raises(TypeError, match="model is a int; it must be a model, a config, a hub id"):
        fp.FlashPrefill.for_model(3)
    with pytest.raises(ValueError, match="model is a SimpleNamespace of 'bert'"):
        fp.FlashPrefill.for_model(SimpleNamespace(model_type="bert"))


def test_every_preset_says_where_it_comes_from():
    for method, families in PRESETS.items():
        kind = next(kind for kind in fp.Policy.__subclasses__() if kind.kind == method)
        for family, preset in families.items():
            assert kind.for_model(family).source == preset.source and preset.source
    assert fp.FlashPrefill().source == "" and fp.FlashPrefill.for_model("qwen2") == fp.FlashPrefill(
        alpha=0.08
    )
