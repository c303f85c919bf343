"""With a policy: needles are found where the stock engine finds them, and the figures say what was done."""

from __future__ import annotations

from pathlib import Path

import models
import numpy as np
import pytest
from engine import MODELS, Engine, Setup, decode, encode, engine, log, prompt

ANSWER = "48213"
NEEDLE = f"\n\nThe secret number of the lighthouse is {ANSWER}.\n\n"
QUESTION = "\n\nWhat is the secret number of the lighthouse?"
BEFORE = "<|im_start|>user\n"
AFTER = "<|im_end|>\n<|im_start|>assistant\n"
TOKENS = 3000
DEPTHS = (0.1, 0.35, 0.6, 0.85)
LAYERS = 30
SHIPPED = {"model": "q4_1", "kv": "f16", "n_ctx": 4096}  # the model as it comes


def hidden(depth: float, tokens: int = TOKENS) -> list[int]:
    text = prompt(tokens)
    at = round(depth * tokens)
    while not decode(text[at - 1 : at]).endswith("\n"):
        at += 1
    parts = encode(BEFORE, True), text[:at], encode(NEEDLE), text[at:], encode(QUESTION + AFTER, True)
    return [token for part in parts for token in part]


def answer(e: Engine, depth: float) -> str:
    logits = e.feed([(0, hidden(depth))])[0][-1]
    return decode(e.greedy(logits, 20)[0])


def found(e: Engine, depth: float) -> bool:
    text = answer(e, depth)
    print(f"depth {depth}: {text!r}")
    return ANSWER in text.replace(",", "").replace(" ", "")


@pytest.fixture(scope="module")
def found_by_stock() -> list[float]:
    depths = []
    for depth in DEPTHS:
        with engine(Setup(**SHIPPED)) as stock:
            if found(stock, depth):
                depths.append(depth)
    assert len(depths) >= 2, "the stock engine finds too little to compare with"
    return depths


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "ubatch"),
    [
        ("policy=flashprefill", 512),
        ("policy=flashprefill", 2048),
        ("policy=flashprefill, query_pool=16", 512),
        ("policy=sketch", 300),
        ("policy=gather", 512),
    ],
)
def test_needle(options: str, ubatch: int, found_by_stock: list[float]) -> None:
    for depth in found_by_stock:
        with engine(Setup(**SHIPPED, n_ubatch=ubatch), options) as ours:
            assert found(ours, depth), f"at depth {depth}"
            stats = ours.plugin.stats()
            assert stats["sparse_rows"] > 0
            assert stats["density"] < 0.9


# The policy sees a chunk's own rows and all keys before them, wherever the cells lie. So a sequence's rows
# among others, in cells that lie apart, are what they are alone: the same tiles over the same blocks.
def test_alone_or_among_others() -> None:
    first, second = prompt(1536, 1), prompt(512, 2)
    setup = {"model": "f32", "kv": "f16", "n_ctx": 4096, "n_ubatch": 512, "n_seq": 2}
    options = "policy=flashprefill, alpha=0.3, final_chunk=never, dense_layers=0-28"
    with engine(Setup(**setup), options) as e:
        e.feed([(0, first)])
        alone = e.feed([(0, second)], every=64)[0]
        density = e.plugin.stats()["density"]
    with engine(Setup(**setup), options) as e:
        e.feed([(0, first)])
        e.feed([(1, prompt(512, 3))])
        among = e.feed([(0, second)], every=64)[0]
        assert e.plugin.stats()["gathered_rows"] == 512
    assert density < 0.9
    assert np.abs(alone - among).max() < 2e-4


def test_rows_are_counted() -> None:
    with engine(Setup(**SHIPPED), "policy=flashprefill, log=1") as e:
        e.feed([(0, prompt(2000))])
        stats = e.plugin.stats()
        e.greedy(np.ones(e.n_vocab), 3)
        assert e.plugin.stats() == stats, "decoding is the engine's own"
    assert stats["nodes"] == 4 * LAYERS
    assert stats["stock_rows"] == stats["gathered_rows"] == 0
    assert stats["sparse_rows"] + stats["dense_rows"] == 2000 * LAYERS
    assert 0 < stats["density"] < 1
    lines = [line for line in log if line.startswith("flashprefill: ")]
    assert sum("micro-batch: 15360 rows in 30 nodes" in line for line in lines) == 3  # 512 x 30 layers
    assert any(line.startswith(f"flashprefill: {2000 * LAYERS} rows in 120 nodes: sparse ") for line in lines)


def test_a_guard_says_what_is_kept() -> None:
    """By head, layer and micro-batch; what "strict" keeps besides is in the density."""
    found, densities = {}, {}
    for mode in ("none", "observe", "strict"):
        options = f"policy=streaming, sink_blocks=1, window_blocks=1, dense_tail_blocks=0, guard={mode}"
        with engine(Setup(**SHIPPED), options) as e:
            e.feed([(0, prompt(1100))])
            stats = e.plugin.stats()
        found[mode], densities[mode] = stats["guard"], stats["density"]
        last = [line for line in log if line.startswith(f"flashprefill: {1100 * LAYERS} rows")][-1]
        assert ("recall " in last) == (mode != "none")
    assert found["none"] is None and densities["none"] == densities["observe"] < densities["strict"]
    for mode, done in (("observe", "low"), ("strict", "dense")):
        figures = found[mode]
        assert figures["heads"] == 9 * LAYERS * 3 and figures[done] > 0  # three micro-batches
        outcomes = ("whole", "held", "repaired", "dense", "low")
        assert sum(figures[name] for name in outcomes) == figures["heads"]
        assert figures["at_least"] < figures["recall"] < 1
    assert found["observe"]["recall"] < found["strict"]["recall"]


@pytest.mark.parametrize(
    ("rule", "dense_tails"), [("never", [False] * 4), ("short", [False] * 3 + [True]), ("always", [True] * 4)]
)
def test_dense_tail(rule: str, dense_tails: list[bool]) -> None:
    """Four micro-batches, of which the last is not full; sparse but for the tail of all their rows."""
    options = (
        f"policy=streaming, sink_blocks=1, window_blocks=1, dense_tail_blocks=4, final_chunk={rule}, log=1"
    )
    with engine(Setup(**SHIPPED), options) as e:
        e.feed([(0, prompt(1900))])
    densities = [line.split("density ")[1][:5] == "1.000" for line in log if "micro-batch:" in line]
    assert densities[1:] == dense_tails[1:]  # the first has no more blocks than sink and window at most


def test_min_rows_and_min_keys() -> None:
    with engine(Setup(**SHIPPED), "policy=dense, min_rows=200") as e:
        e.feed([(0, prompt(512 + 150))])
        assert e.plugin.stats()["dense_rows"] == 512 * LAYERS
    with engine(Setup(**SHIPPED), "policy=dense, min_keys=1024") as e:
        e.feed([(0, prompt(1400))])
        assert e.plugin.stats()["dense_rows"] == (1400 - 512) * LAYERS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("policy=best", "the name must be one of dense, flashprefill, "),
        ("alpha=-1", "alpha"),
        ("alpha=much", "alpha must be a plain value"),
        ("block_size=100", "block_size"),
        ("policy=dense, alpha=0.1", "there is no option 'alpha'; policy dense has block_size, "),
        ("fast", "an option is 'fast' and must be name = value"),
        ("min_rows=-3", "min_rows is '-3' and must be a whole number"),
        ("final_chunk=maybe", "final_chunk is 'maybe' and must be one of never, short, always"),
        ("guard=look", "guard is 'look' and must be one of none, observe, repair, strict"),
        ("guard_target=2", "guard_target is '2' and must be above 0 and at most 1"),
        ("dense_layers=1-x", "dense_layers is 'x' and must be a whole number"),
    ],
)
def test_bad_options_change_nothing(options: str, message: str) -> None:
    with engine(Setup(n_ctx=256), "policy=flashprefill") as e:
        wrong = e.plugin.set_options(options)
        assert wrong is not None and message in wrong, wrong


def test_a_model_that_stays_dense(tmp_path: Path) -> None:
    """Its attention is none that the plugin knows: a line in the log, and the stock engine's very logits."""
    MODELS["gemma2"] = str(models.gemma2(tmp_path / "gemma2.gguf"))
    tokens = [(7 * i * i + 3 * i) % models.VOCABULARY for i in range(700)]
    logits = []
    for options in (None, "policy=flashprefill"):
        with engine(Setup(model="gemma2", n_ctx=1024), options) as e:
            if e.plugin:
                e.plugin.reset_stats()
            logits.append(e.feed([(0, tokens)], every=50)[0])
            if e.plugin:
                assert e.plugin.stats()["nodes"] == 0
    assert np.array_equal(*logits)
    assert any("layers with logit softcapping stay the CPU backend's" in line for line in log)
    assert any("nothing was computed" in line for line in log)


@pytest.mark.parametrize("flash", [-1, 0, 1])
def test_without_flash_attention_there_is_a_warning(tmp_path: Path, flash: int) -> None:
    MODELS["llama"] = str(models.llama(tmp_path / "llama.gguf"))
    with engine(Setup(model="llama", kv="f16", n_ctx=512, flash=flash), "policy=dense") as e:
        e.feed([(0, list(range(300)))])
    assert sum("flash attention is off, so the plugin computes nothing" in line for line in log) == (
        flash == 0
    )
