"""VSPrefill's selection on a GPU, in PyTorch: what an indexer predicts of keys and values there.

Verticals stay tokens where that is asked for: one list of keys per head, which all tiles of a sequence
share. Slashes are rounded out to the blocks that hold some of them: CUDA's attention gathers no keys of a
slash. Predictions are made anew in each call.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any, TypeGuard

from . import _key_lists
from ._arrays import on_cuda
from ._layout import Layout, ceil_div
from ._prototype import _keys_of
from .errors import refuse
from .mask import BlockMask
from .policies import Policy, VSPrefill
from .policies.indexer import Indexer

_KEYS_AT_ONCE = 16384
_LISTED_DIMS = (64, 128, 256)


def selects_in_torch(policy: Policy, k: Any) -> TypeGuard[VSPrefill]:
    """Return whether `join_lines` selects for these keys; else the library does."""
    return (
        isinstance(policy, VSPrefill)
        and on_cuda(k)
        and policy.weights is not None
        and policy.vertical_mass < 1
        and policy.slash_mass < 1
    )


@lru_cache(maxsize=256)
def _weights(indexer: Indexer, layer: int, device: str) -> tuple[Any, ...]:
    torch = sys.modules["torch"]
    return tuple(torch.from_numpy(part.copy()).to(device) for part in indexer.layers[layer])


def _logits(k: Any, v: Any, weights: tuple[Any, ...]) -> Any:
    """Return logits of verticals and slashes, fp32 [2, kv_heads, keys]; -inf where they are not finite."""
    torch = sys.modules["torch"]
    up, bias, vertical, slash = weights
    heads = torch.stack([vertical, slash], dim=-1)  # [kv_heads, hidden, 2]
    parts = []
    for first in range(0, len(k), _KEYS_AT_ONCE):
        both = torch.cat([x[first : first + _KEYS_AT_ONCE] for x in (k, v)], dim=-1).float().transpose(0, 1)
        z = torch.nn.functional.silu(torch.baddbmm(bias[:, None], both, up.transpose(1, 2)))
        parts.append(z @ heads)
    logits = torch.cat(parts, dim=1).permute(2, 0, 1)
    return logits.masked_fill(~logits.isfinite(), -float("inf"))


def _fewest(logits: Any, mass: float) -> Any:
    """Return the fewest entries with this share of the softmax over the last axis, as bools."""
    torch = sys.modules["torch"]
    share = (logits - logits.amax(-1, keepdim=True)).exp().nan_to_num(0).double()
    falling, order = share.sort(dim=-1, descending=True, stable=True)
    before = falling.cumsum(-1) - falling
    chosen = (before < mass * falling.sum(-1, keepdim=True)) & (logits.gather(-1, order) > -float("inf"))
    return torch.zeros_like(chosen).scatter(-1, order, chosen)


def _gathers(k: Any) -> bool:
    """Return whether attention over these keys takes lists of keys."""
    torch = sys.modules["torch"]
    kinds = (torch.float16, torch.bfloat16)
    return k.dtype in kinds and k.shape[-1] in _LISTED_DIMS


def _write_lists(mask: BlockMask, verticals: dict[int, Any], layout: Layout) -> None:
    """Give the mask each sequence's verticals, bool [mask heads, keys]: one list per head. Count them."""
    torch, ops = sys.modules["torch"], mask._ops
    places, tile, size = layout.sequences(ops), mask.tile_tokens, mask.block_size
    mask.segment_tiles = max(1, *(ceil_div(rows, tile) for _, rows, _ in places))
    room = max((int(chosen.sum(-1).max()) for chosen in verticals.values()), default=0)
    rows_of_lists = _key_lists.rows_of(layout, mask._segment_tokens)
    mask.key_lists = ops.zero_counts(mask.bits, (mask.heads, rows_of_lists, 2 + max(1, room)))
    for seq, chosen in verticals.items():
        begin, rows, keys = places[seq]
        count = chosen.sum(-1, dtype=torch.int32)
        order = chosen.byte().sort(dim=-1, descending=True, stable=True).indices[:, :room].int()
        row = mask.key_lists[:, _key_lists.place_of(seq, begin, rows, mask._segment_tokens).start]
        row[:, 0] = row[:, 1] = count
        there = torch.arange(order.shape[1], device=order.device) < count[:, None]
        row[:, 2 : 2 + order.shape[1]] = order * there
        held = torch.nn.functional.pad(chosen.float(), (0, -keys % size)).unflatten(-1, (-1, size)).sum(-1)
        first = begin // tile + seq
        tiles = slice(first, first + ceil_div(rows, tile))
        kept = ops.unpack(mask.bits[:, tiles], held.shape[1])
        open_ = ops.visible_before(layout.visible(rows, keys, tile, size), held.shape[1], kept) & ~kept
        added = (open_.float() @ held[..., None]).squeeze(-1).int()
        mask.counts[:, tiles] += (added + size // 2) // size


def _blocks(verticals: Any, slashes: Any, rows: int, mask: BlockMask) -> Any:
    """Return blocks that hold a vertical or that a slash crosses in a tile: [kv_heads, tiles, blocks]."""
    torch = sys.modules["torch"]
    keys, size, tile = verticals.shape[-1], mask.block_size, mask.tile_tokens
    begin = torch.arange(ceil_div(keys, size), device=verticals.device) * size
    end = (begin + size).clamp(max=keys)
    first = keys - rows + torch.arange(ceil_div(rows, tile), device=verticals.device) * tile
    last = (first + tile).clamp(max=keys) - 1

    def up_to(chosen: Any) -> Any:  # how many there are before each place
        return torch.nn.functional.pad(chosen.long().cumsum(-1), (1, 0))

    held = up_to(verticals)
    held = held[:, end] > held[:, begin]
    crossed = up_to(slashes)
    least = (first[:, None] - end[None] + 1).clamp(min=0)
    most = (last[:, None] - begin[None] + 1).clamp(min=0)
    return held[:, None] | (crossed[:, most] > crossed[:, torch.minimum(least, most)])


def join_lines(mask: BlockMask, policy: VSPrefill, tensors: tuple[Any, Any, Any], layout: Layout) -> None:
    """Add what the indexer predicts to the forced blocks of a mask, in place.

    Args:
        mask: the forced blocks, as ``policy.forced`` selects them.
        policy: whose weights predict.
        tensors: the call's q, k and v. The first is not read.
        layout: where the sequences lie in them.
    """
    torch, (_, k, v), ops = sys.modules["torch"], tensors, mask._ops
    if policy.layer is None:
        refuse("layer", None, "one of the weights': " + ", ".join(map(str, sorted(policy.weights.layers))))
    up = policy.weights.layers[policy.layer].up
    if (up.shape[0], up.shape[2]) != (k.shape[-2], 2 * k.shape[-1]):
        ours = f"{k.shape[-2]} KV heads of {k.shape[-1]}"
        refuse(
            "the weights' shape",
            f"for {up.shape[0]} KV heads of {up.shape[2] // 2}",
            f"the problem's ({ours})",
        )
    weights = _weights(policy.weights, policy.layer, str(k.device))
    listed = policy.rounding == "tokens" and _gathers(k)
    lists: dict[int, Any] = {}
    starts = None if layout.cu_seqlens_k is None else ops.to_host(layout.cu_seqlens_k)
    for seq, (begin, rows, keys) in enumerate(layout.sequences(ops)):
        if rows <= 0 or keys < rows:  # the library has refused lengths that are impossible
            continue
        start = 0 if starts is None else int(starts[seq])
        own_k, own_v = (_keys_of(x, layout, seq, keys, start) for x in (k, v))
        logits = _logits(own_k, own_v, weights)
        verticals, slashes = (
            _fewest(of, mass)
            for of, mass in zip(logits, (policy.vertical_mass, policy.slash_mass), strict=True)
        )
        group = mask.heads // k.shape[-2]
        if listed:
            lists[seq] = verticals.repeat_interleave(group, dim=0)
            verticals = torch.zeros_like(verticals)
        keep = _blocks(verticals, slashes, rows, mask).repeat_interleave(group, dim=0)
        first = begin // mask.tile_tokens + seq
        forced = ops.unpack(mask.bits[:, first : first + keep.shape[1]], keep.shape[2])
        mask._write(seq, (begin, rows, keys), forced | keep)
    if listed:
        _write_lists(mask, lists, layout)
