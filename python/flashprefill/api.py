"""The three verbs: prefill_attention, select, attend.

They check what can be seen of their arguments without reading memory, allocate results, and hand over to the
engine: for NumPy arrays by a call, for torch tensors through a torch operator (torch_op.py), so that
torch.compile traces every line here.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ._calls import ATTEND, PREFILL, SELECT
from ._layout import Layout, check_bool, layout_of, tile_tokens_of
from ._ops import ops_of
from ._prototype import join_function
from .errors import refuse, refuse_type
from .mask import BlockMask
from .policies import FlashPrefill, MaskPolicy, Policy
from .policies.text import policy_of

__all__ = ["attend", "prefill_attention", "select"]


def _scale(softmax_scale: Any, q: Any) -> float:
    if softmax_scale is None:
        return float(q.shape[-1]) ** -0.5 if q.shape[-1] else 1.0
    if isinstance(softmax_scale, float):
        return softmax_scale
    if isinstance(softmax_scale, (bool, str)) or not hasattr(softmax_scale, "__float__"):
        refuse_type("softmax_scale", repr(softmax_scale), "a number")
    return float(softmax_scale)


def _final_chunk(final_chunk: Any, batch: int) -> list[bool]:
    if isinstance(final_chunk, (bool, np.bool_)):
        return [bool(final_chunk)]
    if not hasattr(final_chunk, "__len__") or isinstance(final_chunk, str):
        refuse_type("final_chunk", repr(final_chunk), "True or False, or one of them for each sequence")
    chunks = [bool(chunk) for chunk in final_chunk]
    if len(chunks) != batch:
        refuse("final_chunk", f"a list of {len(chunks)}", f"one bool for each of {batch} sequences")
    return chunks or [True]


def _threads(threads: Any) -> int:
    if threads is None:
        return -1
    if isinstance(threads, bool) or not hasattr(threads, "__index__"):
        refuse_type("threads", repr(threads), "an integer or None")
    if not 0 <= int(threads) <= 4096:
        refuse("threads", threads, "from 0 (as many as OpenMP would use) to 4096")
    return int(threads)


def _name(argument: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        refuse_type(argument, repr(value), "a string or None")
    return value


def _shared(
    q: Any, layout: Layout, softmax_scale: Any, threads: Any, backend: Any, target: Any
) -> dict[str, Any]:
    """Return the arguments that all verbs take, checked, by their names in _calls.py."""
    return {
        **layout.arguments(),
        "softmax_scale": _scale(softmax_scale, q),
        "threads": _threads(threads),
        "backend": _name("backend", backend),
        "target": _name("target", target),
    }


def _new_mask(ops: Any, q: Any, k: Any, layout: Layout, policy: Policy) -> BlockMask:
    """Return an empty mask for the policy to fill."""
    tile_tokens = tile_tokens_of(policy.share_heads, q.shape[-2] // k.shape[-2])
    heads = k.shape[-2] if policy.share_heads else q.shape[-2]
    shape = layout.mask_shape(heads, tile_tokens, policy.block_size)
    room = policy._vertical_slash_room(layout.max_seqlen_k)
    return BlockMask(
        layout.kept(ops),
        ops.zero_words(q, shape),
        ops.zero_counts(q, shape[:2]),
        ops.zero_counts(q, (layout.batch,)),
        tile_tokens,
        policy.block_size,
        policy.share_heads,
        policy.corrects,
        ops.zero_counts(q, (layout.batch, heads, 2 + sum(room))) if sum(room) else None,
        room[0],
    )


def _select(
    ops: Any,
    q: Any,
    k: Any,
    layout: Layout,
    policy: Policy,
    final_chunk: list[bool],
    shared: dict[str, Any],
) -> BlockMask:
    """Return the policy's mask; all arguments are checked."""
    if isinstance(policy, MaskPolicy):
        mask = _select(ops, q, k, layout, policy.forced, final_chunk, shared)
        ops.in_python(join_function, mask, policy, q, k, layout)
        return mask
    mask = _new_mask(ops, q, k, layout, policy)
    ops.select(*SELECT.pack(q=q, k=k, **mask._lists, final_chunk=final_chunk, policy=policy.text, **shared))
    return mask


def _results(ops: Any, q: Any, out: Any, return_lse: bool) -> tuple[Any, Any]:
    """Return the outputs, out and lse; new ones unless given."""
    check_bool("return_lse", return_lse)
    if out is None:
        out = ops.empty_like(q)
    else:
        ops.check("out", out, q)
        if out.dtype != q.dtype:
            refuse_type("out.dtype", out.dtype, f"q's ({q.dtype})")
        if out.shape != q.shape:
            refuse("out.shape", tuple(out.shape), f"q's ({tuple(q.shape)})")
        ops.check_out("out", out)
    lse = None
    if return_lse:
        batch = (q.shape[0],) if len(q.shape) == 4 else ()
        lse = ops.empty_float(q, (*batch, q.shape[-2], q.shape[-3]))
    return out, lse


def prefill_attention(
    q: Any,
    k: Any,
    v: Any,
    policy: Policy | str | None = None,
    *,
    softmax_scale: float | None = None,
    causal: bool = True,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_k: Any = None,
    block_table: Any = None,
    final_chunk: Any = True,
    out: Any = None,
    return_lse: bool = False,
    return_stats: bool = False,
    threads: int | None = None,
    backend: str | None = None,
    target: str | None = None,
) -> Any:
    """Compute attention of q over the keys that a policy selects.

    Row i of a sequence of Lq queries and Lk keys sits at position Lk - Lq + i and sees the keys up to there.

    Args:
        q: queries, [tokens, heads, head_dim] for one sequence, [batch, tokens, heads, head_dim], or packed
            [tokens, heads, head_dim] with ``cu_seqlens_q``. q, k and v are NumPy arrays (float32, float16, or
            ml_dtypes' bfloat16) or torch tensors, of any strides.
        k: keys, with the same axes as q but kv_heads, which divide heads; or packed [tokens, kv_heads,
            head_dim] with ``cu_seqlens_k``; or pages [pages, page_size, kv_heads, head_dim] with
            ``block_table``.
        v: values, of k's shape.
        policy: what to keep, as a policy or as text ("flashprefill(alpha=0.2)"); the default is
            ``FlashPrefill()``.
        softmax_scale: factor of the scores; the default is head_dim**-0.5.
        causal: False, with :class:`Dense` only: every query sees every key.
        cu_seqlens_q: cumulative query lengths of packed sequences, [batch + 1], integers of any kind.
        cu_seqlens_k: cumulative key lengths of packed sequences, likewise.
        max_seqlen_q: an upper bound of packed query lengths, in tokens. On a GPU and under torch.compile give
            both: they are not read from the device, which would synchronise; without them the total is used
            as the bound.
        max_seqlen_k: an upper bound of packed or paged key lengths, in tokens.
        seqused_k: keys of each sequence that are in use, [batch].
        block_table: page of each run of page_size keys, [batch, pages per sequence].
        final_chunk: whether q ends its prompt, so that the policy's dense tail applies; or one bool per
            sequence.
        out: where to write the result: of q's shape and dtype, in memory of its own.
        return_lse: return the natural logarithm of each row's softmax denominator too, fp32 [batch, heads,
            tokens], or [heads, tokens] where q has 3 axes.
        return_stats: return a :class:`Stats` too.
        threads: CPU threads at most. The default is torch.get_num_threads() for torch tensors, else what
            OpenMP would use.
        backend: the name of one of :func:`flashprefill.backends`; the default is the best.
        target: one of the backend's instruction sets; the default is the best.

    Returns:
        out, of q's shape and dtype; or a tuple of out and the other results, in the order lse, stats.

    Raises:
        InvalidArgumentError: a value or a shape is wrong; it is a ValueError.
        ArgumentTypeError: a type or a dtype is wrong; it is a TypeError.
        UnsupportedError: no backend of this machine does it; it is a NotImplementedError.

        Each message is one line that names the argument, what it was and what it must be. Nothing is then
        written to ``out``.
    """
    ops = ops_of("q", q)
    layout = layout_of(
        ops,
        (q, k, v),
        causal,
        (cu_seqlens_q, cu_seqlens_k),
        (max_seqlen_q, max_seqlen_k),
        seqused_k,
        block_table,
    )
    policy = FlashPrefill() if policy is None else policy_of(policy)
    final_chunk = _final_chunk(final_chunk, layout.batch)
    shared = _shared(q, layout, softmax_scale, threads, backend, target)
    check_bool("return_stats", return_stats)
    out, lse = _results(ops, q, out, return_lse)
    mask = None
    if isinstance(policy, MaskPolicy):
        mask = _select(ops, q, k, layout, policy, final_chunk, shared)
        ops.attend(*ATTEND.pack(q=q, k=k, v=v, out=out, lse=lse, **mask._given, **shared))
    else:
        lists = BlockMask._no_lists
        if return_stats:
            mask = _new_mask(ops, q, k, layout, policy)
            lists = mask._lists
        ops.prefill(
            *PREFILL.pack(
                q=q,
                k=k,
                v=v,
                out=out,
                lse=lse,
                **lists,
                final_chunk=final_chunk,
                policy=policy.text,
                **shared,
            )
        )
    results = [out]
    if lse is not None:
        results.append(lse)
    if return_stats and mask is not None:
        results.append(mask.stats)
    return out if len(results) == 1 else tuple(results)


def select(
    q: Any,
    k: Any,
    policy: Policy | str | None = None,
    *,
    softmax_scale: float | None = None,
    causal: bool = True,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_k: Any = None,
    block_table: Any = None,
    final_chunk: Any = True,
    threads: int | None = None,
    backend: str | None = None,
    target: str | None = None,
) -> BlockMask:
    """Find the blocks of keys that matter to each tile of queries.

    Args:
        q: queries, as in :func:`prefill_attention`.
        k: keys, as in :func:`prefill_attention`.
        policy: what to keep, as a policy or as text ("flashprefill(alpha=0.2)"); the default is
            ``FlashPrefill()``.
        softmax_scale: factor of the scores; the default is head_dim**-0.5.
        causal: False, with :class:`Dense` only: every query sees every key.
        cu_seqlens_q: as in :func:`prefill_attention`.
        cu_seqlens_k: as in :func:`prefill_attention`.
        max_seqlen_q: as in :func:`prefill_attention`.
        max_seqlen_k: as in :func:`prefill_attention`.
        seqused_k: as in :func:`prefill_attention`.
        block_table: as in :func:`prefill_attention`.
        final_chunk: whether q ends its prompt, so that the policy's dense tail applies; or one bool per
            sequence.
        threads: as in :func:`prefill_attention`.
        backend: as in :func:`prefill_attention`.
        target: as in :func:`prefill_attention`.

    Returns:
        The mask, for :func:`attend`, or to look at.

    Raises:
        InvalidArgumentError, ArgumentTypeError, UnsupportedError: as :func:`prefill_attention`.
    """
    ops = ops_of("q", q)
    layout = layout_of(
        ops,
        (q, k, k),
        causal,
        (cu_seqlens_q, cu_seqlens_k),
        (max_seqlen_q, max_seqlen_k),
        seqused_k,
        block_table,
    )
    policy = FlashPrefill() if policy is None else policy_of(policy)
    final_chunk = _final_chunk(final_chunk, layout.batch)
    shared = _shared(q, layout, softmax_scale, threads, backend, target)
    return _select(ops, q, k, layout, policy, final_chunk, shared)


def attend(
    q: Any,
    k: Any,
    v: Any,
    mask: BlockMask,
    *,
    softmax_scale: float | None = None,
    causal: bool | None = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_k: Any = None,
    block_table: Any = None,
    out: Any = None,
    return_lse: bool = False,
    threads: int | None = None,
    backend: str | None = None,
    target: str | None = None,
) -> Any:
    """Attend exactly over the blocks that a mask keeps.

    Args:
        q: queries, as in :func:`prefill_attention`.
        k: keys, as in :func:`prefill_attention`.
        v: values, of k's shape.
        mask: from :func:`select`, or :meth:`BlockMask.from_dense`; made for sequences of these lengths.
        softmax_scale: factor of the scores; the default is head_dim**-0.5.
        causal: the default is what the mask was made for.
        cu_seqlens_q: as in :func:`prefill_attention`.
        cu_seqlens_k: as in :func:`prefill_attention`.
        max_seqlen_q: as in :func:`prefill_attention`; the default is the mask's.
        max_seqlen_k: as in :func:`prefill_attention`; the default is the mask's.
        seqused_k: as in :func:`prefill_attention`.
        block_table: as in :func:`prefill_attention`.
        out: where to write the result: of q's shape and dtype, in memory of its own.
        return_lse: return the natural logarithm of each row's softmax denominator too, fp32 [batch, heads,
            tokens], or [heads, tokens] where q has 3 axes.
        threads: as in :func:`prefill_attention`.
        backend: as in :func:`prefill_attention`.
        target: as in :func:`prefill_attention`.

    Returns:
        out, or (out, lse).

    Raises:
        InvalidArgumentError, ArgumentTypeError, UnsupportedError: as :func:`prefill_attention`.
    """
    ops = ops_of("q", q)
    if not isinstance(mask, BlockMask):
        refuse_type(
            "mask", f"a {type(mask).__name__}", "a BlockMask; BlockMask.from_dense makes one of bools"
        )
    made_for = mask._layout
    if causal is None:
        causal = made_for.causal
    if cu_seqlens_q is not None and max_seqlen_q is None:
        max_seqlen_q = made_for.max_seqlen_q
    if (cu_seqlens_k is not None or block_table is not None) and max_seqlen_k is None:
        max_seqlen_k = made_for.max_seqlen_k
    layout = layout_of(
        ops,
        (q, k, v),
        causal,
        (cu_seqlens_q, cu_seqlens_k),
        (max_seqlen_q, max_seqlen_k),
        seqused_k,
        block_table,
    )
    if layout.causal != made_for.causal:
        refuse("causal", causal, f"what the mask was made for ({made_for.causal})")
    for name in ("batch", "total_q", "max_seqlen_q", "max_seqlen_k"):
        if getattr(layout, name) != getattr(made_for, name):
            refuse(f"mask's {name}", getattr(made_for, name), f"that of q and k ({getattr(layout, name)})")
    given = _fitting(ops, mask, q, k)
    shared = _shared(q, layout, softmax_scale, threads, backend, target)
    out, lse = _results(ops, q, out, return_lse)
    ops.attend(*ATTEND.pack(q=q, k=k, v=v, out=out, lse=lse, **given, **shared))
    return out if lse is None else (out, lse)


def _fitting(ops: Any, mask: BlockMask, q: Any, k: Any) -> dict[str, Any]:
    """Return a mask for q and k: of q's array library, with as many heads as they ask for. Or refuse it."""
    bits, vertical_slash = mask.bits, mask.vertical_slash
    if mask._ops is not ops:  # made with the other array library: its words, in host memory
        bits = ops.words_of(mask._ops.to_host(bits))
        vertical_slash = None if vertical_slash is None else ops.from_host(mask._ops.to_host(vertical_slash))
    if not ops.same_device(bits, q):
        refuse("mask's device", bits.device, f"q's ({q.device})")
    heads = k.shape[-2] if mask.share_heads else q.shape[-2]
    if bits.shape[0] == 1 and heads > 1:
        bits = ops.expand_heads(bits, heads)
    if bits.shape[0] != heads:
        what = "kv_heads" if mask.share_heads else "q_heads"
        refuse("mask's number of heads", bits.shape[0], f"1, or {what} ({heads})")
    return {**mask._given, "bits": bits, "vertical_slash": vertical_slash}
