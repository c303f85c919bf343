"""With all blocks kept the engine answers what the stock engine answers, whatever the scheduler does."""

import logging

import models
import pytest
from answers import NEAR, Request, assert_same, tokens
from vllm import SamplingParams

import flashprefill as fp
from flashprefill import vllm as plugin

DENSE = plugin.config(fp.Dense())
ALL_KEPT = plugin.config(fp.FlashPrefill(alpha=0.0))  # the selection runs, and keeps everything
LIMIT = 5e-4  # of log-probabilities: rounding of fp32 through three layers; 3e-5 was seen

ASKED = [Request(tokens(n, n)) for n in (3001, 1500, 777, 128, 90, 2048)]


def both(engines, model, requests, policy=DENSE, limit=LIMIT, near=NEAR, **options):
    stock, _ = engines(model, None, **options).run(requests)
    ours, counted = engines(model, policy, **options).run(requests)
    assert_same(stock, ours, limit, near)
    assert not counted["fallbacks"]
    return counted


@pytest.mark.parametrize("policy", [DENSE, ALL_KEPT], ids=["dense", "all-kept"])
def test_several_prompts_at_once(engines, llama, policy):
    counted = both(engines, llama, ASKED, policy, max_num_batched_tokens=8192, max_num_seqs=8)
    assert counted["density"] == 1.0
    # Dense is ours from a tile of rows on; with a sink and a window prompts of up to 768 tokens are not.
    assert counted["sparse_rows"] == (3001 + 1500 + 777 + 2048 + (128 if policy is DENSE else 0))


@pytest.mark.parametrize("chunk", [193, 600, 1000])
def test_chunked_prefill(engines, llama, chunk):
    counted = both(engines, llama, ASKED, max_num_batched_tokens=chunk, max_num_seqs=8)
    assert counted["sparse_chunks"] >= 5000 // chunk


def test_prefix_cache(engines, llama):
    common = tokens(1111, 1)
    first = [Request(common + tokens(300, 2)), Request(common + tokens(500, 3), at=8), Request(common, at=16)]
    for policy, chunk in ((DENSE, 8192), (ALL_KEPT, 400)):
        options = {"max_num_batched_tokens": chunk, "max_num_seqs": 4, "enable_prefix_caching": True}
        stock, _ = engines(llama, None, **options).run(first)
        engine = engines(llama, policy, **options)
        ours, counted = engine.run(first)
        assert_same(stock, ours, LIMIT)
        assert [answer.cached >= 1024 for answer in ours] == [
            False,
            True,
            chunk == 8192 or ours[2].cached >= 1024,
        ]
        assert counted["sparse_rows"] < sum(len(request.ids) for request in first)
        again, _ = engine.run([Request(first[0].ids)])
        assert again[0].cached >= 1280
        assert_same(stock[:1], again, LIMIT)


def test_requests_that_come_and_go(engines, llama):
    come = [
        (2000, 0, 30),
        (150, 1, 40),
        (700, 2, 5),
        (3500, 3, 12),
        (40, 4, 25),
        (1200, 9, 3),
        (900, 12, 20),
        (260, 13, 9),
    ]
    requests = [Request(tokens(n, n), new, at) for n, at, new in come]
    counted = both(engines, llama, requests, max_num_batched_tokens=512, max_num_seqs=8)
    assert counted["dense_rows"]["decode"] > 20, "decodes and prefills were to be mixed"


def test_preemption(engines, llama):
    requests = [Request(tokens(600, n), 50) for n in range(3)]  # 5 pages of 128 tokens each, and then a 6th
    options = {
        "max_num_batched_tokens": 500,
        "max_num_seqs": 4,
        "num_gpu_blocks_override": 17,
        "max_len": 1024,
    }
    stock, _ = engines(llama, None, **options).run(requests)
    engine = engines(llama, DENSE, **options)
    ours, _ = engine.run(requests)
    assert engine.preemptions > 0, "the cache was to be too small"
    assert_same(stock, ours, LIMIT)


@pytest.mark.parametrize(
    ("name", "changes", "options"),
    [
        (
            "llama-d128",
            {"head_dim": 128, "num_attention_heads": 6, "num_key_value_heads": 1, "hidden_size": 192},
            {},
        ),
        ("llama-d80", {"head_dim": 80}, {}),
        ("llama", {}, {"block_size": 32}),
        (
            "llama-g3",
            {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576},
            {"block_size": 64},
        ),
    ],
)
def test_caches(engines, folder, name, changes, options):
    model = models.llama(folder / name, **changes)
    requests = [Request(tokens(1500, 1)), Request(tokens(400, 2)), Request(tokens(30, 3))]
    counted = both(engines, model, requests, max_num_batched_tokens=700, max_num_seqs=4, **options)
    assert counted["sparse_rows"] >= 1500


def test_bf16(engines, llama):
    # Both round to 8 bits at other places, so tokens may swap whose logits are a few steps of 1/32 apart.
    options = {"dtype": "bfloat16", "max_num_batched_tokens": 800, "max_num_seqs": 4}
    both(engines, llama, ASKED[:3], limit=0.5, near=0.25, **options)


# -------------------------------------------------- models that have to stay dense


@pytest.mark.parametrize(
    ("make", "sparse", "words"),
    [
        (models.gemma2, 0, "softcapping"),
        (models.gemma3, 2, "a sliding window"),
        (models.mla, 0, "no layer of this model"),
    ],
    ids=["gemma2", "gemma3", "mla"],
)
def test_layers_that_stay_dense(engines, folder, caplog, monkeypatch, make, sparse, words):
    model = make(folder / make.__name__)
    from flashprefill.vllm.host import host

    monkeypatch.setattr(host, "_said", set())
    monkeypatch.setattr(host, "announced", False)
    options = {"max_num_batched_tokens": 900, "max_num_seqs": 4}
    requests = [Request(tokens(1700, 1)), Request(tokens(300, 2))]
    stock, _ = engines(model, None, **options).run(requests)
    monkeypatch.setattr(host.logger, "handlers", [caplog.handler])  # vLLM's own keep theirs to themselves
    with caplog.at_level(logging.INFO, "vllm.flashprefill"):
        ours, counted = engines(model, DENSE, **options).run(requests)
    assert words in caplog.text
    assert_same(stock, ours, LIMIT)
    assert counted["calls"] == (sparse * counted["sparse_chunks"] if sparse else 0)


# ------------------------------------------------------------- things that go wrong


def test_a_client_that_leaves(engines, llama):
    stay = [Request(tokens(2500, 1), 20), Request(tokens(300, 2), 20)]
    leave = [Request(tokens(3000, 3), abort_at=3), Request(tokens(100, 4), 30, abort_at=9)]
    options = {"max_num_batched_tokens": 500, "max_num_seqs": 8}
    stock, _ = engines(llama, None, **options).run(stay)
    ours, _ = engines(llama, ALL_KEPT, **options).run([stay[0], leave[0], stay[1], leave[1]])
    assert_same(stock, [ours[0], ours[2]], LIMIT)
    assert not ours[1].finished and not ours[3].finished


def test_a_prompt_that_is_too_long(engines, llama):
    engine = engines(llama, DENSE, max_len=1024)
    with pytest.raises(Exception, match="maximum context length is 1024"):
        engine.llm.generate(
            {"prompt_token_ids": tokens(1025, 1)}, SamplingParams(max_tokens=1), use_tqdm=False
        )
    stock, _ = engines(llama, None, max_len=1024).run([Request(tokens(900, 1))])
    ours, _ = engine.run([Request(tokens(900, 1))])
    assert_same(stock, ours, LIMIT)


def test_an_engine_of_another_version(engines, llama, caplog, monkeypatch):
    import vllm
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    monkeypatch.setattr(plugin.logger, "handlers", [caplog.handler])
    AttentionBackendEnum.CPU_ATTN.clear_override()
    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR, "vllm.flashprefill"):
        patch.setattr(vllm, "__version__", "0.47.1")
        plugin.register()
    assert "0.47.1" in caplog.text and "read densely" in caplog.text
    assert not AttentionBackendEnum.CPU_ATTN.is_overridden()
    plugin.register()
    assert AttentionBackendEnum.CPU_ATTN.is_overridden()


def test_a_mistake_in_the_options_stops_the_engine_at_its_start(engines, llama):
    with pytest.raises(ValueError, match="alhpa"):
        engines(llama, {"flashprefill": {"parameters": {"alhpa": 0.1}}})
