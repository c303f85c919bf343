"""What Reuse does in a call: select and let later layers read the mask, or read an earlier layer's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ._layout import Layout
from .mask import BlockMask
from .policies.reuse import Reuse


def mask_of(
    ops: Any, policy: Reuse, layout: Layout, heads: int, select: Callable[[], BlockMask]
) -> BlockMask:
    """Return the mask of a layer's call.

    Args:
        ops: the module of q's array library.
        policy: of the layer.
        layout: where the sequences lie.
        heads: of a mask: query heads, or KV heads where the inner policy shares lists.
        select: selects by the inner policy.
    """
    if policy.layer is None or ops.tracing():  # a graph can't hold what one layer leaves for another
        return select()
    held, own = policy.held, policy.borrowed
    with held.call(policy.layer):
        if own is None:
            mask = select()
            held.put(policy.layer, mask)
            return mask
        found = held.take(own.source)
        if found is None or not _fits(found, layout, heads):
            return select()
        return found if own.heads is None else _with_heads(found, own.heads)


def _fits(mask: BlockMask, layout: Layout, heads: int) -> bool:
    """Whether a mask was made for sequences of these lengths."""
    names = ("batch", "total_q", "max_seqlen_q", "max_seqlen_k", "causal")
    return mask.heads == heads and all(getattr(mask._layout, name) == getattr(layout, name) for name in names)


def _with_heads(mask: BlockMask, heads: tuple[int, ...]) -> BlockMask:
    """The mask whose head h is head heads[h] of another."""
    order = list(heads)
    lists, keys = mask.vertical_slash, mask.key_lists
    return BlockMask(
        mask._layout,
        mask.bits[order],
        mask.counts[order],
        mask.fallback,
        mask.tile_tokens,
        mask.block_size,
        mask.share_heads,
        mask.mean_correction,
        None if lists is None else lists[:, order],
        mask.max_verticals,
        None if keys is None else keys[order],
        mask.segment_tiles,
    )
