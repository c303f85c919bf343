"""Features of the engine that batches pass through: 8-bit caches, speculation, adapters; all blocks kept."""

import json

import pytest
from answers import Request, assert_same, tokens
from beside import assert_equal, engines_own
from engine import CUDA
from test_layers import DENSE, LIMIT, NEAR, OPTIONS, S, length

from flashprefill import vllm as plugin

ASKED = [
    Request(tokens(length(9000), 1), 12),
    Request(tokens(length(700), 2), 20),
    Request(tokens(length(5000), 3), 9),
]
REPEATED = [Request(tokens(50, 4) * (length(8000) // 50), 24), Request(tokens(length(6000), 5), 24)]


@pytest.mark.skipif(not CUDA, reason="the GPU backend's caches")
@pytest.mark.parametrize("name", ["fp8", "fp8_e4m3"])
def test_a_cache_of_8_bits(engines, llama, name):
    """FP8 keys and values are read sparse, near what the engine's own FP8 kernel makes of them."""
    engine = engines(llama, DENSE, **OPTIONS, kv_cache_dtype=name, block_size=16)
    with engines_own() as found:
        ours, counted = engine.run(ASKED)
    assert counted["sparse_rows"] > length(10000) and not counted["fallbacks"]
    assert [len(a.tokens) for a in ours] == [request.new for request in ASKED]
    # That one rounds weights and queries to 3 bits of mantissa too.
    assert found and all(each.finite and each.rms < 0.15 for each in found), found


def test_speculation(engines, llama):
    """Drafts are rows of requests that generate, so the engine's."""
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
    asked = {**OPTIONS, "speculative_config": drafts}
    stock, _ = engines(llama, None, **asked).run(REPEATED)
    engine = engines(llama, DENSE, **asked)
    engine.chunk(2048 // S)
    with engines_own() as found:
        ours, counted = engine.run(REPEATED)
    assert_equal(found)
    assert_same(stock, ours, LIMIT, NEAR)
    assert counted["dense_rows"].get("speculative", 0) > 0
    assert counted["sparse_rows"] > length(10000)


def adapter(folder):
    """An adapter of random weights over q and v, as files."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    generator = torch.Generator().manual_seed(7)
    weights, rank, hidden = {}, 8, 512
    for layer in range(3):
        for name, rows in (("q_proj", 8 * 128), ("v_proj", 2 * 128)):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{prefix}.lora_A.weight"] = torch.randn(rank, hidden, generator=generator) * 0.1
            weights[f"{prefix}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.1
    save_file(weights, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.skipif(not CUDA, reason="vLLM's adapters need Triton")
def test_adapters(engines, llama, tmp_path):
    """Two requests of one batch, one of them with an adapter."""
    from vllm.lora.request import LoRARequest

    lora = LoRARequest("one", 1, str(adapter(tmp_path / "adapter")))
    asked = {**OPTIONS, "enable_lora": True, "max_lora_rank": 8, "max_loras": 1, "block_size": 16}
    plain, adapted = tokens(length(6000), 1), tokens(length(7000), 2)
    requests = [Request(plain, 10), Request(adapted, 10, lora=lora)]
    stock, _ = engines(llama, None, **asked).run(requests)
    engine = engines(llama, DENSE, **asked)
    with engines_own() as found:
        ours, counted = engine.run(requests)
    assert_equal(found)
    assert_same(stock, ours, LIMIT, NEAR)
    without, _ = engine.run([requests[0], Request(adapted, 10)])
    assert without[1].tokens != ours[1].tokens, "an adapter that changes nothing tests nothing"


def test_what_a_prefix_cache_leaves_is_read_as_before(engines, llama):
    """min_chunk 1: the second answer to a prompt is the first, though the cache leaves less than a tile.

    In a cache in blocks of a tile's 128 tokens what is left begins where a tile began: the same is selected.
    """
    policy = {"sink_blocks": 1, "window_blocks": 1, "dense_tail_blocks": 0}
    asked = {**OPTIONS, "block_size": 128}
    ids = tokens(length(8000) // 128 * 128 + 70, 9)
    gaps = {}
    for least in (128, 1):
        engine = engines(llama, plugin.config("streaming", min_chunk=least, **policy), **asked)
        (first,), counted = engine.run([Request(ids, 1)])
        (second,), again = engine.run([Request(ids, 1)])
        assert counted["density"] < 0.8 and second.cached == len(ids) - 70
        assert again["sparse_rows"] == (70 if least == 1 else 0)
        shared = first.logprobs[0].keys() & second.logprobs[0].keys()
        gaps[least] = max((abs(first.logprobs[0][t] - second.logprobs[0][t]) for t in shared), default=99.0)
    assert gaps[1] < LIMIT / 5 < gaps[128], gaps
