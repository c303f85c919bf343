"""Key lists of a mask: the C header's array [heads, segment rows, 2 + room], and arrays of keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ._layout import Layout, ceil_div
from .errors import refuse, refuse_type

__all__: list[str] = []


def rows_of(layout: Layout, segment_tokens: int) -> int:
    """Return how many rows the array has for each head."""
    return layout.total_q // segment_tokens + layout.batch


def place_of(seq: int, begin: int, rows: int, segment_tokens: int) -> slice:
    """Return the rows of one sequence, whose first query token is `begin` of all."""
    first = begin // segment_tokens + seq
    return slice(first, first + ceil_div(rows, segment_tokens))


def unpacked(lists: np.ndarray) -> list[list[np.ndarray]]:
    """Return rows [heads, segments, 2 + room] as an array of keys for each head and segment."""
    return [[row[2 : 2 + row[0]].copy() for row in head] for head in lists]


def packed(
    parts: Sequence[Any],
    heads: int,
    layout: Layout,
    places: Sequence[tuple[int, int, int]],
    segment_tokens: int,
) -> np.ndarray:
    """Undo `unpacked`, for all sequences: [heads, segment rows, 2 + room], with room for the longest list.

    Args:
        parts: for each sequence, the keys by head and segment.
        heads: mask heads.
        layout: the mask's layout.
        places: each sequence's first query token, query tokens and keys.
        segment_tokens: query tokens per list.
    """
    checked = []
    for b, (part, (_, rows, keys)) in enumerate(zip(parts, places, strict=True)):
        segments, where = ceil_div(rows, segment_tokens), f"keys[{b}]" if len(parts) > 1 else "keys"
        if len(part) != heads or any(len(head) != segments for head in part):
            shape = (len(part), *sorted({len(head) for head in part}))
            refuse(f"{where}'s lists", shape, f"{(heads, segments)}: heads, segments")
        checked.append(
            [
                [_keys(f"{where}[{h}][{i}]", one, keys) for i, one in enumerate(head)]
                for h, head in enumerate(part)
            ]
        )
    room = max((len(one) for part in checked for head in part for one in head), default=0)
    lists = np.zeros((heads, rows_of(layout, segment_tokens), 2 + max(1, room)), np.int32)
    for b, (part, (begin, rows, _)) in enumerate(zip(checked, places, strict=True)):
        first = place_of(b, begin, rows, segment_tokens).start
        for h, head in enumerate(part):
            for i, one in enumerate(head):
                lists[h, first + i, :2] = len(one)
                lists[h, first + i, 2 : 2 + len(one)] = one
    return lists


def _keys(name: str, one: Any, keys: int) -> np.ndarray:
    values = np.asarray(one if len(one) else np.empty(0, np.int64))
    if values.dtype.kind not in "iu" or values.ndim != 1:
        refuse_type(name, f"an array of {values.dtype} with {values.ndim} axes", "a list of integers")
    if (np.diff(values) <= 0).any() or (len(values) and not 0 <= values[0] <= values[-1] < keys):
        refuse(name, values.tolist()[:8], f"ascending, from 0 to {keys - 1}")
    return values


def blocks_of(
    lists: Sequence[Sequence[np.ndarray]],
    visible: Sequence[int],
    blocks: int,
    block_size: int,
    segment_tiles: int,
) -> np.ndarray:
    """Return the visible blocks that hold a listed key, bool [heads, tiles, blocks]."""
    touched = np.zeros((len(lists), len(visible), blocks), np.bool_)
    for h, head in enumerate(lists):
        for m, limit in enumerate(visible):
            held = head[m // segment_tiles] // block_size
            touched[h, m, held[held < limit]] = True
    return touched
