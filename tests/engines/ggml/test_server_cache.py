"""What llama-server does with its caches: slots that end, prompts kept in memory and in files, parts that are
reused, contexts that are full, clients that leave; and embeddings.

The model is small and of random weights, so that every key matters and a request takes a second. What comes
after a prompt is compared by the log probabilities of all tokens: with every block kept to those of the stock
engine, and under a sparse policy to what the prompt gives in a fresh cache, whose cells are in order.
"""

from __future__ import annotations

import json
import time
import urllib.error
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import models
import numpy as np
import pytest
from engine import MODELS, PLUGIN, Setup, engine
from programs import Server, config_of

UBATCH = 256
DENSE = "policy = dense"
STREAMING = "policy = streaming, sink_blocks = 1, window_blocks = 2, block_size = 64, final_chunk = never"
EQUAL = 0.02  # of log probabilities; 0.002 was seen. Streaming and dense are apart by more than 1
MATTERS = 0.5
TEXT = np.random.default_rng(1).integers(3, models.VOCABULARY, 4000).tolist()
OTHER = np.random.default_rng(2).integers(3, models.VOCABULARY, 4000).tolist()

Next = dict[int, float]  # the log probability of each token to come


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    MODELS["writes"] = str(models.llama_that_writes(tmp_path_factory.mktemp("models") / "llama.gguf"))
    return MODELS["writes"]


@dataclass
class Asked:
    """A server, and what is asked of it."""

    server: Server
    folder: Path

    def after(self, tokens: list[int], slot: int = -1, cached: int | None = None) -> Next:
        """What may come after a prompt, of which so many tokens must be in the cache."""
        body = {"prompt": tokens, "n_predict": 1, "n_probs": models.VOCABULARY, "temperature": 0}
        body |= {"id_slot": slot, "ignore_eos": True}
        answer = self.server.ask("completion", body)
        if cached is not None:
            assert answer["timings"]["cache_n"] == cached
        top = answer["completion_probabilities"][0]["top_logprobs"]
        return {each["id"]: each["logprob"] for each in top}

    def slot(self, number: int, action: str, file: str = "") -> dict:
        return self.server.ask(f"slots/{number}?action={action}", {"filename": file})

    def leave(self, tokens: list[int], slot: int) -> None:
        """A client that goes while its answer is written."""
        body = {"prompt": tokens, "n_predict": 3000, "stream": True, "id_slot": slot, "ignore_eos": True}
        answer = self.server.open("completion", body)
        assert answer.readline()
        answer.close()
        deadline = time.monotonic() + 60
        while "cancel task" not in self.server.log and time.monotonic() < deadline:
            time.sleep(0.1)
        assert "cancel task" in self.server.log


@contextmanager
def asked(model: str, folder: Path, options: str | None, *more: str, slots: int = 3) -> Iterator[Asked]:
    """A server of the stock engine, or with options one that has the plugin."""
    config = config_of(folder, options) if options else None
    saved = ["--slot-save-path", str(folder)]
    arguments = ["-ub", str(UBATCH), "--kv-unified", *saved, *more]
    server = Server(PLUGIN if options else None, config, *arguments, model=model, slots=slots)
    try:
        yield Asked(server, folder)
    finally:
        server.close()


def apart(one: Next, other: Next) -> float:
    assert one.keys() == other.keys()
    return max(abs(one[token] - other[token]) for token in one)


# Each: what happens, alone in cells that are in order, or among others. Returns what comes after prompts.


def another_slot_ends(a: Asked, among: bool) -> list[Next]:
    if among:
        a.after(OTHER[:600], 1)
    a.after(TEXT[:256], 0)
    if among:
        a.slot(1, "erase")
    return [a.after(TEXT[:end], 0) for end in (1024, 1280)]


def slots_end_in_several_orders(a: Asked, among: bool) -> list[Next]:
    """Three slots; one reads while the others end, begin again and end in another order."""
    if among:
        a.after(OTHER[:300], 1)
    a.after(TEXT[:256], 0)
    if among:
        a.after(OTHER[500:900], 2)
    a.after(TEXT[:512], 0, 256)
    if among:
        a.slot(1, "erase")
    a.after(TEXT[:768], 0, 512)
    if among:
        a.after(OTHER[1000:1200], 1)
        a.slot(2, "erase")
    a.after(TEXT[:1280], 0, 768)
    if among:
        a.slot(1, "erase")
    return [a.after(TEXT[:1792], 0, 1280)]


def a_client_leaves(a: Asked, among: bool) -> list[Next]:
    if among:
        a.leave(OTHER[:600], 1)
    a.after(TEXT[:256], 0)
    if among:
        a.slot(1, "erase")
    return [a.after(TEXT[:1280], 0, 256)]


def a_prompt_comes_from_memory(a: Asked, among: bool) -> list[Next]:
    """Idle slots' prompts go to memory when another request comes, and come back where there is room."""
    if among:
        a.after(OTHER[:400], 1)
    a.after(TEXT[:1024], 0)
    if among:
        a.after(OTHER[1000:1700], 1)
        a.after(OTHER[2000:2300], 2)
        assert "saving idle slot to prompt cache" in a.server.log
    return [a.after(TEXT[:1536], cached=1024)]


def a_slot_comes_from_a_file(a: Asked, among: bool) -> list[Next]:
    """Files that are broken are refused, and change nothing for others."""
    if among:
        a.after(OTHER[:600], 1)
    a.after(TEXT[:256], 0)
    if among:
        a.slot(1, "erase")
    a.after(TEXT[:1024], 0, 256)
    if among:
        assert a.slot(0, "save", "good.bin")["n_saved"] == 1024
        a.slot(0, "erase")
        whole = (a.folder / "good.bin").read_bytes()
        # One that is cut in the middle of its cells ends llama-server itself, with the plugin or without.
        broken = {
            "head.bin": whole[:10],
            "empty.bin": b"",
            "other.bin": b"GGUF" * 999,
        }
        broken["version.bin"] = whole[:4] + b"\xff\xff" + whole[6:]
        for name, content in broken.items():
            (a.folder / name).write_bytes(content)
        for name in (*broken, "missing.bin"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                a.slot(0, "restore", name)
            assert refused.value.code == 400
            assert "Unable to restore slot" in json.loads(refused.value.read())["error"]["message"]
        a.after(OTHER[1000:1500], 1)
        a.after(OTHER[2000:2300], 2)
        a.slot(1, "erase")
        assert a.slot(0, "restore", "good.bin")["n_restored"] == 1024
    return [a.after(TEXT[:1536], 0, 1024)]


Story = Callable[[Asked, bool], list[Next]]
KEEP_SLOTS = "--no-cache-idle-slots"
STORIES: list[tuple[Story, tuple[str, ...]]] = [
    (another_slot_ends, (KEEP_SLOTS,)),
    (slots_end_in_several_orders, (KEEP_SLOTS,)),
    (a_client_leaves, (KEEP_SLOTS,)),
    (a_prompt_comes_from_memory, ("--cache-ram", "512")),
    (a_slot_comes_from_a_file, (KEEP_SLOTS,)),
]


@pytest.mark.parametrize(("story", "more"), STORIES, ids=[story.__name__ for story, _ in STORIES])
def test_story(story: Story, more: tuple[str, ...], model: str, tmp_path: Path) -> None:
    told = {}
    for name, options, among in (
        ("stock", None, True),
        ("dense", DENSE, True),
        ("alone", STREAMING, False),
        ("among", STREAMING, True),
    ):
        with asked(model, tmp_path, options, *more) as it:
            told[name] = story(it, among)
    for number, stock in enumerate(told["stock"]):
        dense, alone, among = (told[name][number] for name in ("dense", "alone", "among"))
        print(
            f"dense {apart(stock, dense):.1e}, sparse {apart(alone, among):.1e} of {apart(stock, alone):.1f}"
        )
        assert apart(stock, dense) < EQUAL
        assert apart(alone, among) < EQUAL
        assert apart(stock, alone) > MATTERS


def test_cache_reuse(model: str, tmp_path: Path) -> None:
    """A prompt whose beginning was cut: what follows is moved up in the cache, and read on."""
    first, second = TEXT[:1280], TEXT[:256] + TEXT[512:1792]
    more = ("--cache-reuse", "64", KEEP_SLOTS)
    told = {}
    for options in (None, DENSE, STREAMING):
        with asked(model, tmp_path, options, *more) as it:
            it.after(first, 0)
            told[options] = it.after(second, 0, 1024)
    # In order: another sequence takes the cells that become free.
    setup = Setup(model="writes", kv="f16", n_ctx=4096, n_ubatch=UBATCH, n_seq=2)
    with engine(setup, STREAMING.replace(" = ", "=")) as e:
        e.feed([(0, first)])
        e.forget(256, 512)
        e.feed([(1, OTHER[:256])])
        logits = e.feed([(0, second[1024:])])[0][-1].astype(np.float64)
    logits -= logits.max()
    logits -= np.log(np.exp(logits).sum())
    alone = {token: float(logits[token]) for token in told[STREAMING]}
    print(f"dense {apart(told[None], told[DENSE]):.1e}, sparse {apart(alone, told[STREAMING]):.1e}")
    assert apart(told[None], told[DENSE]) < EQUAL
    assert apart(alone, told[STREAMING]) < EQUAL
    assert apart(told[None], told[STREAMING]) > MATTERS


def test_a_context_that_is_full_is_shifted(model: str, tmp_path: Path) -> None:
    """In the middle of an answer; and the rest is read on."""
    answers = []
    for options in (None, DENSE, STREAMING):
        with asked(model, tmp_path, options, "-c", "1024", "--context-shift", slots=1) as it:
            body = {
                "prompt": TEXT[:1000],
                "n_predict": 40,
                "temperature": 0,
                "n_keep": 0,
                "return_tokens": True,
            }
            answer = it.server.ask("completion", {**body, "ignore_eos": True})
            assert answer["truncated"] and len(answer["tokens"]) == 40
            assert "slot context shift" in it.server.log
            kept = (TEXT[:1000] + answer["tokens"])[-400:]
            answers.append((answer["tokens"], it.after(kept + TEXT[1000:1400], 0)))
    (stock, after_stock), (dense, after_dense), (_, after_sparse) = answers
    assert stock == dense
    assert apart(after_stock, after_dense) < EQUAL
    assert after_sparse


def test_a_cache_that_is_full(model: str, tmp_path: Path) -> None:
    """Slots share a cache that cannot hold them all: who finds no room is told so; the server goes on."""
    for options in (DENSE, STREAMING):
        with asked(model, tmp_path, options, "-c", "1024", KEEP_SLOTS, "--cache-ram", "0") as it:
            alone = it.after(TEXT[:768], 0)
            answers = []
            for slot in (1, 2, 0):
                try:
                    answers.append(it.after(TEXT[:768], slot))
                except urllib.error.HTTPError as error:
                    assert error.code in (400, 500), error.read()
            assert answers
            for slot in range(3):
                it.slot(slot, "erase")
            answers.append(it.after(TEXT[:768], 2))
        assert all(apart(alone, answer) < EQUAL for answer in answers)


@pytest.mark.parametrize("pooling", ["last", "none"])  # with "mean" this llama.cpp ends by itself
def test_embeddings(pooling: str, model: str, tmp_path: Path) -> None:
    """Of several prompts: the stock engine's with every block; alone what they are in one request."""
    texts = [
        TEXT[:800],
        OTHER[:500],
        TEXT[2000:2700],
    ]  # no more than a micro-batch, which would cut them elsewhere
    more = ("--embedding", "--pooling", pooling, "-ub", "2048", "-b", "2048")

    def of(it: Asked, contents: list[list[int]]) -> np.ndarray:
        with it.server.open("embedding", {"content": contents}) as answer:
            found = json.loads(answer.read())
        found.sort(key=lambda each: each["index"])
        rows = np.concatenate([np.array(each["embedding"]) for each in found])
        return rows / np.linalg.norm(rows, axis=-1, keepdims=True)

    with asked(model, tmp_path, None, *more) as it:
        stock = of(it, texts)
    with asked(model, tmp_path, DENSE, *more) as it:
        dense = of(it, texts)
    with asked(model, tmp_path, STREAMING, *more) as it:
        alone = np.concatenate([of(it, [text]) for text in texts])
        together = of(it, texts)
    assert len(stock) == (len(texts) if pooling == "last" else sum(map(len, texts)))
    print(f"dense {np.abs(stock - dense).max():.1e}, sparse {np.abs(alone - together).max():.1e}")
    assert np.abs(stock - dense).max() < 2e-3
    assert np.abs(alone - together).max() < 2e-3
    assert np.abs(stock - alone).max() > 1e-2


@pytest.mark.parametrize(
    ("more", "computes"),
    [
        (("-fa", "auto"), True),
        (("-ngl", "99"), True),
        (("--device", "FlashPrefill", "-ngl", "99", "-fa", "on"), True),
        (("--device", "FlashPrefill", "-ngl", "99", "-fa", "auto"), False),
        (("-fa", "off"), False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_options_of_llama_cpp(more: tuple[str, ...], computes: bool, model: str, tmp_path: Path) -> None:
    """With -ngl, --device and -fa the policy is at work, or one line says that nothing is."""
    with asked(model, tmp_path, None, *(() if computes else ("-fa", "off"))) as it:
        stock = it.after(TEXT[:1280], 0)
    with asked(model, tmp_path, STREAMING) as it:
        sparse = it.after(TEXT[:1280], 0)
    with asked(model, tmp_path, STREAMING, *more) as it:
        answer = it.after(TEXT[:1280], 0)
        log = it.server.log
    assert apart(answer, sparse if computes else stock) < EQUAL
    assert apart(answer, stock if computes else sparse) > MATTERS
    assert log.count("flash attention is off, so the plugin computes nothing") == (0 if computes else 1)
