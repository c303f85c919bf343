"""Transformers: models of every kind that goes through the door, against their own dense attention.

Where every block is kept, logits and generated tokens must be those of dense attention; where blocks are
left out, those of SDPA under the selection spelled out as a mask of tokens.
"""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import transformers_models
from flashprefill.apps.errors import UsageError
from flashprefill.apps.models import bundled_gguf
from transformers_models import (
    ALL_DENSE,
    BEST,
    CACHE,
    KEEP,
    LENGTH,
    MODELS,
    PADDED_DENSE,
    SHARED,
    STREAMING,
    attention,
    check_reasons,
    fp,
    logits,
    make,
    padding,
    positions,
    tokens,
    torch,
    transformers,
)

models, patched, quiet = transformers_models.models, transformers_models.patched, transformers_models.quiet

# ------------------------------------------------------- everything kept


@pytest.mark.parametrize("name", MODELS)
def test_keeping_everything_is_dense_attention(name, models, patched):
    model, ids = models(name), tokens()
    wanted = logits(model, ids)
    patched(model, KEEP)
    with fp.collect_stats(model) as stats:
        got = logits(model, ids)
    check_reasons(stats, name)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    if name in ALL_DENSE:
        assert torch.equal(got, wanted)
        assert np.isnan(stats.density).all()
    else:
        assert np.nanmin(stats.density) == 1.0


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches(name, side, models, patched):
    model, ids = models(name), tokens(4)
    mask = padding([LENGTH, 170, 1, 170], side)
    inputs = dict(attention_mask=mask, position_ids=positions(mask))
    wanted = logits(model, ids, **inputs)
    patched(model, KEEP)
    with fp.collect_stats(model) as stats:
        got = logits(model, ids, **inputs)
    check_reasons(stats, name, sparse=name not in PADDED_DENSE)
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got[mask.bool()], wanted[mask.bool()], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padded", [False, True])
def test_chunks_over_a_growing_cache(name, padded, models, patched):
    model, ids = models(name), tokens(2)
    mask = padding([LENGTH, 211] if padded else [LENGTH, LENGTH], "left")
    places = positions(mask)
    wanted = logits(model, ids, attention_mask=mask, position_ids=places)
    patched(model, KEEP)
    cache = transformers.DynamicCache(config=model.config)
    got = []
    with fp.collect_stats(model) as stats, torch.no_grad():
        for begin, end in ((0, 131), (131, 261), (261, LENGTH)):
            out = model(
                ids[:, begin:end],
                attention_mask=mask[:, :end],
                position_ids=places[:, begin:end],
                **{CACHE: cache},
            )
            got.append(out.logits)
    check_reasons(stats, name, sparse=not (padded and name in PADDED_DENSE))
    assert stats.fallbacks["short"] >= 1  # the last 39 rows
    torch.testing.assert_close(torch.cat(got, 1)[mask.bool()], wanted[mask.bool()], atol=1e-4, rtol=1e-4)


GENERATE = {
    "greedy": dict(do_sample=False),
    "beams": dict(do_sample=False, num_beams=2, num_return_sequences=2),
    "sampling": dict(do_sample=True, temperature=0.8, top_k=20),
    "chunks": dict(do_sample=False, prefill_chunk_size=140),
    "static": dict(do_sample=False, cache_implementation="static"),
    "static chunks": dict(do_sample=False, cache_implementation="static", prefill_chunk_size=140),
}
GENERATED = [(name, mode) for name in ("llama", "gemma3") for mode in GENERATE]
GENERATED += [("gpt_oss", mode) for mode in ("beams", "static", "chunks")]
GENERATED += [(name, "greedy") for name in MODELS if name not in ("llama", "gemma3", *PADDED_DENSE)]
GENERATED += [("qwen3_moe", "beams"), ("mistral_window", "chunks")]


@pytest.mark.parametrize(("name", "mode"), GENERATED)
@pytest.mark.parametrize("padded", [False, True])
def test_generate(name, mode, padded, models, patched):
    model, ids = models(name), tokens(2, seed=3)
    inputs = dict(attention_mask=padding([LENGTH, 180] if padded else [LENGTH, LENGTH], "left"))
    inputs.update(max_new_tokens=4, **GENERATE[mode])
    torch.manual_seed(7)
    wanted = model.generate(ids, **inputs)
    patched(model, KEEP)
    torch.manual_seed(7)
    with fp.collect_stats(model) as stats:
        got = model.generate(ids, **inputs)
    check_reasons(stats, name)
    assert torch.equal(got, wanted)
    assert stats.fallbacks["decode"] == 2 * 3  # layers times tokens after the first


def test_generate_from_a_cached_prefix(models, patched):
    model, ids = models("llama"), tokens(1, 420)
    wanted = model.generate(ids, max_new_tokens=6, do_sample=False)
    patched(model, KEEP)
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :211], **{CACHE: cache})
    with fp.collect_stats(model) as stats:
        got = model.generate(ids, **{CACHE: cache}, max_new_tokens=6, do_sample=False)
    assert torch.equal(got, wanted)
    assert [(call.rows, call.keys) for call in stats.calls if not call.reason] == [(209, 420)] * 2


def test_the_table_of_models_is_current():
    tool = Path(__file__).parents[2] / "tools" / "model_table.py"
    if not tool.exists():
        pytest.skip("the tools are in a checkout only")
    table = runpy.run_path(str(tool))
    assert table["page"]() == table["PAGE"].read_text()


# ------------------------------------------------------------ real sparsity


def spelled_out(policy):
    """Return attention by SDPA under the policy's selection, as a mask of tokens."""

    def forward(module, query, key, value, mask, scaling=None, **kwargs):
        rows, keys = query.shape[2], key.shape[2]
        chosen = fp.select(
            query.transpose(1, 2),
            key.transpose(1, 2),
            policy,
            softmax_scale=scaling,
            final_chunk=kwargs["final_chunk"],
        )
        place = torch.arange(keys - rows, keys)
        allowed = []
        for b in range(query.shape[0]):
            keep = chosen.dense(b).repeat_interleave(query.shape[1] // chosen.heads, 0)
            by_row = keep[:, torch.arange(rows) // chosen.tile_tokens]
            allowed.append(by_row[:, :, torch.arange(keys) // chosen.block_size])
        allowed = torch.stack(allowed) & (torch.arange(keys)[None, :] <= place[:, None])
        group = query.shape[1] // key.shape[1]
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1), allowed, scale=scaling
        )
        return out.transpose(1, 2), None

    return forward


@pytest.mark.parametrize("policy", [BEST, STREAMING, SHARED], ids=["best", "streaming", "shared"])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "mistral"])
def test_sparse_prefill_is_attention_under_the_selection(name, policy, models, patched):
    model, ids = models(name), tokens(2)
    name = "spelled_out"
    transformers.AttentionInterface.register(name, spelled_out(policy))
    before = model.config._attn_implementation
    runs = []
    try:
        for how in (name, None):
            if how is None:
                patched(model, policy)
            else:
                model.set_attn_implementation(name)
            cache = transformers.DynamicCache(config=model.config)
            with torch.no_grad(), fp.collect_stats(model) as stats:
                parts = [
                    model(ids[:, :150], **{CACHE: cache}, final_chunk=False).logits,
                    model(ids[:, 150:], **{CACHE: cache}, final_chunk=True).logits,
                ]
            runs.append(torch.cat(parts, 1))
            model.set_attn_implementation(before)
    finally:
        del transformers.AttentionInterface._global_mapping[name]
    torch.testing.assert_close(*runs, atol=1e-4, rtol=1e-4)
    assert stats.sparse_calls == 4 and not stats.fallbacks
    assert stats.density.shape == (2, 4)
    assert (stats.density < 0.95).all() and (stats.density > 0.05).all()
    assert np.isclose(stats.density.mean(), stats.mean_density)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_for_a_sequence(side, models, patched):
    """Tiles and blocks count from a sequence's first token: padded or alone, it has the same result."""
    model, ids = patched(models("llama"), replace(BEST, dense_tail_blocks=0)), tokens(3)
    lengths = [LENGTH, 250, 210]
    mask = padding(lengths, side)
    got = logits(model, ids, attention_mask=mask, position_ids=positions(mask))
    for b, length in enumerate(lengths):
        own = mask[b].bool()
        with fp.collect_stats(model) as stats:
            alone = logits(model, ids[b : b + 1, own])
        assert stats.sparse_calls == 2 and stats.mean_density < 0.9
        assert alone.shape[1] == length
        torch.testing.assert_close(got[b, own], alone[0], atol=1e-4, rtol=1e-4)


def test_static_cache_is_read_as_far_as_it_is_used(models, patched):
    model, ids = patched(models("llama"), BEST), tokens(2)
    wanted = logits(model, ids)
    cache = transformers.StaticCache(config=model.config, max_cache_len=512)
    with fp.collect_stats(model) as stats:
        got = logits(model, ids, **{CACHE: cache})
    assert [(call.rows, call.keys, call.reason) for call in stats.calls] == [(LENGTH, 512, "")] * 2
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------- final chunk


def test_only_the_last_chunk_of_generate_has_the_dense_tail(models, patched, monkeypatch):
    model, ids = patched(models("llama"), BEST), tokens(2, 430)
    seen = []
    real = attention.prefill_attention

    def spy(q, *args, final_chunk, **kwargs):
        seen.append((q.shape[0], q.shape[1], final_chunk))
        return real(q, *args, final_chunk=final_chunk, **kwargs)

    monkeypatch.setattr(attention, "prefill_attention", spy)
    arguments = dict(max_new_tokens=2, do_sample=False, prefill_chunk_size=150)
    model.generate(ids, **arguments)
    assert seen[::2] == [(2, 150, False), (2, 150, False), (2, 130, True)]
    seen.clear()
    model.generate(ids, attention_mask=padding([430, 250], "left", 430), **arguments)
    # 180 slots of padding: the second sequence has nothing in the first chunk
    assert seen == 2 * [(1, 150, False)] + 2 * [(1, 150, False), (1, 120, False)] + 2 * [(1, 130, True)] * 2
    seen.clear()
    with torch.no_grad():
        model(ids[:, :200])
        model(ids[:, :200], final_chunk=False)
    assert seen[::2] == [(2, 200, True), (2, 200, False)]


# ----------------------------------------------------------------- the rest


def test_threads_are_torchs(models, patched, monkeypatch):
    from flashprefill import _engine

    model, threads = patched(models("llama"), KEEP), []
    real = _engine.exec_of
    monkeypatch.setattr(_engine, "exec_of", lambda *args: threads.append(real(*args).threads) or real(*args))
    before = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            logits(model, tokens())
    finally:
        torch.set_num_threads(before)
    assert threads == [1, 1, 2, 2]


def test_the_table_of_statistics(models, patched):
    model, ids = patched(models("gemma3"), BEST), tokens()
    with fp.collect_stats(model) as stats:
        model.generate(ids, max_new_tokens=3, do_sample=False)
    table = str(stats)
    assert len(table.splitlines()) == 1 + 2 + 2
    assert "sliding window: a sliding window" in table and "decode: one query row" in table
    assert stats.seconds >= stats.select_seconds + stats.attend_seconds > 0
    assert np.isnan(stats.density[0]).all() and (stats.density[1] < 1).all()
    with fp.collect_stats(models("llama")) as other:
        logits(model, ids)
    assert not other.calls


@pytest.mark.parametrize("padded", [False, True])
def test_compiled_models(padded, patched):
    model, ids = patched(make("llama"), BEST), tokens(2)
    mask = padding([LENGTH, 200], "left") if padded else None
    inputs = dict(attention_mask=mask) if padded else {}
    if padded:
        fp.unpatch_model(model)
        wanted = logits(model, ids, **inputs)
        patched(model, BEST)
    else:
        wanted = logits(model, ids)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(str(graph.code))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    got = logits(compiled, ids, **inputs)
    torch._dynamo.reset()
    assert "".join(graphs).count("flashprefill.prefill") == (0 if padded else 2)
    rows = mask.bool() if padded else torch.ones(2, LENGTH, dtype=torch.bool)
    torch.testing.assert_close(got[rows], wanted[rows], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_real_model_reads_its_own_licence(patched):
    pytest.importorskip("gguf")
    try:
        gguf = bundled_gguf()
    except UsageError as error:
        pytest.skip(str(error))
    load = dict(gguf_file=gguf.name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **load)
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, **load, dtype=torch.float32).eval()
    text = (Path(__file__).parents[2] / "LICENSE").read_text()
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :2048]
    wanted = logits(model, ids)[0, -256:]
    patched(model, fp.FlashPrefill(alpha=0.08))
    with fp.collect_stats(model) as stats:
        got = logits(model, ids)[0, -256:]
    assert stats.sparse_calls == 30 and stats.mean_density < 1.0
    assert (got.argmax(-1) == wanted.argmax(-1)).float().mean() > 0.9
