"""Weights that policies bring to the library, by number, and what calls with them keep.

A policy reaches the library as text, through operators that torch.compile traces. Weights don't fit into
text, so it has their number; `bound` fills their addresses into the struct that the text became.

Logits of keys that a call has seen are kept here for the next chunk of the prompt. Each entry says which key
and value it is of, so whose call it was does not matter: prompts by turns are right, and only the last one
is fast.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np

from .. import _abi
from ..errors import refuse
from .indexer import Indexer

UNBOUND = 2**31 - 1  # of weights of several layers, none of which was named
_MOST_KEPT = 64 << 20  # bytes of a layer's logits
_ENTRY = ctypes.sizeof(_abi.VSPrefillLogits)


class Bound:
    """One layer's weights, and the logits of keys that it saw last."""

    def __init__(self, indexer: Indexer, layer: int) -> None:
        self.parts = [np.ascontiguousarray(part, np.float32) for part in indexer.layers[layer]]
        self.sizes = indexer.kv_heads, indexer.head_dim, indexer.hidden
        self.lock = threading.Lock()
        self.logits = np.zeros((0, 0, 0, _ENTRY), np.uint8)

    def describe(self, policy: _abi.VSPrefill) -> None:
        """Fill in shapes and addresses."""
        policy.kv_heads, policy.head_dim, policy.hidden = self.sizes
        policy.up, policy.bias, policy.vertical, policy.slash = (part.ctypes.data for part in self.parts)

    def room(self, batch: int, kv_heads: int, keys: int) -> bool:
        """Make room for so many keys, if they are not too many; needs the lock."""
        shape = self.logits.shape
        if shape[0] >= batch and shape[1] == kv_heads and shape[2] >= keys:
            return True
        batch, tokens = max(batch, shape[0]), max(1 << (keys - 1).bit_length(), shape[2])
        if batch * kv_heads * tokens * _ENTRY > _MOST_KEPT:
            return False
        logits = np.zeros((batch, kv_heads, tokens, _ENTRY), np.uint8)
        if shape[1] == kv_heads:
            logits[: shape[0], :, : shape[2]] = self.logits
        self.logits = logits
        return True


_NUMBERS: dict[tuple[str, int], int] = {}
_BOUND: dict[int, Bound] = {}
_LOCK = threading.Lock()


def number_of(indexer: Indexer, layer: int) -> int:
    """Return the number of a layer's weights, the same for equal ones."""
    key = (indexer.fingerprint, layer)
    with _LOCK:
        if key not in _NUMBERS:
            number = len(_NUMBERS) + 1
            _BOUND[number] = Bound(indexer, layer)
            _NUMBERS[key] = number
        return _NUMBERS[key]


def bound(struct: Any, problem: _abi.Problem, ends: bool) -> AbstractContextManager[Any]:
    """Hold a policy's struct, with the addresses of its weights if it has some.

    Args:
        struct: what the policy's text became; it is not changed.
        problem: what it is to select for.
        ends: whether the call reads whole prompts, whose logits no later call asks for.
    """
    kind = (
        _abi.VSPrefill.from_buffer_copy(struct)
        if ctypes.sizeof(struct) >= ctypes.sizeof(_abi.VSPrefill)
        else None
    )
    if kind is None or kind.common.kind != _abi.VSPREFILL or kind.indexer == 0:
        return nullcontext(struct)
    return _bound(kind, problem, ends)


@contextmanager
def _bound(kind: _abi.VSPrefill, problem: _abi.Problem, ends: bool) -> Iterator[Any]:
    if kind.indexer not in _BOUND:
        refuse("layer", "None", "a layer of the weights, which VSPrefill.at_layer(layer) names")
    weights = _BOUND[kind.indexer]
    weights.describe(kind)
    if (ends and problem.max_seqlen_k == problem.max_seqlen_q) or not weights.lock.acquire(blocking=False):
        yield kind
        return
    try:
        if problem.max_seqlen_k and weights.room(problem.batch, problem.kv_heads, problem.max_seqlen_k):
            kind.logits, kind.logit_tokens = weights.logits.ctypes.data, weights.logits.shape[2]
        yield kind
    finally:
        weights.lock.release()
