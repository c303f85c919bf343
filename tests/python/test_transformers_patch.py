"""patch_model and registration, and what runs dense because the kernel would not give the model's answer."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings

import pytest

import transformers_models
from transformers_models import (
    BEST,
    KEEP,
    LENGTH,
    STREAMING,
    attention,
    fp,
    logits,
    make,
    masks,
    tokens,
    torch,
    transformers,
)

models, patched, quiet = transformers_models.models, transformers_models.patched, transformers_models.quiet

# ----------------------------------------------------------------- policies


def test_policies_by_layer(models, patched):
    model, ids = models("llama"), tokens()
    with_stats = {}
    for key, policy in {
        "first dense": {0: None, "default": STREAMING},
        "second only": {1: "streaming"},
        "last": {-1: STREAMING, 0: KEEP},
        "all": {"default": STREAMING},
    }.items():
        patched(model, policy)
        with fp.collect_stats(model) as with_stats[key]:
            logits(model, ids)
    assert [call.reason for call in with_stats["first dense"].calls] == ["policy", ""]
    assert [call.reason for call in with_stats["second only"].calls] == [
        "policy",
        "short",  # the sink and the window alone are 6 blocks of 128
    ]
    assert with_stats["last"].density[0].tolist() == [1.0] * 4 and (with_stats["last"].density[1] < 0.6).all()
    assert (with_stats["all"].density < 0.6).all()


def test_dense_policy_runs_the_kernel(models, patched):
    model, ids = models("llama"), tokens()
    wanted = logits(model, ids)
    patched(model, "dense")
    with fp.collect_stats(model) as stats:
        torch.testing.assert_close(logits(model, ids), wanted, atol=1e-4, rtol=1e-4)
    assert stats.sparse_calls == 2 and stats.density.tolist() == [[1.0] * 4] * 2


def test_names_with_options(models, patched):
    model = patched(models("llama"), "FlashPrefill", {"alpha": 0.5, "block_size": 64})
    assert model.model.layers[0].self_attn._flashprefill.policy == fp.FlashPrefill(alpha=0.5, block_size=64)


@pytest.mark.parametrize(
    ("policy", "options", "error", "words"),
    [
        ("flashprefil", None, ValueError, ["'flashprefil'", "dense", "flashprefill", "sketch", "streaming"]),
        ({0: "nope"}, None, ValueError, ["'nope'", "sketch"]),
        ({2: KEEP}, None, ValueError, ["2", "from -2 to 1"]),
        ({"first": KEEP}, None, TypeError, ["'first'", "default"]),
        ({True: KEEP}, None, TypeError, ["True"]),
        (3, None, TypeError, ["3", "a policy"]),
        (KEEP, {"alpha": 1}, TypeError, ["options"]),
        ({0: KEEP}, {"alpha": 1}, TypeError, ["options"]),
        ("streaming", {"alpha": 1}, TypeError, ["alpha is unknown; streaming takes", "sink_blocks"]),
        ("a_shape", {"alpha": 1}, TypeError, ["alpha is unknown; a_shape takes n_init", "block_size"]),
        ("streaming(sinks=1)", None, TypeError, ["sinks is unknown; streaming takes", "sink_blocks"]),
    ],
)
def test_bad_policies_are_refused_before_anything_changes(policy, options, error, words, models):
    model = models("llama")
    with pytest.raises(error) as caught:
        fp.patch_model(model, policy, options)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert model.config._attn_implementation == "sdpa" and not hasattr(model, "_flashprefill_before")


def test_8bit_products(models, patched, monkeypatch):
    """Every sparse layer's call permits them, and no other value is taken."""
    model, ids = patched(models("llama"), STREAMING, math="8bit"), tokens()
    seen = []
    monkeypatch.setattr(attention, "prefill_attention", spy(attention.prefill_attention, seen))
    wanted = logits(model, ids)
    assert seen == ["8bit", "8bit"]
    patched(model, STREAMING)
    assert torch.equal(logits(model, ids), wanted) and seen[2:] == ["input", "input"]
    for math, error in (("int4", ValueError), (8, TypeError)):
        with pytest.raises(error, match="math is"):
            fp.patch_model(model, STREAMING, math=math)


def spy(call, seen):
    """Return a function that notes the products asked for, and calls."""

    def noted(*args, **options):
        seen.append(options["math"])
        return call(*args, **options)

    return noted


def test_what_is_no_model_is_refused():
    for thing in (3, torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match="a Transformers model"):
            fp.patch_model(thing)
    gpt = transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=8, hidden_size=8, n_layer=1, n_head=2)
    )
    with pytest.raises(ValueError, match="AttentionInterface"):
        fp.patch_model(gpt)


# ---------------------------------------------------------- patch, unpatch


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_unpatch_restores_what_was(implementation):
    model, ids = make("gemma3"), tokens()
    model.set_attn_implementation(implementation)
    wanted, attributes = logits(model, ids), [sorted(vars(module)) for module in model.modules()]
    assert fp.patch_model(model, STREAMING) is model
    assert model.config._attn_implementation == "sparse_prefill"
    fp.patch_model(model, {0: BEST})
    assert not torch.equal(logits(fp.patch_model(model, STREAMING), ids), wanted)
    assert fp.unpatch_model(model) is model
    assert model.config._attn_implementation == implementation
    assert [sorted(vars(module)) for module in model.modules()] == attributes
    assert torch.equal(logits(model, ids), wanted)
    with pytest.raises(ValueError, match="not patched"):
        fp.unpatch_model(model)


def test_eager_models_fall_back_to_eager(models, patched):
    model, ids = make("llama"), tokens(1, 200)
    model.set_attn_implementation("eager")
    wanted = logits(model, ids)
    patched(model, {"default": None})
    assert torch.equal(logits(model, ids), wanted)


def test_a_copy_of_a_patched_model_is_its_own():
    model, ids = fp.patch_model(make("llama"), STREAMING), tokens()
    sparse = logits(model, ids)
    other = copy.deepcopy(model)
    fp.unpatch_model(model)
    assert torch.equal(logits(other, ids), sparse)
    fp.unpatch_model(other)
    assert torch.equal(logits(other, ids), logits(model, ids)) and not torch.equal(logits(model, ids), sparse)


def test_by_name_of_the_implementation(tmp_path, models, monkeypatch):
    model, ids = models("llama"), tokens()
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="flashprefill"
    ).eval()
    assert loaded.config._attn_implementation == "sparse_prefill"
    monkeypatch.setattr(attention, "_UNPATCHED", KEEP)
    for _ in range(2):
        with fp.collect_stats(loaded) as stats:
            got = logits(loaded, ids)
        assert stats.sparse_calls == 2
        torch.testing.assert_close(got, logits(model, ids), atol=1e-4, rtol=1e-4)
        loaded.set_attn_implementation("sdpa")
        loaded.set_attn_implementation("flashprefill")
    loaded.save_pretrained(tmp_path / "again")
    assert "prefill" not in (tmp_path / "again" / "config.json").read_text()
    # gpt-oss lists the relatives of FlashAttention that it takes, and would exchange us for one of them.
    assert make("gpt_oss", attn_implementation="flashprefill").config._attn_implementation == "sparse_prefill"


def test_importing_is_light_and_registers_in_any_order():
    code = """
import sys, flashprefill
assert not {"torch", "transformers"} & set(sys.modules), "heavy"
import transformers
assert "flashprefill.transformers" not in sys.modules
from transformers import modeling_utils
assert "flashprefill" in modeling_utils.AttentionInterface._global_mapping
assert not any("flashprefill" in type(finder).__module__ for finder in sys.meta_path)
assert callable(flashprefill.patch_model)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# ------------------------------------------------------------------- doubt


def warnings_of(run):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run()
    return result, [str(w.message) for w in caught if w.category is fp.transformers.FlashPrefillWarning]


def test_one_warning_for_each_reason(models, patched):
    model, ids = patched(models("gpt_oss"), KEEP), tokens()
    _, messages = warnings_of(lambda: [model.generate(ids, max_new_tokens=3) for _ in range(2)])
    assert len(messages) == 1 and "GptOssAttention" in messages[0] and "sinks" in messages[0]
    model = patched(models("gemma3"), KEEP)
    _, messages = warnings_of(lambda: [logits(model, ids) for _ in range(2)])
    assert len(messages) == 1 and "sliding window" in messages[0]
    _, messages = warnings_of(lambda: logits(patched(models("llama"), KEEP), ids))
    assert not messages


def holes(model):
    mask = torch.ones(1, LENGTH, dtype=torch.long)
    mask[0, 100:120] = 0
    return dict(attention_mask=mask, position_ids=torch.arange(LENGTH)[None])


def four_axes(model):
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    seen[200:, 50:90] = False
    return dict(attention_mask=seen[None, None])


def packed(model):
    return dict(position_ids=torch.cat([torch.arange(140), torch.arange(160)])[None], use_cache=False)


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        (holes, "custom mask"),
        (four_axes, "custom mask"),
        (packed, "custom mask"),
        (lambda model: dict(is_causal=False), "bidirectional"),
    ],
)
def test_masks_that_are_not_plainly_causal_run_dense(inputs, reason, models, patched):
    model, ids = models("llama"), tokens()
    wanted = logits(model, ids, **inputs(model))
    patched(model, BEST)
    with fp.collect_stats(model) as stats:
        got, messages = warnings_of(lambda: logits(model, ids, **inputs(model)))
    assert stats.fallbacks == {reason: 2} and len(messages) == 1
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-6)


def test_training_runs_dense():
    model, ids = make("llama", attention_dropout=0.5), tokens(1, 200)
    wanted = torch.autograd.grad(model(ids).logits.sum(), model.lm_head.weight)[0]
    fp.patch_model(model, STREAMING)
    with fp.collect_stats(model) as stats:
        got, messages = warnings_of(
            lambda: torch.autograd.grad(model(ids).logits.sum(), model.lm_head.weight)[0]
        )
    assert torch.equal(got, wanted) and stats.fallbacks == {"gradients": 2} and len(messages) == 1
    model.train()
    with fp.collect_stats(model) as stats, torch.no_grad():
        model(ids)
    assert stats.fallbacks == {"dropout": 2}


def test_output_attentions_are_given(models, patched):
    model, ids = make("llama"), tokens(1, 200)
    patched(model, STREAMING)
    with fp.collect_stats(model) as stats, torch.no_grad():
        weights = model(ids, output_attentions=True).attentions
    assert stats.fallbacks == {"attention weights": 2}
    assert weights[1].shape == (1, 4, 200, 200)
    torch.testing.assert_close(weights[1].sum(-1), torch.ones(1, 4, 200))


HEADS = dict(query=4, key=2, value=2)


class Module(torch.nn.Module):
    """What an attention layer is to the attention function."""

    is_causal = True
    num_key_value_groups = 2
    layer_idx = 0


def call(**changes):
    generator = torch.Generator().manual_seed(0)
    arguments = {name: torch.randn(1, n, LENGTH, 16, generator=generator) for name, n in HEADS.items()}
    arguments.update(attention_mask=None)
    arguments.update(changes)
    module = Module()
    setattr(module, attention.ATTRIBUTE, attention.Layer(KEEP, eager=False))
    with fp.collect_stats(module) as stats:
        out = attention.flashprefill_attention(module, **arguments)[0]
    return out, stats.calls[0].reason


def test_layers_that_the_kernel_does_not_do():
    out, reason = call()
    assert reason == "" and out.shape == (1, LENGTH, 4, 16)
    value = torch.randn(1, 2, LENGTH, 24)
    out, reason = call(value=value)
    assert reason == "value head_dim" and out.shape == (1, LENGTH, 4, 24)
    double = {name: torch.randn(1, n, LENGTH, 16).double() for name, n in HEADS.items()}
    assert call(**double)[1] == "layout"
    assert call(position_bias=torch.zeros(1, 4, LENGTH, LENGTH))[1] == "position bias"
    assert call(cu_seq_lens_q=torch.tensor([0, LENGTH]))[1] == "packed sequences"
    assert call(sliding_window=LENGTH - 1)[1] == "sliding window"
    assert call(sliding_window=LENGTH)[1] == ""
    # sinks with no eager function to leave them to: an error, not a wrong answer
    with pytest.raises(NotImplementedError, match="sinks"):
        call(s_aux=torch.zeros(4))


def test_a_device_without_a_backend_runs_dense(monkeypatch):
    def unsupported(*args, **kwargs):
        raise fp.UnsupportedError("no backend")

    wanted, _ = call()
    monkeypatch.setattr(attention, "prefill_attention", unsupported)
    got, reason = call()
    assert reason == "backend"
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------- masks


def test_roles_say_which_rows_see_which_keys():
    config = make("llama").config
    mask = torch.ones(5, 260, dtype=torch.bool)
    mask[1, :20] = mask[2, :20] = False
    mask[3] = False
    mask[4, 200:] = False
    roles = masks.flashprefill_mask(5, 140, 300, q_offset=120, attention_mask=mask, config=config)
    assert roles.shape == (5, 300, 1, 2) and masks.is_roles(roles, 140)
    plan = masks.plan_of(roles, 5, 140, 300)
    assert (plan.first_query, plan.used, plan.holes) == (120, 260, False)
    assert plan.spans == [(0, 1, 0, 140, 0, 260), (1, 3, 0, 140, 20, 260), (4, 5, 0, 80, 0, 200)]
    assert masks.plan_of(roles, 5, 140, 300) is plan
    wanted = transformers.masking_utils.sdpa_mask(5, 140, 300, q_offset=120, attention_mask=mask)
    assert torch.equal(masks.pairs_of(roles, plan), wanted)
    with pytest.raises(RuntimeError, match="made for"):
        masks.plan_of(roles, 5, 140, 299)
    with pytest.raises(RuntimeError):
        torch.randn(5, 4, 140, 300).masked_fill(roles, 0.0)


def test_masks_that_are_sdpas():
    config = make("llama").config
    whole = torch.ones(1, 200, dtype=torch.bool)
    assert masks.flashprefill_mask(1, 200, 200, attention_mask=whole, config=config) is None
    assert masks.flashprefill_mask(1, 1, 200, q_offset=199, config=config) is None
    for kwargs in (
        dict(allow_is_causal_skip=False),
        dict(
            local_size=100, mask_function=transformers.masking_utils.sliding_window_causal_mask_function(100)
        ),
        dict(kv_offset=8, attention_mask=torch.ones(1, 208, dtype=torch.bool)),
    ):
        kwargs = dict(batch_size=1, q_length=200, kv_length=200, **kwargs)
        wanted = transformers.masking_utils.sdpa_mask(**kwargs)
        got = masks.flashprefill_mask(config=config, **kwargs)
        assert got is wanted is None or torch.equal(got, wanted)


def test_a_vision_tower_stays_as_it_is(patched):
    small = dict(hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    text = transformers.Gemma3TextConfig(
        **small, vocab_size=96, num_key_value_heads=2, head_dim=16, layer_types=["full_attention"]
    )
    vision = transformers.SiglipVisionConfig(**small, image_size=168, patch_size=14)
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_id=95
    )
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    ids, image = tokens().clamp(max=90), torch.randn(1, 3, 168, 168)
    ids[0, 7:11] = 95
    inputs = dict(pixel_values=image, token_type_ids=(ids == 95).long())
    wanted, plain = logits(model, ids, **inputs), logits(model, ids)
    patched(model, KEEP)
    got, messages = warnings_of(lambda: logits(model, ids, **inputs))
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    assert len(messages) == 1 and "Gemma3Attention" in messages[0]  # image tokens see each other both ways
    with fp.collect_stats(model) as stats:
        torch.testing.assert_close(logits(model, ids), plain, atol=1e-4, rtol=1e-4)
    assert stats.sparse_calls == 1
