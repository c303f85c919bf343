"""The real model in bf16, read sparsely: needles that the stock engine finds are found, in chunks and mixed.

FLASHPREFILL_SMOLLM2 names the model's folder, with its tokenizer.
"""

import os

import pytest
from answers import Request
from engine import CUDA, Engine

import flashprefill as fp
from flashprefill import vllm as plugin
from flashprefill.apps import prompt

MODEL = os.environ.get("FLASHPREFILL_SMOLLM2")
pytestmark = pytest.mark.skipif(not MODEL, reason="FLASHPREFILL_SMOLLM2 names no model")
POLICIES = {"flashprefill": fp.FlashPrefill(alpha=0.12), "sketch": fp.Sketch()}
# On a GPU prompts of up to 3,072 tokens are dense.
LENGTHS, DEPTHS = ([3600, 5000, 6400, 7800], [0.05, 0.3, 0.5, 0.7, 0.95]) if CUDA else ([1500], [0.3, 0.6])
NEW = 20  # tokens of an answer
OPTIONS = {
    "dtype": "bfloat16" if CUDA else "float32",
    "memory": 1 << 30,
    "block_size": 16 if CUDA else 128,
    "enable_prefix_caching": False,
}


@pytest.fixture(scope="module")
def needles():
    """Prompts, a function that says which answers have their needle, and what the stock engine finds."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    prompts = [prompt.build(tokenizer, n, depth) for n in LENGTHS for depth in DEPTHS]

    def found(answers):
        texts = [tokenizer.decode(answer.tokens) for answer in answers]
        return [p.found_in(text) for p, text in zip(prompts, texts, strict=False)]

    engine = Engine(MODEL, None, max_num_batched_tokens=8192, max_num_seqs=1, **OPTIONS)
    answers, _ = engine.run([Request(p.ids, NEW) for p in prompts])
    engine.close()
    stock = found(answers)
    assert sum(stock) > len(stock) // 3, f"the stock engine finds {sum(stock)} of {len(stock)}"
    return prompts, found, stock


def alone(prompts):
    """Each after the one before it has answered: nothing shares a batch."""
    return [[Request(p.ids, NEW)] for p in prompts]


def mixed(prompts):
    """They come while others generate, so that chunks of several prompts and tokens share batches."""
    text = prompts[0].ids
    others = [Request(text[: 150 + 50 * i], 20 * len(prompts)) for i in range(2)]
    return [[Request(p.ids, NEW, at=4 + 2 * i) for i, p in enumerate(prompts)] + others]


@pytest.mark.parametrize("policy", POLICIES)
def test_what_stock_finds_is_found(engines, needles, policy):
    prompts, found, stock = needles
    config = plugin.config(POLICIES[policy], min_chunk=128)
    engine = engines(MODEL, config, max_num_batched_tokens=2048, max_num_seqs=8, **OPTIONS)
    for chunk in (2048, 700):
        engine.chunk(chunk)
        for how in (alone, mixed):
            served = [engine.run(requests) for requests in how(prompts)]
            ours = found([answer for answers, _ in served for answer in answers])
            density = sum(c["kept_blocks"] for _, c in served) / sum(c["causal_blocks"] for _, c in served)
            print(
                f"## {policy}, chunks of {chunk}, {how.__name__}: {sum(ours)} of {len(ours)} found, "
                f"stock {sum(stock)}, density {density:.3f}"
            )
            assert not [i for i, (a, b) in enumerate(zip(stock, ours, strict=True)) if a and not b]
            assert density < 0.95 and not any(counted["fallbacks"] for _, counted in served)
    assert served[0][1]["dense_rows"]["decode"] > NEW
