"""Scorers that are not policies: the oracle, which knows the true masses, and bounds like Quest's.

They show what the policies could reach, and what another description of a block is worth: a box around the
block's keys, whose corner nearest to the query bounds every score in it (Quest, arXiv 2406.10774, for
decoding, a page at a time; here for tiles, with the rows pooled and each row's bounds normalised).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .figures import Layer

BOUNDS_POOL = 16  # rows


def oracle(layer: Layer) -> torch.Tensor:
    """The true masses, [heads, tiles, blocks]."""
    return layer.mass


def bounds(layer: Layer) -> torch.Tensor:
    """Sum over a tile's pooled rows of the softmax over blocks of each block's largest possible score."""
    size, (n, heads, dim) = layer.block_size, layer.query.shape
    group = heads // layer.key.shape[1]
    blocks = -(-n // size)
    whole = n // size  # only complete blocks are scored, by rows that see all of them
    keys = layer.key[: whole * size].float().view(whole, size, -1, dim)
    low, high = keys.amin(dim=1), keys.amax(dim=1)  # [blocks, kv_heads, dim]
    device = layer.query.device
    last = torch.arange(BOUNDS_POOL - 1, n + BOUNDS_POOL - 1, BOUNDS_POOL, device=device).clamp(max=n - 1)
    sees = last[:, None] >= torch.arange(whole, device=device)[None, :] * size + size - 1
    energy = torch.zeros(heads, blocks, blocks, device=device)
    if not sees.any():
        return energy
    for head in range(heads):
        rows = _pooled(layer.query[:, head].float(), BOUNDS_POOL)
        up, down = rows.clamp(min=0), rows.clamp(max=0)
        score = (up @ high[:, head // group].T + down @ low[:, head // group].T) * layer.scale
        share = torch.softmax(score.masked_fill(~sees, float("-inf")), dim=-1).nan_to_num()
        tile = last // size
        energy[head, :, :whole].index_add_(0, tile, share)
    return energy


def _pooled(rows: torch.Tensor, pool: int) -> torch.Tensor:
    """Means of each `pool` consecutive rows; a short rest is its own mean."""
    owner = torch.arange(len(rows), device=rows.device) // pool
    sums = torch.zeros(-(-len(rows) // pool), rows.shape[1], device=rows.device).index_add_(0, owner, rows)
    return sums / torch.bincount(owner)[:, None]


def by_alpha(energy: torch.Tensor, alpha: float) -> torch.Tensor:
    """Blocks from a share of the tile's largest energy on."""
    return (energy >= alpha * energy.amax(dim=-1, keepdim=True)) & (energy > 0)


def by_share(energy: torch.Tensor, share: float) -> torch.Tensor:
    """Blocks from a share of the tile's whole energy on: for true masses, the most recall at a density."""
    return (energy >= share * energy.sum(dim=-1, keepdim=True)) & (energy > 0)


def by_blocks(energy: torch.Tensor, blocks: float) -> torch.Tensor:
    """The same number of blocks for every tile."""
    top = energy.topk(min(int(blocks), energy.shape[-1]), dim=-1).indices
    return torch.zeros_like(energy, dtype=torch.bool).scatter_(-1, top, True)


SCORERS: dict[str, Callable[[Layer], torch.Tensor]] = {"oracle": oracle, "bounds": bounds}
RULES: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "alpha": by_alpha,
    "share": by_share,
    "blocks": by_blocks,
}
