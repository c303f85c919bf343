"""With every block kept the engine's results are the stock engine's, whatever batches and cache hold.

The engine itself rounds K and V to fp16 before flash attention, even those of an fp32 cache. A difference in
the last bit of one layer's output moves some of the next layers' K and V to the neighbouring fp16 number, and
grows to some 1e-2 in the logits: as much as between the stock engine with flash attention and without it. So
everything is compared twice: with the plugin in the last layer only, whose output no cache sees, to fp32's
rounding; and with the plugin in all layers, to what the engine makes of that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from engine import DENSE, Engine, Setup, engine, prompt

SLOW = pytest.mark.slow  # left out by run.sh --short: more of the same
LAST_LAYER = DENSE + ", dense_layers=0-28"
ROUNDING = 2e-4  # of logits up to 30: 1.8e-5 was seen
FEW_ROWS = 0.05  # 0.021 was seen
NOISE = 0.1  # 0.02 was seen, and 0.015 to 0.024 between the stock engine with flash attention and without

RMS_NOISE = 0.01  # 0.002 was seen over fp16

Scenario = Callable[[Engine], list[np.ndarray]]


def off_by(must_be: list[np.ndarray], outcome: list[np.ndarray]) -> np.ndarray:
    """The largest difference of each row of logits."""
    return np.concatenate([np.abs(a - b).max(axis=-1) for a, b in zip(must_be, outcome, strict=True)])


def agree(
    setup: Setup,
    scenario: Scenario,
    rounding: float = ROUNDING,
    noise: float = NOISE,
    more: str = "",
    few_rows: tuple[Setup, Scenario] | None = None,
) -> dict:
    """Returns the plugin's figures with all layers.

    few_rows: some nodes have fewer rows than the stock kernel's tile, which it adds up in fp16. Then two
    thirds of the rows must agree to rounding and the others to FEW_ROWS, and with all layers ours this setup
    and scenario of the stock engine are the measure.
    """
    with engine(setup) as stock:
        must_be = scenario(stock)
    stats = {}
    for options, limit in ((LAST_LAYER, rounding), (DENSE, noise)):
        most = limit
        if few_rows and options is LAST_LAYER:
            most = FEW_ROWS
        elif few_rows:
            with engine(few_rows[0]) as stock:
                must_be = few_rows[1](stock)
        with engine(setup, options + more) as ours:
            ours.plugin.reset_stats()
            off = off_by(must_be, scenario(ours))
            stats = ours.plugin.stats()
        print(f"{options}: logits are off by {off.max():.1e} at most, {np.median(off):.1e} as a median")
        assert np.quantile(off, 2 / 3) <= limit
        assert off.max() <= most
        assert stats["sparse_rows"] == 0
    return stats


# Twenty prompts, long ones fewer: the stock engine reads 7,000 tokens in a minute.
LENGTHS = [1000, 1024, 1025, 1100, 1151, 1279, 1280, 1281, 1400, 1536, 1537, 1777, 2000, 2048, 2500, 3000]
LENGTHS += [3500, 4097, 5500, 7000]
UBATCHES = [512, 300, 2048, 97]  # by turns


def same_tokens(number: int, options: str, near_tie: float, limit: float) -> None:
    count, ubatch = LENGTHS[number], UBATCHES[number % len(UBATCHES)]
    setup = Setup(n_ctx=count // 256 * 256 + 512, n_ubatch=ubatch)

    def run(options: str | None) -> tuple[np.ndarray, list[int], np.ndarray]:
        with engine(setup, options) as it:
            logits = it.feed([(0, prompt(count, number))], every=64)[0]
            if it.plugin:
                assert it.plugin.stats()["dense_rows"] > 0
            return logits, *it.greedy(logits[-1], 24)

    if number not in STOCK:
        STOCK[number] = run(None)
    stock_logits, stock_tokens, stock_by = STOCK[number]
    logits, tokens, _ = run(options)
    assert np.abs(stock_logits - logits).max() <= limit
    for at, (must_be, token) in enumerate(zip(stock_tokens, tokens, strict=True)):
        if must_be != token:
            second, first = np.sort(stock_by[at])[-2:]
            assert first - second <= near_tie, f"token {at} is {token}, not {must_be}"
            return  # what follows another token is another text


STOCK: dict[int, tuple[np.ndarray, list[int], np.ndarray]] = {}


def test_greedy_tokens(number: int) -> None:
    same_tokens(number, DENSE, 2 * NOISE, NOISE)


def test_greedy_tokens_with_the_last_layer_ours(number: int) -> None:
    same_tokens(number, LAST_LAYER, 1e-3, ROUNDING)


@pytest.mark.parametrize("ubatch", [500, *(pytest.param(n, marks=SLOW) for n in (129, 512, 700, 2048))])
def test_micro_batches(ubatch: int) -> None:
    stats = agree(Setup(n_ctx=2048, n_ubatch=ubatch), lambda e: [e.feed([(0, prompt(1900, 3))], every=50)[0]])
    assert stats["dense_rows"] > 0


def test_chunks_of_any_size() -> None:
    def scenario(e: Engine) -> list[np.ndarray]:
        text, out, at = prompt(1500, 5), [], 0
        for size in (1, 64, 63, 65, 2, 300, 128, 500, 377):
            out.append(e.feed([(0, text[at : at + size])], every=40)[0])
            at += size
        return out

    agree(Setup(), scenario)


# Unequal lengths in one batch; then each goes on, so that its cells lie apart; one ends and its cells are
# used again.
def sequences(e: Engine) -> list[np.ndarray]:
    out = []

    def feed(*rows: tuple[int, list[int]]) -> None:
        out.extend(e.feed(rows, every=50).values())

    feed((0, prompt(700, 1)), (1, prompt(300, 2)), (2, prompt(130, 3)))
    feed((0, prompt(150, 4)), (1, prompt(260, 5)), (2, prompt(90, 6)))
    feed((0, [11]), (1, [12]), (2, [13]))
    e.remove(1)
    feed((1, prompt(600, 7)), (0, prompt(70, 8)))
    feed((3, prompt(400, 9)))
    return out


@pytest.mark.parametrize("ubatch", [200, *(pytest.param(n, marks=SLOW) for n in (512, 2048))])
@pytest.mark.parametrize("unified", [True, False])
def test_sequences(ubatch: int, unified: bool) -> None:
    n_ctx = 4096 if unified else 8192  # each sequence has its share of a cache that is not unified
    setup = Setup(n_ctx=n_ctx, n_ubatch=ubatch, n_seq=4, unified=unified)
    if unified:
        stats = agree(setup, sequences, more=", min_rows=8")
        assert stats["gathered_rows"] > 0
    else:  # a node has each sequence's rows by themselves
        exact = (replace(setup, flash=0), sequences)
        stats = agree(setup, sequences, more=", min_rows=1", few_rows=exact)
    assert stats["dense_rows"] > 0


# Rows left to the CPU backend's kernel are few; the stock engine gets them by themselves to compare with, or
# it would read them with the prompt's, in fp32.
def test_decode_rows_beside_a_prompt() -> None:
    def scenario(e: Engine, apart: bool = False) -> list[np.ndarray]:
        e.feed([(0, prompt(300, 1)), (1, prompt(200, 2)), (2, prompt(100, 3))])
        tokens, text = [(0, [11]), (2, [13]), (1, [12])], (3, prompt(400, 9))
        rows = {}
        for batch in [tokens, [text]] if apart else [[tokens[0], text, *tokens[1:]]]:
            rows |= e.feed(batch, every=50)
        return [rows[sequence] for sequence in range(4)]

    setup = Setup(n_seq=4)
    stats = agree(setup, scenario, few_rows=(setup, lambda e: scenario(e, apart=True)))
    assert stats["stock_rows"] == (3 + 12) * 30  # 12 of the third prompt end a micro-batch of 512


def come_and_go(e: Engine, apart: bool = False) -> list[np.ndarray]:
    """Twelve requests, eight at a time; a step reads 400 rows of prompts and a token of the others.

    Those tokens may be read apart from the prompts.
    """
    waiting = list(enumerate((700, 90, 333, 1200, 65, 500, 240, 128, 410, 77, 600, 150)))
    out, reading, generating, free = [], {}, {}, list(range(8))
    most = 0
    while waiting or reading or generating:
        while waiting and free:
            number, count = waiting.pop(0)
            reading[free.pop(0)] = prompt(count, number)
        rows = [(sequence, [100 + left]) for sequence, left in generating.items()]
        if apart and rows:
            out.extend(e.feed(rows).values())
            rows = []
        room = 400
        for sequence in list(reading):
            piece, reading[sequence] = reading[sequence][:room], reading[sequence][room:]
            room -= len(piece)
            if piece:
                rows.append((sequence, piece))
            if not reading[sequence]:
                del reading[sequence]
                generating[sequence] = 3 + 2 * sequence + 1  # one is taken off at once
        most = max(most, len(reading) + len(generating))
        if rows:
            out.extend(e.feed(rows, every=50).values())
        for sequence in list(generating):
            generating[sequence] -= 1
            if generating[sequence] == 0:
                del generating[sequence]
                e.remove(sequence)
                free.append(sequence)
    assert most == 8
    return out


# The stock kernel adds up in fp16 where it has few rows, and in fp32 where it has as many as its tile. The
# plugin leaves it few, so with all layers ours the stock engine gets those rows by themselves too: mixed it
# is 0.46 off.
def test_requests_that_come_and_go() -> None:
    setup = Setup(n_ctx=4096, n_seq=8)
    stats = {}
    for options, apart, limit in ((LAST_LAYER, False, 0.05), (DENSE, True, NOISE)):
        with engine(setup) as stock:
            must_be = come_and_go(stock, apart)
        with engine(setup, options + ", min_rows=8") as ours:
            ours.plugin.reset_stats()
            off = off_by(must_be, come_and_go(ours)).max()
            stats = ours.plugin.stats()
        print(f"{options}: logits are off by {off:.1e} at most")
        assert off <= limit
    assert stats["dense_rows"] > 0 and stats["stock_rows"] > 0 and stats["gathered_rows"] > 0


def test_context_shift() -> None:
    def scenario(e: Engine) -> list[np.ndarray]:
        out = [e.feed([(0, prompt(1000, 11))], every=50)[0]]
        for number in range(3):  # the second and third time the cells are no longer in order
            e.forget(64, 64 + 450)
            out.append(e.feed([(0, prompt(430, number))], every=50)[0])
        return out

    stats = agree(Setup(n_ctx=1024, n_ubatch=256), scenario)
    assert stats["gathered_rows"] > 0


# The stock kernels for other types than fp16 round Q and products to 8 or 16 bits; ours goes on in fp32. In
# all layers the stock engine is no measure: over q8_0 its logits are 0.074 from those over fp32 caches, by
# root mean square, and ours 0.050. So ours may be as far from them as the stock ones. Over q4_0 both are far
# and either may be nearer: 0.78, 0.76, 0.70, 0.80 with four prompts, the stock engine 0.57, 0.84, 0.66, 0.73.
@pytest.mark.parametrize(
    ("kv", "rounding", "share"),
    [("f16", ROUNDING, 1.1), ("bf16", 0.1, 1.1), ("q8_0", 0.1, 1.1), ("q4_0", 0.5, 1.5)],
)
def test_cache_types(kv: str, rounding: float, share: float) -> None:
    def logits(kv: str, options: str | None) -> np.ndarray:
        with engine(Setup(kv=kv), options) as it:
            return it.feed([(0, prompt(1500, 13))], every=50)[0]

    stock = logits(kv, None)
    off = float(np.abs(stock - logits(kv, LAST_LAYER)).max())
    print(f"last layer: logits are off by {off:.1e} at most")
    assert off <= rounding
    exact = logits("f32", None)
    stock_off, off = (float(np.sqrt(np.square(exact - of).mean())) for of in (stock, logits(kv, DENSE)))
    print(f"all layers: {off:.1e} from logits over an fp32 cache, the stock engine {stock_off:.1e}")
    assert off <= share * stock_off + RMS_NOISE


# As the model comes, its weights are 4 bits wide and activations are rounded to 8 bits in every layer.
# Activations are rounded to eight bits before each product: a last bit more or less may move a step.
def test_quantised_weights() -> None:
    def scenario(e: Engine) -> list[np.ndarray]:
        return [e.feed([(0, prompt(1500, 17))], every=50)[0]]

    setup = Setup(model="q4_1", kv="f16")
    with engine(setup) as flash, engine(replace(setup, flash=0)) as plain:
        between_stock = off_by(scenario(flash), scenario(plain)).max()
    print(f"the stock engine's two ways of attention are {between_stock:.1e} apart")
    agree(setup, scenario, rounding=0.5, noise=max(1.0, between_stock))


def test_other_threads() -> None:
    setup = Setup(threads=1)
    agree(setup, lambda e: [e.feed([(0, prompt(700, 19))], every=50)[0]])


def test_flash_attention_left_to_the_engine_to_decide() -> None:
    stats = agree(Setup(flash=-1, n_seq=4), lambda e: [e.feed([(0, prompt(700, 19))], every=50)[0]])
    assert stats["dense_rows"] == 30 * 700


def test_flash_attention_of_very_many_sequences_is_not_turned_off_by_a_larger_min_rows() -> None:
    """With `auto` the engine asks about a node of one row a sequence, and wants it for itself."""
    for min_rows, rows in ((64, 0), (65, 200 * 30)):
        with engine(Setup(flash=-1, n_seq=64), f"policy=dense, min_rows={min_rows}") as e:
            e.feed([(0, prompt(200))])
            assert e.plugin.stats()["dense_rows"] == rows
