"""Selections by a Python function: what MaskPolicy's function returns, joined to a mask."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from . import _timings
from ._layout import Layout, ceil_div
from ._ops import ops_of
from .errors import UnsupportedError, refuse, shown
from .mask import BlockMask
from .policies import MaskPolicy


def join_function(mask: BlockMask, policy: MaskPolicy, tensors: tuple[Any, Any, Any], layout: Layout) -> None:
    """Add the blocks that a policy's function keeps to the forced blocks of a mask, in place.

    Args:
        mask: the forced blocks, as ``policy.forced`` selects them.
        policy: whose function is called, once for each sequence that has queries.
        tensors: the call's q, k and v. The last is not read.
        layout: where the sequences lie in them.
    """
    q, k, _ = tensors
    ops, begin_time = mask._ops, time.perf_counter()
    if ops.is_fp8(k):
        raise UnsupportedError("FP8 keys are not for a MaskPolicy, whose function would miss their scales")
    starts = None if layout.cu_seqlens_k is None else ops.to_host(layout.cu_seqlens_k)
    for seq, (begin, rows, keys) in enumerate(layout.sequences(ops)):
        if rows <= 0 or keys < rows:  # the library has refused lengths that are impossible
            continue
        own_q = q[seq] if len(q.shape) == 4 else q[begin : begin + rows]
        own_k = _keys_of(k, layout, seq, keys, 0 if starts is None else int(starts[seq]))
        with _timings.collect_timings():  # selections inside the function count as its own time
            keep = policy.function(policy.layer, own_q, own_k)
        tiles, blocks = ceil_div(rows, mask.tile_tokens), ceil_div(keys, mask.block_size)
        keep = _bools(keep, f"{policy.name}'s result", mask, (rows, keys), (tiles, blocks))
        first = begin // mask.tile_tokens + seq
        forced = ops.unpack(mask.bits[:, first : first + tiles], blocks)
        mask._write(seq, (begin, rows, keys), forced | keep)
    timings = _timings.active()
    if timings is not None and not getattr(q, "is_cuda", False):
        timings.select_seconds += time.perf_counter() - begin_time


def _keys_of(k: Any, layout: Layout, seq: int, keys: int, start: int) -> Any:
    """Return the keys of one sequence, [keys, kv_heads, head_dim]: a view, but a copy of pages."""
    if layout.block_table is not None:
        pages = layout.block_table[seq, : ceil_div(keys, k.shape[1])].clip(0, k.shape[0] - 1)
        return k[pages].reshape(-1, *k.shape[2:])[:keys]
    if layout.cu_seqlens_k is not None:
        return k[start : start + keys]
    return k[seq, :keys] if len(k.shape) == 4 else k[:keys]


def _bools(keep: Any, name: str, mask: BlockMask, lengths: tuple[int, int], shape: tuple[int, int]) -> Any:
    """Return a function's result as bool [heads or 1, tiles, blocks], where and of what the mask is."""
    ops = mask._ops
    if isinstance(keep, BlockMask):
        theirs = (keep.batch, keep.tile_tokens, keep.block_size)
        ours = (1, mask.tile_tokens, mask.block_size)
        if theirs != ours or keep._layout.sequences(keep._ops)[0][1:] != lengths:
            refuse(
                name,
                shown(keep),
                f"a BlockMask of 1 sequence of {lengths[0]} queries and {lengths[1]} keys, with tiles of "
                f"{mask.tile_tokens} tokens and blocks of {mask.block_size} keys",
            )
        keep = keep.dense()
    theirs_ops = ops_of(name, keep, "bools, as a NumPy array or a torch tensor, or a BlockMask")
    keep = theirs_ops.as_bool(name, keep)
    if len(keep.shape) != 3 or keep.shape[0] not in (1, mask.heads) or tuple(keep.shape[1:]) != shape:
        refuse(
            f"{name}'s shape",
            tuple(keep.shape),
            f"({mask.heads} or 1, {shape[0]}, {shape[1]}): {'KV ' * mask.share_heads}heads, tiles of "
            f"{mask.tile_tokens} query tokens, blocks of {mask.block_size} keys",
        )
    if theirs_ops is not ops:
        keep = ops.from_host(np.ascontiguousarray(theirs_ops.to_host(keep)))
    return keep if ops.same_device(keep, mask.bits) else keep.to(mask.bits.device)
