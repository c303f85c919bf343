"""Keys in the order in which they were read, wherever the cache has room: what a sequence reads in cells that
lie out of order is what it reads alone in a fresh cache, whose cells are in order."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import llama_cpp
import models
import numpy as np
import pytest
from engine import MODELS, Engine, Setup, engine, prompt

BATCH, N_CTX = 256, 2048
BLOCKS = "sink_blocks=1, window_blocks=2, block_size=64"
POLICIES = (  # with a type of cache
    (f"policy=streaming, {BLOCKS}", "f16"),
    (f"policy=flashprefill, alpha=0.9, {BLOCKS}, dense_layers=0-2", "f32"),
)


def nll(logits: np.ndarray, targets: list[int]) -> float:
    logits = logits.astype(np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    chosen = np.take_along_axis(logits, np.array(targets)[:, None], -1)[:, 0]
    return float((np.log(np.exp(logits).sum(-1)) - chosen).mean())


class Reader:
    """Sequence 0, which reads a text: logits, and the token that comes after each, where they are kept."""

    def __init__(self, e: Engine, text: list[int]) -> None:
        self.e, self.text, self.at, self.logits, self.targets = e, text, 0, [], []

    def read(self, tokens: int, keep: bool = False) -> None:
        logits = self.e.feed([(0, self.text[self.at : self.at + tokens])], every=1 if keep else 0)[0]
        self.at += tokens
        if keep:
            self.logits.append(logits)
            self.targets += self.text[self.at - tokens + 1 : self.at + 1]

    def another(self, sequence: int, tokens: int) -> None:
        self.e.feed([(sequence, self.text[-tokens:])])

    def drop(self, begin: int, end: int, filler: int | None) -> None:
        """Another sequence may take the cells, so that those of this one stay in order."""
        self.e.forget(begin, end)
        if filler is not None:
            self.another(filler, end - begin)

    def decode(self, tokens: int) -> None:
        for _ in range(tokens):
            self.read(1)

    def micro_batches(self, count: int, keep: bool = True) -> None:
        for _ in range(count):
            self.read(BATCH, keep)


def save(e: Engine) -> bytes:
    size = llama_cpp.llama_state_seq_get_size(e.context, 0)
    state = (ctypes.c_uint8 * size)()
    assert llama_cpp.llama_state_seq_get_data(e.context, state, size, 0) == size
    return bytes(state)


def restore(e: Engine, state: bytes) -> None:
    data = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
    assert llama_cpp.llama_state_seq_set_data(e.context, data, len(state), 0) == len(state)


# Each: what happens, alone in cells that are in order, or where another sequence has been.


def reads_on(r: Reader, among: bool) -> None:
    """Another slot ends: cells 600-855, then 0-255, 256-511, and the rest."""
    if among:
        r.another(1, 600)
    r.micro_batches(1, keep=False)
    if among:
        r.e.remove(1)
    r.micro_batches(4)


def others_end(r: Reader, among: bool) -> None:
    """Three other slots begin and end in several orders, between the micro-batches of this one."""
    steps: list[Callable[[], object]] = [
        lambda: (r.another(1, 300), r.another(2, 200)),
        lambda: r.another(3, 150),
        lambda: r.e.remove(2),
        lambda: (r.e.remove(1), r.another(2, 250)),
        lambda: (r.e.remove(3), r.another(1, 100)),
        lambda: (r.e.remove(2), r.e.remove(1)),
    ]
    for number, step in enumerate(steps):
        if among:
            step()
        r.micro_batches(1, keep=number >= 2)


def decodes_between(r: Reader, among: bool) -> None:
    """The same, with decode steps in cells 0-79, which the plugin does not see."""
    if among:
        r.another(1, 600)
    r.micro_batches(1, keep=False)
    if among:
        r.e.remove(1)
    r.decode(80)
    r.micro_batches(4)


def shifts(r: Reader, among: bool) -> None:
    """The oldest keys but for the first are dropped; then a part in the middle. New ones fill both gaps."""
    r.micro_batches(4, keep=False)
    for filler, begin, end in ((1, 64, 464), (2, 200, 520)):
        r.drop(begin, end, None if among else filler)
        r.micro_batches(1)


def is_restored(r: Reader, among: bool) -> None:
    """Saved out of order, overwritten by another sequence, and restored where that one has left room."""
    reads_on(r, among)
    r.logits.clear()
    r.targets.clear()
    if among:
        state = save(r.e)
        position = r.e.position[0]
        r.e.remove(0)
        r.another(1, 500)
        r.another(2, 300)
        r.e.remove(1)
        restore(r.e, state)
        r.e.position[0] = position
    r.micro_batches(1)


def is_reused(r: Reader, among: bool) -> None:
    """What a server's cache reuse does: a part is dropped, the rest moves up, and is read on."""
    reads_on(r, among)
    r.logits.clear()
    r.targets.clear()
    r.drop(300, 700, None if among else 1)
    r.micro_batches(1)


STORIES = (reads_on, others_end, decodes_between, shifts, is_restored, is_reused)


def told(
    story: Callable[[Reader, bool], None],
    setup: Setup,
    text: list[int],
    options: str | None,
    among: bool,
) -> tuple[np.ndarray, float]:
    with engine(setup, options) as e:
        if e.plugin:
            e.plugin.reset_stats()
        r = Reader(e, text)
        story(r, among)
        if e.plugin:
            stats = e.plugin.stats()
            assert stats["sparse_rows"] > 0 and stats["density"] < 0.9, stats
            assert stats["gathered_rows"] > 0 or not among, stats
        logits = np.concatenate(r.logits)
        return logits, nll(logits, r.targets)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of random weights, in which every key matters as much as any other."""
    MODELS["llama"] = str(models.llama(tmp_path_factory.mktemp("models") / "llama.gguf"))
    return "llama"


@pytest.mark.parametrize("story", STORIES)
@pytest.mark.parametrize(("policy", "kv"), POLICIES, ids=["streaming", "flashprefill"])
def test_order(small: str, story: Callable[[Reader, bool], None], policy: str, kv: str) -> None:
    text = np.random.default_rng(1).integers(0, models.VOCABULARY, N_CTX).tolist()
    setup = Setup(model=small, kv=kv, n_ctx=N_CTX, n_ubatch=BATCH, n_seq=4)
    alone, _ = told(story, setup, text, policy, False)
    among, _ = told(story, setup, text, policy, True)
    difference = np.abs(alone - among).max()
    print(f"{story.__name__}: {difference:.2e} of {np.abs(alone).max():.1f}")
    assert difference < 1e-3 * np.abs(alone).max()


@pytest.mark.slow
@pytest.mark.parametrize("policy", [f"policy=flashprefill, {BLOCKS}", f"policy=streaming, {BLOCKS}"])
def test_text_is_as_well_read(policy: str) -> None:
    """Where another slot ends, a real model's loss is what it is alone."""
    text = prompt(N_CTX, 3)
    setup = Setup(model="q4_1", kv="f16", n_ctx=N_CTX, n_ubatch=BATCH, n_seq=4)
    _, alone = told(reads_on, setup, text, policy, False)
    _, among = told(reads_on, setup, text, policy, True)
    print(f"loss of a token with {policy}: alone {alone:.3f}, among others {among:.3f}")
    assert abs(among - alone) < 0.02
