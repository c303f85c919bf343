"""The FlashAttention 3 backend's own class and metadata in the engine, on a CPU with torch for its kernel.

What runs on a GPU is that backend. Here its metadata are built and read as there; see fa3_on_cpu.py.
"""

import pytest
from answers import Request, assert_same, tokens

import flashprefill as fp
from flashprefill import sglang as plugin

FA3 = {"TEST_FA3": "1"}
DENSE = {**plugin.config(fp.Dense()), **FA3}
REQUESTS = [
    Request(tokens(60, 60), 30),
    Request(tokens(1300, 13), 8, at=2),
    Request(tokens(1300, 13)[:1000] + tokens(200, 7), 8, at=9),
    Request(tokens(30, 3), 9, at=5),
    Request(tokens(900, 9), 5, at=9),
]


def both(serve, model, requests, **arguments):
    stock = serve(model, requests, FA3, attention_backend="fa3", **arguments)
    assert not stock.error, stock.error
    assert stock.backend == "FlashAttentionBackend" and stock.registry == []
    ours = serve(model, requests, DENSE, attention_backend="fa3", **arguments)
    assert not ours.error, ours.error
    assert_same(stock.answers, ours.answers, 5e-4)
    assert not ours.numbers["fallbacks"] and ours.numbers["density"] == 1.0
    assert [a.cached for a in stock.answers] == [a.cached for a in ours.answers]
    return ours


@pytest.mark.parametrize("page", [1, 16, 128])
def test_mixed_chunks_over_a_radix_cache(serve, llama, page):
    ours = both(serve, llama, REQUESTS, page_size=page, chunked_prefill_size=512, enable_mixed_chunk=True)
    assert ours.backend == "FlashPrefillFlashAttentionBackend"
    assert ours.numbers["sparse_rows"] > 1500 and ours.numbers["dense_rows"]["decode"] > 0
    assert max(answer.cached for answer in ours.answers) >= 896


def test_windows(serve, models):
    """Layers with a window have slots of their own, which the stock backend translates to."""
    ours = both(serve, models("gemma3"), REQUESTS[1:], context_length=4096, chunked_prefill_size=640)
    assert "2 stay dense: a sliding window" in ours.log and ours.numbers["calls"] > 0


def test_one_tail_per_prompt(serve, llama):
    """A policy that leaves something out keeps the same blocks around either backend."""
    policy = plugin.config(fp.Streaming(sink_blocks=1, window_blocks=2, dense_tail_blocks=2, block_size=128))
    requests, arguments = [Request(tokens(1700, 1), 2)], {"chunked_prefill_size": 512}
    native = serve(llama, requests, policy, **arguments)
    ours = serve(llama, requests, {**policy, **FA3}, attention_backend="fa3", **arguments)
    assert ours.numbers["density"] < 1
    for name in ("kept_blocks", "causal_blocks", "calls", "sparse_rows"):
        assert ours.numbers[name] == native.numbers[name]
    assert_same(native.answers, ours.answers, 5e-4)
