"""llama.cpp through llama-cpp-python's low-level API, with the plugin or without, in one process.

The plugin is loaded for a context's life and unloaded after it, so that the stock engine really is that.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import llama_cpp
import numpy as np

LIBRARIES = Path(os.environ["LLAMA_CPP_LIB_PATH"])
PLUGIN = Path(os.environ["FLASHPREFILL_PLUGIN"]) / "libggml-flashprefill.so"
MODELS = {
    "q4_1": os.environ["FLASHPREFILL_MODEL"],
    "f32": os.environ["FLASHPREFILL_MODEL_F32"],
}
KV_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8, "bf16": 30}  # ggml_type
DENSE = "policy=dense, min_rows=64"

ggml = ctypes.CDLL(str(LIBRARIES / "libggml.so"))
ggml.ggml_backend_load.restype = ctypes.c_void_p
ggml.ggml_backend_load.argtypes = [ctypes.c_char_p]
ggml.ggml_backend_unload.argtypes = [ctypes.c_void_p]
base = ctypes.CDLL(str(LIBRARIES / "libggml-base.so"))
base.ggml_backend_reg_get_proc_address.restype = ctypes.c_void_p
base.ggml_backend_reg_get_proc_address.argtypes = [ctypes.c_void_p, ctypes.c_char_p]

log: list[str] = []
DEBUG = 1  # ggml_log_level


@llama_cpp.llama_log_callback
def _keep(level: int, text: bytes, _data: object) -> None:
    if level != DEBUG:
        log.append(text.decode(errors="replace"))


llama_cpp.llama_log_set(_keep, ctypes.c_void_p())
llama_cpp.llama_backend_init()
_models: dict[str, object] = {}


def model_of(name: str) -> object:
    if name not in _models:
        parameters = llama_cpp.llama_model_default_params()
        _models[name] = llama_cpp.llama_model_load_from_file(MODELS[name].encode(), parameters)
        assert _models[name], "".join(log[-20:])
    return _models[name]


class Plugin:
    """The loaded plugin: its options and figures."""

    def __init__(self) -> None:
        self.reg = ggml.ggml_backend_load(str(PLUGIN).encode())
        assert self.reg, "".join(log[-5:])

    def _function(self, name: str, kind: type) -> object:
        return kind(base.ggml_backend_reg_get_proc_address(self.reg, name.encode()))

    def set_options(self, text: str) -> str | None:
        """Returns what is wrong with them."""
        function = self._function(
            "flashprefill_set_options", ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_char_p)
        )
        message = function(text.encode())
        return message.decode() if message else None

    def stats(self) -> dict:
        kind = ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t)
        text = ctypes.create_string_buffer(2048)
        self._function("flashprefill_stats", kind)(text, len(text))
        return json.loads(text.value)

    def reset_stats(self) -> None:
        self._function("flashprefill_reset_stats", ctypes.CFUNCTYPE(None))()

    def unload(self) -> None:
        ggml.ggml_backend_unload(self.reg)


@dataclass
class Setup:
    """What a context is made with."""

    model: str = "f32"
    kv: str = "f32"
    n_ctx: int = 2048
    n_ubatch: int = 512
    n_seq: int = 1
    unified: bool = True
    flash: int = 1  # llama_flash_attn_type: -1 auto, 0 off, 1 on
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)


class Engine:
    """A context. Tokens go in by `feed`; logits come out of the rows that were asked for."""

    def __init__(self, setup: Setup, options: str | None) -> None:
        self.plugin = None
        self.model = model_of(setup.model)
        self.vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(self.vocabulary)
        if options is not None:
            self.plugin = Plugin()
            wrong = self.plugin.set_options(options)
            assert wrong is None, wrong
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = setup.n_ctx
        parameters.n_batch = setup.n_ctx
        parameters.n_ubatch = setup.n_ubatch
        parameters.n_seq_max = setup.n_seq
        parameters.n_threads = parameters.n_threads_batch = setup.threads
        parameters.flash_attn_type = setup.flash
        parameters.type_k = parameters.type_v = KV_TYPES[setup.kv]
        parameters.kv_unified = setup.unified
        parameters.no_perf = True
        self.context = llama_cpp.llama_init_from_model(self.model, parameters)
        assert self.context, "".join(log[-20:])
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.position: dict[int, int] = {}

    def close(self) -> None:
        llama_cpp.llama_free(self.context)
        if self.plugin:
            self.plugin.unload()

    def feed(self, rows: Sequence[tuple[int, Sequence[int]]], every: int = 0) -> dict[int, np.ndarray]:
        """Appends tokens to sequences, in one batch: rows are (sequence, tokens).

        Returns the logits of each sequence: of every `every`-th token, and of its last, in order.
        """
        total = sum(len(tokens) for _, tokens in rows)
        batch = llama_cpp.llama_batch_init(total, 0, 1)
        wanted: dict[int, list[int]] = {}
        i = 0
        for sequence, tokens in rows:
            for at, token in enumerate(tokens):
                batch.token[i] = token
                batch.pos[i] = self.position.get(sequence, 0)
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = sequence
                wants = at == len(tokens) - 1 or (every and at % every == every - 1)
                batch.logits[i] = bool(wants)
                if wants:
                    wanted.setdefault(sequence, []).append(i)
                self.position[sequence] = self.position.get(sequence, 0) + 1
                i += 1
        batch.n_tokens = total
        status = llama_cpp.llama_decode(self.context, batch)
        assert status == 0, "".join(log[-5:])
        logits = {s: np.stack([self._logits(i) for i in indices]) for s, indices in wanted.items()}
        llama_cpp.llama_batch_free(batch)
        return logits

    def _logits(self, index: int) -> np.ndarray:
        row = llama_cpp.llama_get_logits_ith(self.context, index)
        return np.ctypeslib.as_array(row, shape=(self.n_vocab,)).copy()

    def greedy(self, logits: np.ndarray, count: int, sequence: int = 0) -> tuple[list[int], np.ndarray]:
        """Goes on from a prompt's last logits. Returns the tokens and the logits that each was chosen by."""
        tokens, seen = [], []
        for _ in range(count):
            seen.append(logits)
            tokens.append(int(logits.argmax()))
            logits = self.feed([(sequence, tokens[-1:])])[sequence][-1]
        return tokens, np.stack(seen)

    def forget(self, begin: int, end: int, sequence: int = 0) -> None:
        """A context shift: removes positions [begin, end) and moves the later ones down."""
        llama_cpp.llama_memory_seq_rm(self.memory, sequence, begin, end)
        llama_cpp.llama_memory_seq_add(self.memory, sequence, end, -1, begin - end)
        self.position[sequence] -= end - begin

    def remove(self, sequence: int) -> None:
        llama_cpp.llama_memory_seq_rm(self.memory, sequence, -1, -1)
        self.position.pop(sequence, None)


@contextlib.contextmanager
def engine(setup: Setup, options: str | None = None) -> Iterator[Engine]:
    """A context of the stock engine, or with options one that has the plugin."""
    it = Engine(setup, options)
    try:
        yield it
    finally:
        it.close()


def encode(text: str, special: bool = False) -> list[int]:
    vocabulary = llama_cpp.llama_model_get_vocab(model_of("f32"))
    raw = text.encode()
    tokens = (llama_cpp.llama_token * (len(raw) + 16))()
    count = llama_cpp.llama_tokenize(vocabulary, raw, len(raw), tokens, len(tokens), False, special)
    return list(tokens[:count])


def decode(tokens: Sequence[int]) -> str:
    vocabulary = llama_cpp.llama_model_get_vocab(model_of("f32"))
    text = b""
    piece = ctypes.create_string_buffer(256)
    for token in tokens:
        count = llama_cpp.llama_token_to_piece(vocabulary, token, piece, len(piece), 0, False)
        text += piece.raw[:count]
    return text.decode(errors="replace")


def _library() -> list[int]:
    """Real text that is on every Debian: a licence and a module by turns."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    licences = Path("/usr/share/common-licenses")
    text = ""
    for licence, module in (
        ("GPL-3", "argparse.py"),
        ("Apache-2.0", "textwrap.py"),
        ("MPL-2.0", "heapq.py"),
        ("LGPL-2.1", "shutil.py"),
        ("GPL-2", "inspect.py"),
    ):
        for path in (licences / licence, stdlib / module):
            text += path.read_text(encoding="utf-8", errors="ignore").strip() + "\n\n"
    return encode(text)


TEXT = _library()


def prompt(tokens: int, number: int = 0) -> list[int]:
    """So many tokens of real text; another number, another part of it."""
    begin = number * 3181 % (len(TEXT) - tokens)
    return TEXT[begin : begin + tokens]
