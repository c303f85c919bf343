"""Ways to use a patched model: caches of every kind, sharded models, decoding with drafts, adapters."""

from __future__ import annotations

import os

import pytest

import transformers_models
from transformers_models import (
    CACHE,
    EXPERTS,
    KEEP,
    LENGTH,
    STREAMING,
    TINY,
    fp,
    generated_in_batches,
    logits,
    make,
    padding,
    tokens,
    torch,
    transformers,
)

models, patched, quiet = transformers_models.models, transformers_models.patched, transformers_models.quiet

WINDOWS = dict(use_sliding_window=True, sliding_window=100, max_window_layers=1)


def qwen2_moe():
    """Its first layers see everything, the others a window, so that their caches differ in length."""
    fields = {**TINY, **EXPERTS, **WINDOWS, "num_hidden_layers": 3, "shared_expert_intermediate_size": 32}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.Qwen2MoeConfig(**fields)).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("name", ["gemma3", "qwen2_moe"])
@pytest.mark.parametrize("chunk", [None, 140])
@pytest.mark.parametrize("cache", [None, "static"])
def test_caches_of_unequal_length(name, chunk, cache, patched):
    model = qwen2_moe() if name == "qwen2_moe" else make(name)
    inputs = dict(attention_mask=padding([LENGTH, 170], "left"), max_new_tokens=3, do_sample=False)
    inputs.update(prefill_chunk_size=chunk, cache_implementation=cache)
    wanted = model.generate(tokens(2), **inputs)
    patched(model, KEEP)
    with fp.collect_stats(model) as stats:
        got = model.generate(tokens(2), **inputs)
    assert torch.equal(got, wanted) and stats.sparse_calls and stats.fallbacks["sliding window"]


def test_continuous_batching_where_only_the_layer_knows_its_window(patched):
    model, ids = qwen2_moe(), tokens(1)[0].tolist()
    prompts = [ids, ids[:150]]
    wanted = generated_in_batches(model, prompts)
    patched(model, KEEP)
    with fp.collect_stats(model) as stats:
        got = generated_in_batches(model, prompts)
    assert got == wanted and stats.sparse_calls and stats.fallbacks["sliding window"]


@pytest.mark.parametrize("chunk", [None, 140])
def test_quantised_caches(chunk, patched):
    """By HQQ; quanto, the other backend, compiles an extension for minutes when it is first used."""
    pytest.importorskip("hqq")
    model = make("llama")
    inputs = dict(
        max_new_tokens=3, do_sample=False, cache_implementation="quantized", prefill_chunk_size=chunk
    )
    inputs.update(cache_config=dict(backend="hqq", nbits=4, axis_key=0, axis_value=0))
    wanted = model.generate(tokens(), **inputs)
    patched(model, KEEP)
    with fp.collect_stats(model) as stats:
        got = model.generate(tokens(), **inputs)
    assert torch.equal(got, wanted) and stats.sparse_calls == (2 if chunk is None else 4)


class StandInStream:
    """A stream for a machine without a GPU, where work is done when the call returns."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def wait_stream(self, _):
        pass


@pytest.fixture
def offloads_on_cpu(monkeypatch):
    """Let Transformers' offloaded caches run on a CPU: what is offloaded is NaN until it is fetched again.

    They ask for CUDA's streams, and on a CPU their copies would be no copies.
    """
    from transformers import cache_utils

    def offload(layer):
        if layer.is_initialized:
            layer.away = layer.keys, layer.values
            layer.keys, layer.values = (torch.full_like(x, torch.nan) for x in layer.away)
            offloads.append(layer)

    def prefetch(layer):
        if layer.is_initialized and layer.away is not None:
            layer.keys, layer.values = layer.away
            layer.away = None

    offloads: list[object] = []
    monkeypatch.setattr(torch, "Stream", StandInStream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda _: StandInStream())
    monkeypatch.setattr(cache_utils.CacheLayerMixin, "away", None, raising=False)
    monkeypatch.setattr(cache_utils.CacheLayerMixin, "offload", offload)
    monkeypatch.setattr(cache_utils.CacheLayerMixin, "prefetch", prefetch)
    return offloads


def generated_offloaded(model, ids, kind, policy, patched):
    """Tokens under a cache in place, and under an offloaded one; with statistics of the latter."""
    patched(model, policy)
    inputs = dict(max_new_tokens=4, do_sample=False, cache_implementation=None, disable_compile=True)
    wanted = model.generate(ids, **inputs)
    with fp.collect_stats(model) as stats:
        got = model.generate(ids, **{**inputs, "cache_implementation": kind})
    return wanted, got, stats


@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
@pytest.mark.parametrize("policy", [KEEP, STREAMING], ids=["keep", "streaming"])
def test_offloaded_caches(kind, policy, patched, offloads_on_cpu):
    model, ids = make("llama", num_hidden_layers=3), tokens(2)
    wanted, got, stats = generated_offloaded(model, ids, kind, policy, patched)
    assert torch.equal(got, wanted) and stats.sparse_calls == 3 and len(offloads_on_cpu) >= 3
    assert (stats.density.mean() < 0.8) == (policy is STREAMING)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the copies are true ones on a GPU alone")
@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
@pytest.mark.parametrize("policy", [fp.FlashPrefill(alpha=0.0), fp.Streaming()], ids=["keep", "streaming"])
def test_offloaded_caches_on_a_gpu(kind, policy, patched):
    """Of 5,000 tokens, since a GPU keeps everything of up to 3,072; decoding is not compiled.

    The first token is what the prompt gave. Those after it are compared under CUDA_LAUNCH_BLOCKING=1 alone:
    otherwise an unpatched model's differ from run to run under an offloaded cache (H200, PyTorch 2.11,
    Transformers 5.17), since its copies race with the attention that reads them.
    """
    length = None if os.environ.get("CUDA_LAUNCH_BLOCKING") == "1" else 5001
    model = make("llama", head_dim=64, num_hidden_layers=3, max_position_embeddings=8192)
    model, ids = model.to("cuda", torch.bfloat16), tokens(1, 5000).to("cuda")
    wanted, got, stats = generated_offloaded(model, ids, kind, policy, patched)
    assert torch.equal(got[:, :length], wanted[:, :length])
    assert got.shape == wanted.shape and stats.sparse_calls == 3
    assert (stats.density.mean() < 0.8) == isinstance(policy, fp.Streaming)


def test_decoding_with_drafts(patched):
    model, assistant = make("llama"), make("llama", num_hidden_layers=1)
    ids = tokens(1, 100).repeat(1, 3)
    uses = [dict(prompt_lookup_num_tokens=4), dict(assistant_model=assistant)]
    wanted = [model.generate(ids, max_new_tokens=8, do_sample=False, **use) for use in uses]
    patched(model, KEEP)
    patched(assistant, STREAMING)
    for use, tokens_wanted in zip(uses, wanted, strict=True):
        with fp.collect_stats(model) as stats:
            got = model.generate(ids, max_new_tokens=8, do_sample=False, **use)
        assert torch.equal(got, tokens_wanted) and stats.sparse_calls == 2


def test_a_sharded_model(tmp_path, patched):
    accelerate = pytest.importorskip("accelerate")
    model, ids = make("llama"), tokens(2)
    wanted = logits(model, ids)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places.update({"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"})
    sharded = accelerate.dispatch_model(
        make("llama"), places, main_device="cpu", offload_dir=tmp_path, force_hooks=True
    )
    patched(sharded, KEEP)
    with fp.collect_stats(sharded) as stats:
        got = logits(sharded, ids)
    assert stats.sparse_calls == 2
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    fp.unpatch_model(sharded)
    assert torch.equal(logits(sharded, ids), wanted)


class Adapted(torch.nn.Linear):
    """A linear layer with adapters of low rank, one of which may be on."""

    active = None

    def forward(self, x):
        out = super().forward(x)
        return out if self.active is None else out + x @ self.a[self.active] @ self.b[self.active]


def test_adapters_switched_between_calls(patched):
    model, ids = make("llama"), tokens()
    layers = [module.self_attn.q_proj for module in model.model.layers]
    generator = torch.Generator().manual_seed(0)
    for layer in layers:
        layer.__class__ = Adapted
        layer.a = [torch.randn(48, 4, generator=generator) / 8 for _ in range(2)]
        layer.b = [torch.randn(4, 64, generator=generator) for _ in range(2)]

    def run():
        results = []
        for active in (None, 0, 1, 0, None):
            for layer in layers:
                layer.active = active
            results.append(logits(model, ids))
        return results

    wanted = run()
    patched(model, KEEP)
    with fp.collect_stats(model) as stats:
        got = run()
    assert stats.sparse_calls == 10 and not torch.equal(wanted[0], wanted[1])
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_peft(patched):
    peft = pytest.importorskip("peft")
    ids = tokens()
    model = peft.get_peft_model(make("llama"), peft.LoraConfig(init_lora_weights=False), "one")
    model.add_adapter("two", peft.LoraConfig(init_lora_weights=False))
    model.eval()

    def run():
        results = []
        for name in ("one", "two", "one"):
            model.set_adapter(name)
            results.append(logits(model, ids))
        return results

    wanted = run()
    fp.patch_model(model, KEEP)
    for a, b in zip(run(), wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    fp.unpatch_model(model)
    assert all(torch.equal(a, b) for a, b in zip(run(), wanted, strict=True))


def test_a_cache_that_is_cropped_and_read_on(patched):
    model, ids = patched(make("llama"), KEEP), tokens(1, 400)
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :250], **{CACHE: cache})
        cache.crop(-50)
        got = model(ids[:, 200:], **{CACHE: cache}).logits
    torch.testing.assert_close(got, logits(model, ids)[:, 200:], atol=1e-4, rtol=1e-4)
