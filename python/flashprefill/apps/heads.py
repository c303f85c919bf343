"""Which heads to show, and where their attention really is.

A page of masks that all look alike teaches nothing. Heads differ in kind: some look only nearby, some go
back to the same few blocks again and again, some look everywhere, and there is one for which the selection
does worst. The kinds are told apart by the blocks that a mask keeps of its own choice, outside of those
that every mask keeps, and by how much of the head's true attention lies on them; for the choice that is
estimated from a sample of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ..mask import BlockMask

Bools = npt.NDArray[np.bool_]

KINDS = {
    "local": "looks nearby",
    "columns": "returns to a few places",
    "scattered": "picks here and there",
    "broad": "looks nearly everywhere",
    "hardest": "loses the most attention",
}


@dataclass
class Candidate:
    """One head as the choice sees it: its mask, and what of its attention is on kept and on forced blocks."""

    layer: int
    head: int
    kept: Bools
    recall: float
    forced_recall: float


def visible_blocks(mask: BlockMask, rows: int, keys: int) -> Bools:
    """Which blocks some row of each tile may see; the last of the rows sees the last of the keys."""
    tiles, blocks = -(-rows // mask.tile_tokens), -(-keys // mask.block_size)
    last = np.minimum((np.arange(tiles) + 1) * mask.tile_tokens, rows) - 1 + keys - rows
    return np.asarray(np.arange(blocks)[None, :] <= (last // mask.block_size)[:, None])


def row_mass(
    query: torch.Tensor, key: torch.Tensor, scale: float, rows: torch.Tensor, block_size: int
) -> torch.Tensor:
    """Softmax mass by block of some rows of one head, [rows, blocks]. query, key: [tokens, head_dim]."""
    blocks = -(-key.shape[0] // block_size)
    keys = torch.nn.functional.pad(key.float(), (0, 0, 0, blocks * block_size - key.shape[0]))
    scores = query[rows].float() @ keys.T * scale
    position = torch.arange(blocks * block_size, device=key.device)
    scores.masked_fill_(position[None, :] > rows[:, None], float("-inf"))
    return torch.softmax(scores, dim=-1).view(len(rows), blocks, block_size).sum(dim=-1)


def attention_mass(
    query: torch.Tensor, key: torch.Tensor, scale: float, tile_tokens: int, block_size: int, rows: int = 1024
) -> torch.Tensor:
    """Softmax mass of one head, fp32 [tiles, blocks], each row summing to 1. query, key: [tokens, head_dim].

    In strips of rows, each against the keys that it may see: half of the square, and no matrix of all pairs.
    """
    tokens, device = key.shape[0], key.device
    tiles, blocks = -(-tokens // tile_tokens), -(-tokens // block_size)
    keys = torch.nn.functional.pad(key.float(), (0, 0, 0, blocks * block_size - tokens)).T.contiguous()
    queries = query.float() * (scale * math.log2(math.e))
    result = torch.zeros(tiles, blocks, device=device)
    row, tile = torch.arange(tokens, device=device), torch.arange(tokens, device=device) // tile_tokens
    for begin in range(0, tokens, rows):
        end = min(begin + rows, tokens)
        seen, first = -(-end // block_size), begin // block_size * block_size
        scores = queries[begin:end] @ keys[:, : seen * block_size]
        future = torch.arange(first, seen * block_size, device=device)[None, :] > row[begin:end, None]
        scores[:, first:].masked_fill_(future, float("-inf"))
        scores -= scores.amax(dim=1, keepdim=True)
        sums = scores.exp2_().view(end - begin, seen, block_size).sum(dim=2)
        sums /= sums.sum(dim=1, keepdim=True)
        result[:, :seen].index_add_(0, tile[begin:end], sums)
    return result / torch.bincount(tile, minlength=tiles)[:, None]


def _features(kept: Bools, free: Bools) -> tuple[float, float]:
    """(share kept of what is free to choose, how much of that lies in columns kept nearly throughout)."""
    chosen = kept & free
    density = chosen.sum() / max(1, free.sum())
    height = free.sum(axis=0)
    fill = chosen.sum(axis=0) / np.maximum(height, 1)
    columns = float((chosen.sum(axis=0) * (fill > 0.6)).sum() / max(1, chosen.sum()))
    return float(density), columns


def choose(candidates: Sequence[Candidate], forced: Bools, visible: Bools) -> list[tuple[int, int, str]]:
    """(layer, head, kind) of up to one head of each kind, no head twice."""
    free = visible & ~forced
    table = [(one, *_features(one.kept, free)) for one in candidates]
    if not table:
        return []
    middle = max(0.15, float(np.median([density for _, density, _ in table])))
    wishes: dict[str, Callable[[Candidate, float, float], float]] = {
        "hardest": lambda one, density, columns: -one.recall,
        "local": lambda one, density, columns: one.forced_recall - density,
        "broad": lambda one, density, columns: density,
        "columns": lambda one, density, columns: columns * (0.05 < density < 0.7),
        "scattered": lambda one, density, columns: -abs(density - middle) - columns,
    }
    chosen: dict[str, Candidate] = {}
    for kind, wish in wishes.items():
        left = [row for row in table if not any(row[0] is one for one in chosen.values())]
        if left:
            chosen[kind] = max(left, key=lambda row: wish(*row))[0]
    return [(chosen[kind].layer, chosen[kind].head, kind) for kind in KINDS if kind in chosen]
