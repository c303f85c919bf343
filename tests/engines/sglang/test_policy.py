"""What a policy leaves out inside the engine, and that only the last chunk of a prompt has a dense tail."""

import pytest
import torch
from answers import Request, assert_same, distance, tokens

import flashprefill as fp
from flashprefill import sglang as plugin
from flashprefill.apps import prompt

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 3, 4, 2, 64
# It knows positions alone, so what it keeps can be said without the model.
POSITIONS = fp.Streaming(sink_blocks=1, window_blocks=2, dense_tail_blocks=2, block_size=128)
SPARSE = plugin.config(
    fp.FlashPrefill(alpha=1.0, sink_blocks=1, window_blocks=1, dense_tail_blocks=1, block_size=64)
)


def kept(pieces):
    """Blocks that POSITIONS keeps of pieces (rows, tokens before them, whether they end the prompt)."""
    total = 0
    for rows, past, final in pieces:
        q, k = torch.zeros(1, rows, HEADS, HEAD_DIM), torch.zeros(1, past + rows, KV_HEADS, HEAD_DIM)
        total += int(fp.select(q, k, POSITIONS, final_chunk=final).dense().sum())
    return LAYERS * total


def test_it_leaves_something_out(serve, llama):
    requests = [Request(tokens(3000, 1)), Request(tokens(1300, 2))]
    stock, ours = serve(llama, requests), serve(llama, requests, SPARSE)
    assert ours.numbers["density"] < 0.5
    assert min(distance(a, b)[0] for a, b in zip(stock.answers, ours.answers, strict=True)) > 1e-2


def test_only_the_last_chunk_has_a_dense_tail(serve, llama):
    chunks = [(512, 0, False), (512, 512, False), (512, 1024, False), (464, 1536, True)]
    always = [(rows, past, True) for rows, past, _ in chunks]
    ours = serve(llama, [Request(tokens(2000, 1))], plugin.config(POSITIONS), chunked_prefill_size=512)
    assert ours.numbers["sparse_chunks"] == 4
    assert ours.numbers["kept_blocks"] == kept(chunks)
    assert kept(chunks) < kept(always), "a tail that makes no difference tests nothing"


def test_tails_among_others(serve, llama):
    """Two prompts in chunks beside a request that generates: each has its own tail.

    A batch of 601 rows holds one token of each that generates. So the first prompt is read in 600 and 400
    rows, the second one in 200 beside these, which are all sink and window, and in 599.
    """
    requests = [
        Request(tokens(40, 4), 30),
        Request(tokens(1000, 1), 2, at=3),
        Request(tokens(799, 2), 2, at=3),
    ]
    arguments = {"chunked_prefill_size": 601, "enable_mixed_chunk": True, "disable_radix_cache": True}
    ours = serve(llama, requests, plugin.config(POSITIONS), **arguments)
    pieces = [(600, 0, False), (400, 600, True), (599, 200, True)]
    assert ours.numbers["sparse_chunks"] == 3 and ours.numbers["sparse_rows"] == 1599
    assert ours.numbers["dense_rows"]["short"] == 40 + 200
    assert ours.numbers["kept_blocks"] == kept(pieces)
    assert kept(pieces) < kept([(rows, past, True) for rows, past, _ in pieces])


def test_alone_or_among_others(serve, llama):
    """Whole prompts select alike, whoever else is there."""
    come = [(2000, 0), (150, 1), (3000, 2), (1200, 2), (60, 3)]
    requests = [Request(tokens(n, n), 6, at) for n, at in come]
    arguments = {"disable_radix_cache": True}
    mixed = serve(llama, requests, SPARSE, **arguments)
    assert mixed.numbers["density"] < 0.9
    for request, answer in zip(requests, mixed.answers, strict=True):
        alone = serve(llama, [Request(request.ids, request.new)], SPARSE, **arguments)
        assert_same(alone.answers, [answer], 5e-4)


@pytest.fixture(scope="module")
def needles(models, pytestconfig):
    from transformers import AutoTokenizer

    folder = models("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    places = [(2048, 0.5), (2500, 0.3), (1800, 0.8), (2600, 0.35)][: pytestconfig.getoption("prompts")]
    return folder, tokenizer, [prompt.build(tokenizer, n, depth) for n, depth in places]


@pytest.mark.parametrize(
    "arguments",
    [{"chunked_prefill_size": 1024}, {"chunked_prefill_size": 700, "enable_mixed_chunk": True}],
    ids=["chunks", "mixed"],
)
def test_needles(serve, needles, arguments):
    """SmolLM2 finds the needles that it finds with the stock engine."""
    folder, tokenizer, prompts = needles
    requests = [Request(p.ids, 20, at=3 * i) for i, p in enumerate(prompts)]
    found = {}
    for name, policy in (("stock", None), ("flashprefill", plugin.config("flashprefill"))):
        served = serve(folder, requests, policy, max_total_tokens=12288, **arguments)
        assert not served.error, served.error
        texts = [tokenizer.decode(answer.tokens) for answer in served.answers]
        found[name] = [p.found_in(text) for p, text in zip(prompts, texts, strict=True)]
    assert served.numbers["density"] < 0.97
    assert found["flashprefill"] == found["stock"]
    assert any(found["stock"])
