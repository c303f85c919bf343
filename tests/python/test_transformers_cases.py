"""Situations that users of this field have reported, each against the model's own attention."""

from __future__ import annotations

import itertools
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest

import transformers_models
from flashprefill.transformers import fallback, reasons
from transformers_models import (
    BEST,
    CACHE,
    KEEP,
    LENGTH,
    STREAMING,
    attention,
    fp,
    generated_in_batches,
    logits,
    make,
    masks,
    padding,
    positions,
    tokens,
    torch,
    transformers,
)

models, patched, quiet = transformers_models.models, transformers_models.patched, transformers_models.quiet


def warnings_of(run):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run()
    return result, [w for w in caught if w.category is fp.transformers.FlashPrefillWarning]


def static(model):
    return {CACHE: transformers.StaticCache(config=model.config, max_cache_len=512)}


# ----------------------------------------------------------------- devices

INPUTS = {
    "plain": lambda model, like: {},
    "padded": lambda model, like: dict(attention_mask=like(padding([LENGTH, 200], "left"))),
    "static": lambda model, like: static(model),
}


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("name", ["gemma3"])
def test_meta_tensors_run_dense(name, inputs, patched):
    from torch.utils.flop_counter import FlopCounterMode

    model = make(name).to("meta")
    ids = tokens(2).to("meta")

    def run():
        with FlopCounterMode(display=False) as counter:
            got = logits(model, ids, **INPUTS[inputs](model, lambda x: x.to("meta")))
        return got.shape, counter.get_total_flops()

    wanted = run() if inputs != "padded" else None  # SDPA's mask asks a meta tensor whether it has padding
    patched(model, KEEP)
    with fp.collect_stats(model) as stats:
        got, messages = warnings_of(run)
    assert got == (wanted or got) and got[0] == (2, LENGTH, 96) and not stats.sparse_calls
    messages = [m for m in messages if "sliding window" not in str(m.message)]
    assert len(messages) == 1 and "meta" in str(messages[0].message)


@pytest.mark.parametrize("inputs", INPUTS)
def test_fake_tensors_run_dense(inputs, patched):
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = patched(make("llama"), KEEP)

    def run():
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            return logits(model, mode.from_tensor(tokens(2)), **INPUTS[inputs](model, mode.from_tensor))

    with fp.collect_stats(model) as stats:
        got, messages = warnings_of(run)
    assert got.shape == (2, LENGTH, 96) and stats.fallbacks == {"fake tensors": 2} and len(messages) == 1


@pytest.mark.parametrize("device", ["xpu", "mps", "privateuseone", "hpu", "xla"])  # npu is a private one
def test_other_devices_run_dense(device):
    tensors = tuple(SimpleNamespace(device=torch.device(device)) for _ in "qkv")
    assert reasons.why_never(Layer(), tensors, 0.0, {}) == "device"
    assert not masks.can_read(None, device)


class Layer(torch.nn.Module):
    """What an attention layer is to the attention function."""

    is_causal = True
    num_key_value_groups = 2
    layer_idx = 0


def call(tensors, **changes):
    module = Layer()
    setattr(module, attention.ATTRIBUTE, attention.Layer(KEEP, eager=False))
    with fp.collect_stats(module) as stats:
        out = attention.flashprefill_attention(module, *tensors, None, **changes)[0]
    return out, stats.calls[0].reason


def test_operators_that_are_counted_are_the_models_own(patched):
    from torch.utils.flop_counter import FlopCounterMode

    model, ids = make("llama"), tokens()

    def count():
        with FlopCounterMode(display=False) as counter:
            logits(model, ids)
        return counter.get_total_flops()

    wanted = count()
    patched(model, KEEP)
    assert count() == wanted


def test_functional_transforms_run_dense(patched):
    model = patched(make("llama"), STREAMING)
    names, ids = dict(model.named_parameters()), tokens(1, 200)

    def loss(weights):
        return torch.func.functional_call(model, weights, (ids,)).logits.square().mean()

    got = torch.func.grad(loss)(names)
    fp.unpatch_model(model)
    wanted = torch.func.grad(loss)(names)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name])


# ------------------------------------------------------------------- traces


class Wrapped(torch.nn.Module):
    def __init__(self, model, masked):
        super().__init__()
        self.model, self.masked = model, masked

    def forward(self, ids, mask):
        return self.model(ids, attention_mask=mask if self.masked else None, use_cache=False).logits


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("traced_at", [50, LENGTH])
def test_traces_are_dense_and_right_at_other_lengths(traced_at, masked, implementation, patched):
    model = make("llama")
    model.set_attn_implementation(implementation)
    patched(model, STREAMING)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        example = tokens(2, traced_at), padding([traced_at, traced_at - 20], "left", traced_at)
        traced = torch.jit.trace(Wrapped(model, masked), example, check_trace=False)
        fp.unpatch_model(model)
        for length in (40, 200, 333):
            ids, mask = tokens(2, length, seed=5), padding([length, length - 9], "left", length)
            wanted, got = Wrapped(model, masked)(ids, mask), traced(ids, mask)
            rows = mask.bool() if masked else torch.ones_like(mask).bool()
            torch.testing.assert_close(got[rows], wanted[rows], atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------- dtypes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_autocast_is_sparse(name, dtype, patched):
    model, ids = make(name), tokens(2)
    with torch.autocast("cpu", dtype=dtype):
        wanted = logits(model, ids)
        patched(model, KEEP)
        with fp.collect_stats(model) as stats:
            got = logits(model, ids)
    assert stats.sparse_calls >= 1 and "layout" not in stats.fallbacks
    assert got.dtype == wanted.dtype
    error = (got.float() - wanted.float()).norm() / wanted.float().norm()
    assert error < (0.05 if dtype == torch.bfloat16 else 0.01)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_mixed_dtypes_under_autocast_are_cast_as_sdpa_does(dtype):
    torch.manual_seed(0)
    for kinds in itertools.product(DTYPES, repeat=3):
        tensors = [torch.randn(1, h, LENGTH, 16).to(kind) for h, kind in zip((4, 2, 2), kinds, strict=True)]
        with torch.autocast("cpu", dtype=dtype):
            out, reason = call(tensors)
            sdpa = torch.nn.functional.scaled_dot_product_attention
            wanted = sdpa(*tensors, is_causal=True, enable_gqa=True).transpose(1, 2)
        assert reason == "" and out.dtype == wanted.dtype == dtype
        torch.testing.assert_close(out, wanted, atol=0.02, rtol=0.02)


def test_dtypes_that_cannot_be_are_named():
    for kinds in itertools.permutations((torch.float32, torch.bfloat16, torch.float64)):
        fallback._warned.clear()
        tensors = [torch.randn(1, h, LENGTH, 16).to(kind) for h, kind in zip((4, 2, 2), kinds, strict=True)]

        def run(tensors=tensors):
            with pytest.raises(RuntimeError, match="dtype"):  # SDPA's own
                call(tensors)

        _, messages = warnings_of(run)
        assert len(messages) == 1
        for kind in kinds:
            assert str(kind).removeprefix("torch.") in str(messages[0].message)


# ----------------------------------------------------------------- training


def trainable(model, what):
    model.requires_grad_(False)
    for part in what(model):
        part.requires_grad_(True)
    return model.train()


PARTS = {
    "upper layer": lambda model: [model.model.layers[1]],
    "head": lambda model: [model.lm_head],
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("checkpoints", [None, False, True])
def test_training_a_part_is_dense(part, checkpoints, patched):
    model, ids = trainable(make("llama"), PARTS[part]), tokens(2)
    if checkpoints is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpoints})
        model.enable_input_require_grads()

    def gradients():
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    wanted = gradients()
    patched(model, STREAMING)
    with fp.collect_stats(model) as stats:
        got, messages = warnings_of(gradients)
    assert not stats.sparse_calls and set(stats.fallbacks) == {"gradients"} and len(messages) == 1
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)
    model.eval()
    with fp.collect_stats(model) as stats:
        logits(model, ids)
    assert stats.sparse_calls == 2


def test_inputs_that_require_grad_in_some_layers_are_told(patched):
    model, ids = patched(make("llama").requires_grad_(False), STREAMING), tokens()
    delta = torch.zeros(1, 1, 48, requires_grad=True)
    model.model.layers[1].register_forward_pre_hook(lambda layer, args: (args[0] + delta, *args[1:]))
    with fp.collect_stats(model) as stats:
        _, messages = warnings_of(lambda: model(ids).logits.sum().backward())
    assert [call.reason for call in stats.calls] == ["", "gradients"]
    assert any("runs sparse although grad mode is on" in str(m.message) for m in messages)
    model.train()
    with fp.collect_stats(model) as stats:
        model(ids)
    assert stats.fallbacks == {"gradients": 2}


# -------------------------------------------------------------------- masks


@pytest.mark.parametrize("new", [200, 60])
def test_a_mask_of_the_new_tokens_alone_is_told(new, models, patched):
    model, ids = patched(models("llama"), KEEP), tokens(2, 200 + new)

    def second(length):
        cache = transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :200], **{CACHE: cache})
            return model(ids[:, 200:], attention_mask=torch.ones(2, length).long(), **{CACHE: cache}).logits

    whole = logits(model, ids)[:, 200:]
    got, messages = warnings_of(lambda: second(200 + new))
    assert not messages
    torch.testing.assert_close(got, whole, atol=1e-4, rtol=1e-4)
    _, messages = warnings_of(lambda: [second(new), second(new)])
    assert len(messages) == 1 and messages[0].filename == __file__
    for words in (f"{new} entries", f"200 cached and {new} new", "cover the cached tokens"):
        assert words in str(messages[0].message)


def test_rows_of_nothing_but_padding_are_told(models, patched):
    model, ids = patched(models("llama"), KEEP), tokens(3)
    mask = padding([LENGTH, 0, 0], "left")
    inputs = dict(attention_mask=mask, position_ids=positions(mask))
    got, messages = warnings_of(lambda: [logits(model, ids, **inputs) for _ in range(2)][0])
    assert torch.isfinite(got).all() and len(messages) == 1 and "padding" in str(messages[0].message)
    _, messages = warnings_of(  # the first chunks of a short prompt are padding, as they must be
        lambda: model.generate(
            ids, attention_mask=padding([LENGTH, 40, 200], "left"), max_new_tokens=2, prefill_chunk_size=140
        )
    )
    assert not messages


# ---------------------------------------------------- warnings, and what is missing


def test_models_in_which_nothing_can_run_sparse_are_told():
    small = dict(vocab_size=96, hidden_size=32, num_hidden_layers=2, pad_token_id=0)
    useless = {
        "attention layers": transformers.MambaForCausalLM(transformers.MambaConfig(**small, state_size=4)),
        "not causal": transformers.BertModel(
            transformers.BertConfig(**small, num_attention_heads=2, intermediate_size=32)
        ),
        "position bias": transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=96, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
        ),
    }
    for words, model in useless.items():
        _, messages = warnings_of(lambda model=model: fp.patch_model(model))
        assert len(messages) == 1 and messages[0].filename == __file__
        assert words in str(messages[0].message) and type(model).__name__ in str(messages[0].message)
    for name in transformers_models.MODELS:
        _, messages = warnings_of(lambda name=name: fp.patch_model(make(name)))
        assert not messages


@pytest.mark.parametrize("how", ["forward", "generate", "compiled"])
def test_warnings_point_at_the_users_line(how, patched):
    model, ids = patched(make("gpt_oss"), KEEP), tokens()
    runs = {
        "forward": lambda: logits(model, ids),
        "generate": lambda: model.generate(ids, max_new_tokens=2),
        "compiled": lambda: torch.no_grad()(torch.compiler.disable(model))(ids),
    }
    _, messages = warnings_of(runs[how])
    assert [message.filename.endswith(".py") for message in messages] == [True]
    assert messages[0].filename in (__file__, transformers_models.__file__)


@pytest.mark.parametrize("missing", ["torch", "transformers"])
@pytest.mark.parametrize("call", ["fp.patch_model", "fp.collect_stats", "fp.unpatch_model"])
def test_a_missing_package_is_one_line(missing, call):
    code = f"""
import sys
sys.modules[{missing!r}] = None
import flashprefill as fp
try:
    {call}(None)
except ModuleNotFoundError as error:
    assert {missing!r} in str(error) and "pip install" in str(error) and "\\n" not in str(error), error
    assert error.__suppress_context__
else:
    raise SystemExit("no error")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# ------------------------------------------------------- continuous batching


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gemma3", "gpt_oss", "mistral_window"])
def test_continuous_batching(name, patched):
    model = make(name)
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in (LENGTH, 200, 50, 150)]
    before = model.config._attn_implementation

    def run():
        return generated_in_batches(model, prompts)

    wanted = run()
    patched(model, KEEP)
    with fp.collect_stats(model) as stats:
        got, messages = warnings_of(run)
    assert got == wanted and model.config._attn_implementation == "sparse_prefill"
    assert bool(stats.sparse_calls) == (name not in ("gpt_oss", "mistral_window"))
    assert len(messages) == (name in ("gemma3", "gpt_oss", "mistral_window"))
    if name == "llama":
        patched(model, BEST)
        with fp.collect_stats(model) as stats:
            run()
        assert stats.mean_density < 0.95
    fp.unpatch_model(model)
    assert run() == wanted and model.config._attn_implementation == before


def test_continuous_batching_where_it_must_be_dense(patched, monkeypatch):
    """As on a GPU, whose steps are CUDA graphs."""
    from transformers.generation.continuous_batching import ContinuousBatchingManager

    model = patched(make("llama"), KEEP)
    monkeypatch.setattr(type(model), "device", property(lambda self: torch.device("cuda")))
    manager = object.__new__(ContinuousBatchingManager)
    manager._original_attn_impl = None
    _, messages = warnings_of(lambda: manager.switch_to_cb_friendly_attn(model, False))
    assert model.config._attn_implementation == "sdpa" and len(messages) == 1
    model.set_attn_implementation(manager._original_attn_impl)
    assert model.config._attn_implementation == "sparse_prefill"
