"""The truth that an indexer learns: how much attention each key, and each distance, gets from all rows.

For a head with causal softmax A [n, n] these are A_v[j] = sum_i A[i, j] / n and A_s[d] = sum_i A[i, i-d] / n,
averaged over the query heads of a KV head (VSPrefill, arXiv 2603.04460, section 3). A is never whole: a tile
of rows is computed, added up by column, and then by diagonal. For the latter the tile is mirrored and laid
into rows that are longer than it; read with rows one shorter, each diagonal is a column.
"""

from __future__ import annotations

import torch

TILE = 256  # query rows at a time


def masses(
    query: torch.Tensor, key: torch.Tensor, scale: float, tile: int = TILE
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (A_v, A_s), fp32 [kv_heads, tokens] each; every row sums to 1.

    Args:
        query: [tokens, heads, head_dim] of a whole prompt.
        key: [tokens, kv_heads, head_dim].
        scale: softmax scale.
        tile: query rows at a time.
    """
    tokens, heads, _ = query.shape
    kv_heads = key.shape[1]
    by_key = torch.zeros(kv_heads, tokens, device=query.device)
    by_distance = torch.zeros(kv_heads, tokens, device=query.device)
    grouped = query.float().view(tokens, kv_heads, heads // kv_heads, -1)
    for head in range(kv_heads):
        keys = key[:, head].float().T.contiguous()
        for begin in range(0, tokens, tile):
            end = min(begin + tile, tokens)
            share = _softmax(grouped[begin:end, head].transpose(0, 1), keys[:, :end], scale, begin)
            by_key[head, :end] += share.sum(dim=(0, 1))
            by_distance[head, :end] += _diagonals(share.sum(dim=0))
    factor = 1.0 / (tokens * (heads // kv_heads))
    return by_key * factor, by_distance * factor


def _softmax(query: torch.Tensor, keys: torch.Tensor, scale: float, begin: int) -> torch.Tensor:
    """The causal softmax of rows [group, rows, head_dim] from position `begin` on: [group, rows, keys]."""
    score = (query @ keys).mul_(scale)
    rows, end = score.shape[1:]
    row, column = torch.arange(rows, device=score.device), torch.arange(begin, end, device=score.device)
    score[:, :, begin:].masked_fill_(column[None, :] > row[:, None] + begin, float("-inf"))
    return torch.softmax(score, dim=-1)


def _diagonals(share: torch.Tensor) -> torch.Tensor:
    """Sums of a tile's diagonals by distance: [rows, end], whose last row sees all, to [end]."""
    rows, end = share.shape
    wide = end + rows - 1
    mirrored = torch.zeros(rows, wide, device=share.device)
    mirrored[:, :end] = share.flip(1)  # column c is now key end - 1 - c
    # Distance d of row r is column d + rows - 1 - r: the same place of each row if rows are one shorter.
    return mirrored.as_strided((rows, end), (wide - 1, 1), rows - 1).sum(dim=0)
