"""The truth that an indexer learns: how much attention each key, and each distance, gets from all rows.

For a head with causal softmax A [n, n] these are A_v[j] = sum_i A[i, j] / n and A_s[d] = sum_i A[i, i-d] / n,
averaged over the query heads of a KV head (VSPrefill, arXiv 2603.04460, section 3). A is never whole: a tile
of rows is computed, added up by column, and then by diagonal. For the latter the tile is mirrored and laid
into rows that are longer than it; read with rows one shorter, each diagonal is a column.

That counts what the sink and the window get, which are kept anyway, and a key is worth the more the earlier
it stands, though each row that sees it must pay for it. `far_masses` is the truth without either: what a key
gets from a row that sees it from beyond the window, on average.
"""

from __future__ import annotations

import torch

TILES = {"cpu": 256, "cuda": 1024}  # query rows at a time: a GPU wants more work per launch
SINK, WINDOW = 64, 128  # tokens that far_masses takes to be kept anyway
LEAST_ROWS = 512  # the mean of a key that fewer rows see is a guess, and counts less


def masses(
    query: torch.Tensor, key: torch.Tensor, scale: float, tile: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (A_v, A_s), fp32 [kv_heads, tokens] each; every row sums to 1.

    Args:
        query: [tokens, heads, head_dim] of a whole prompt.
        key: [tokens, kv_heads, head_dim].
        scale: softmax scale.
        tile: query rows at a time; TILES by default.
    """
    tokens, heads, _ = query.shape
    kv_heads, tile = key.shape[1], tile or TILES[query.device.type]
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


def far_masses(
    query: torch.Tensor, key: torch.Tensor, scale: float, tile: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (verticals, slashes), fp32 [kv_heads, tokens] each; every row sums to 1.

    An entry is the mean attention that the key, or the distance, gets from the rows in which it lies beyond
    the sink and the window, before all are scaled. Entry 0 is one whole row's attention: it stands for what
    is kept anyway, so that a head without attention far away asks for few keys.

    Args: as for `masses`.
    """
    tokens, heads, _ = query.shape
    kv_heads, tile = key.shape[1], tile or TILES[query.device.type]
    group = heads // kv_heads
    by_key = torch.zeros(kv_heads, tokens, device=query.device)
    by_distance = torch.zeros(kv_heads, tokens, device=query.device)
    grouped = query.float().view(tokens, kv_heads, group, -1)
    place = torch.arange(tokens, device=query.device)
    for head in range(kv_heads):
        keys = key[:, head].float().T.contiguous()
        for begin in range(0, tokens, tile):
            end = min(begin + tile, tokens)
            share = _softmax(grouped[begin:end, head].transpose(0, 1), keys[:, :end], scale, begin).sum(dim=0)
            share.masked_fill_(place[None, :end] > place[begin:end, None] - WINDOW, 0)
            share[:, :SINK] = 0
            by_key[head, :end] += share.sum(dim=0)
            by_distance[head, :end] += _diagonals(share)
    by_key /= group * (tokens - place - WINDOW).clamp(min=LEAST_ROWS)
    by_distance /= group * (tokens - place - SINK).clamp(min=LEAST_ROWS)
    for one in (by_key, by_distance):
        one[:, 0] = 1
        one /= one.sum(dim=1, keepdim=True)
    return by_key, by_distance


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
