"""Masks that are handed to a verb: the layout of the call, and the mask as the call wants it."""

from __future__ import annotations

from typing import Any

from ._layout import Layout, layout_of
from .errors import refuse, refuse_type
from .mask import BlockMask


def places_of_mask(
    ops: Any, mask: Any, tensors: tuple[Any, ...], causal: bool | None, lengths: tuple[Any, ...], guess: bool
) -> Layout:
    """Return the layout of a call with a mask that is given, or refuse the mask."""
    if not isinstance(mask, BlockMask):
        refuse_type(
            "mask", f"a {type(mask).__name__}", "a BlockMask; BlockMask.from_dense makes one of bools"
        )
    made_for = mask._layout
    if causal is None:
        causal = made_for.causal
    (cu_q, cu_k), (max_q, max_k), used, table = lengths
    if cu_q is not None and max_q is None:
        max_q = made_for.max_seqlen_q
    if (cu_k is not None or table is not None) and max_k is None:
        max_k = made_for.max_seqlen_k
    places = layout_of(ops, tensors, causal, (cu_q, cu_k), (max_q, max_k), used, table, guess)
    if places.causal != made_for.causal:
        refuse("causal", causal, f"what the mask was made for ({made_for.causal})")
    for name in ("batch", "total_q", "max_seqlen_q", "max_seqlen_k"):
        if getattr(places, name) != getattr(made_for, name):
            refuse(f"mask's {name}", getattr(made_for, name), f"that of q and k ({getattr(places, name)})")
    return places


def fitting(ops: Any, mask: BlockMask, q: Any, k: Any) -> dict[str, Any]:
    """Return a mask for q and k: of q's array library, with as many heads as they ask for. Or refuse it."""
    bits, lists = mask.bits, {"vertical_slash": mask.vertical_slash, "key_lists": mask.key_lists}
    skipped = mask.skipped
    if mask._ops is not ops:  # made with the other array library: its words, in host memory
        bits, skipped = ops.words_of(mask._ops.to_host(bits)), None
        lists = {n: None if x is None else ops.from_host(mask._ops.to_host(x)) for n, x in lists.items()}
    if not ops.same_device(bits, q):
        refuse("mask's device", bits.device, f"q's ({q.device})")
    heads = k.shape[-2] if mask.share_heads else q.shape[-2]
    if bits.shape[0] == 1 and heads > 1:
        bits, skipped = ops.expand_heads(bits, heads), None
        if lists["key_lists"] is not None:
            lists["key_lists"] = ops.expand_heads(lists["key_lists"], heads)
    if bits.shape[0] != heads:
        what = "kv_heads" if mask.share_heads else "q_heads"
        refuse("mask's number of heads", bits.shape[0], f"1, or {what} ({heads})")
    return {**mask._given, "bits": bits, **lists, "skipped": skipped}
