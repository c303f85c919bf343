"""Twenty prompts of the real model in fp32, all blocks kept: the stock engine's greedy answers in any batch.

The stock engine reads each prompt alone and in one piece. Ours reads them so too, in chunks, over what a
prefix cache holds, and eight at a time that come and go; its tokens may part from the stock engine's only
where that one's two best were within NEAR. --prompts 4 takes every fifth.
"""

import pytest
from answers import Answer, Request, assert_same
from engine import Engine

import flashprefill as fp
from flashprefill import vllm as plugin
from flashprefill.apps import prompt

DENSE = plugin.config(fp.Dense())
# Around the edges of blocks and pages; long ones fewer: the stock engine reads 7,000 tokens in half a minute.
LENGTHS = [1000, 1024, 1025, 1100, 1151, 1279, 1280, 1281, 1400, 1536, 1537, 1777, 2000, 2048, 2500, 3000]
LENGTHS += [3500, 4097, 5500, 7000]
NEW = 16
LIMIT = 2e-2  # of log-probabilities: rounding of fp32 through thirty layers
ROOM = {"memory": 3 << 29}  # eight of them at once


@pytest.fixture(scope="module")
def prompts(smollm2, pytestconfig):
    """Parts of this machine's texts that have nothing in common."""
    from transformers import AutoTokenizer

    count = pytestconfig.getoption("prompts")
    lengths = LENGTHS[:: len(LENGTHS) // count][:count]
    text, _ = prompt.text_of(AutoTokenizer.from_pretrained(smollm2), 7000 + 400 * count, None)
    return [text[400 * i : 400 * i + length] for i, length in enumerate(lengths)]


@pytest.fixture(scope="module")
def stock(smollm2, prompts):
    engine = Engine(smollm2, None, max_num_batched_tokens=8192, max_num_seqs=1, **ROOM)
    answers, _ = engine.run([Request(ids, NEW) for ids in prompts])
    engine.close()
    return answers


def begin(answer, count):
    return Answer(answer.tokens[:count], answer.logprobs[:count], answer.cached, answer.finished)


def same(engine, requests, stock):
    """Serve; compare with the beginnings of the stock engine's answers; return ours and what was counted."""
    ours, counted = engine.run(requests)
    shorter = [begin(answer, request.new) for answer, request in zip(stock, requests, strict=True)]
    assert_same(shorter, ours, LIMIT)
    assert counted["density"] == 1.0 and not counted["fallbacks"]
    return ours, counted


def test_in_one_piece(engines, smollm2, prompts, stock):
    engine = engines(smollm2, DENSE, max_num_batched_tokens=8192, max_num_seqs=1, **ROOM)
    _, counted = same(engine, [Request(ids, NEW) for ids in prompts], stock)
    assert counted["sparse_chunks"] == len(prompts)


@pytest.mark.parametrize(("turn", "chunk"), enumerate((193, 450, 1000)))
def test_in_chunks(engines, smollm2, prompts, stock, turn, chunk):
    """Each prompt in chunks of one size; the sizes by turns."""
    engine = engines(smollm2, DENSE, max_num_batched_tokens=chunk, max_num_seqs=1, **ROOM)
    mine = prompts[turn::3]
    _, counted = same(engine, [Request(ids, NEW) for ids in mine], stock[turn::3])
    assert counted["sparse_chunks"] >= sum(len(ids) // chunk for ids in mine)


def test_over_a_prefix_cache(engines, smollm2, prompts, stock):
    """After each prompt's first half that prompt: the other half is read over cached keys."""
    options = {"max_num_batched_tokens": 8192, "max_num_seqs": 1, "enable_prefix_caching": True}
    engine = engines(smollm2, DENSE, **options, **ROOM)
    for ids, answer in zip(prompts, stock, strict=True):
        engine.run([Request(ids[: len(ids) // 2], 1)])
        (ours,), _ = same(engine, [Request(ids, NEW)], [answer])
        assert ours.cached >= len(ids) // 2 - 128


def test_eight_that_come_and_go(engines, smollm2, prompts, stock):
    """Long prompts between short ones, so that batches mix decodes with chunks of several requests."""
    chunks = {"max_num_batched_tokens": 2100, "long_prefill_token_threshold": 700}
    engine = engines(smollm2, DENSE, max_num_seqs=8, **chunks, **ROOM)
    order = sorted(range(len(prompts)), key=lambda i: (i % 4, i))
    requests = [Request(prompts[i], 5 + 11 * (at % 2), at=at) for at, i in enumerate(order)]
    _, counted = same(engine, requests, [stock[i] for i in order])
    assert engine.most_running == min(8, len(prompts))
    assert counted["dense_rows"]["decode"] > len(prompts)
