"""With FlashPrefill a request's answer depends on its own chunks, whatever else the scheduler does."""

import pytest
from answers import Request, assert_same, distance, tokens

import flashprefill as fp
from flashprefill import vllm as plugin
from flashprefill.apps import machine, prompt

# Most of a prompt's blocks are left out, so that a wrong block, tail or position shows.
SPARSE = plugin.config(
    fp.FlashPrefill(alpha=1.0, sink_blocks=1, window_blocks=1, dense_tail_blocks=1, block_size=64)
)


def test_it_leaves_something_out(engines, llama):
    requests = [Request(tokens(3000, 1)), Request(tokens(1300, 2))]
    stock, _ = engines(llama, None, max_num_seqs=4).run(requests)
    ours, counted = engines(llama, SPARSE, max_num_seqs=4).run(requests)
    assert counted["density"] < 0.5
    assert min(distance(a, b)[0] for a, b in zip(stock, ours, strict=True)) > 1e-2


@pytest.mark.parametrize(
    "policy",
    [
        SPARSE,
        plugin.config(fp.Sketch(mass=0.5, window_blocks=1)),
        plugin.config(fp.Gather(gain=0.05, window_blocks=2)),
    ],
    ids=["flashprefill", "sketch", "gather"],
)
def test_alone_or_among_others(engines, llama, policy):
    """Chunks of 512 rows each, whoever else is there: the engine has room for all of them at once.

    It does not cut the prompt of a request that it has alone, so there is always one that generates.
    """
    come = [(2000, 0, 12), (150, 1, 20), (3500, 2, 8), (1200, 4, 6), (900, 7, 10), (60, 3, 15)]
    requests = [Request(tokens(n, n), new, at) for n, at, new in come]
    other = Request(tokens(30, 30), 40)
    options = {"max_num_batched_tokens": 4096, "long_prefill_token_threshold": 512, "max_num_seqs": 8}
    engine = engines(llama, policy, enable_prefix_caching=False, **options)
    mixed, counted = engine.run([*requests, other])
    assert counted["density"] < 0.9
    alone = [engine.run([Request(request.ids, request.new), other]) for request in requests]
    assert counted["sparse_chunks"] == sum(one["sparse_chunks"] for _, one in alone) >= 4 + 7 + 3 + 2
    assert_same([answers[0] for answers, _ in alone], mixed[:-1], 5e-4)


def test_only_the_last_chunk_has_a_dense_tail(engines, llama):
    """Blocks kept in chunks: those of the whole prompt, where tiles of both begin at the same tokens."""
    request = [Request(tokens(2048, 1), 2)]
    kept = []
    for chunk in (8192, 512):
        engine = engines(
            llama, SPARSE, enable_prefix_caching=False, max_num_batched_tokens=chunk, max_num_seqs=4
        )
        _, counted = engine.run(request)
        kept.append(counted["kept_blocks"] / counted["causal_blocks"])
    assert kept[1] == pytest.approx(kept[0], rel=0.05)


@pytest.mark.parametrize("chunk", [8192, 1000])
def test_needle(engines, smollm2, chunk):
    """SmolLM2 finds the needle where it finds it densely."""
    from transformers import AutoTokenizer

    dtype = "bfloat16" if machine.supports_bf16() else "float32"  # bf16 in software is slow
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompts = [prompt.build(tokenizer, n, depth) for n, depth in ((2500, 0.3), (4000, 0.8))]
    requests = [Request(p.ids, 20) for p in prompts]
    options = {"max_num_batched_tokens": chunk, "max_num_seqs": 4, "dtype": dtype, "memory": 1 << 29}
    found = {}
    for name, policy in (("stock", None), ("flashprefill", plugin.config("flashprefill"))):
        answers, counted = engines(smollm2, policy, **options).run(requests)
        found[name] = [p.found_in(tokenizer.decode(a.tokens)) for p, a in zip(prompts, answers, strict=True)]
    assert counted["density"] < 0.75
    assert found["flashprefill"] == found["stock"]
    assert any(found["stock"])
