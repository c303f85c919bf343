"""The three verbs: prefill_attention, select, attend.

They check what can be seen of their arguments without reading memory, allocate results, and hand over to the
engine: for NumPy arrays by a call, for torch tensors through a torch operator (torch_op.py), so that
torch.compile traces every line here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from ._arguments import final_chunk_of, results_of, shared_of
from ._axes import as_given, heads_first, swapped
from ._calls import ATTEND, PREFILL, SELECT
from ._key_lists import rows_of as key_list_rows
from ._layout import Layout, check_bool, layout_of, tile_tokens_of
from ._ops import ops_of
from ._prototype import join_function
from .errors import refuse, refuse_type
from .mask import BlockMask
from .policies import FlashPrefill, MaskPolicy, Policy
from .policies.text import policy_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._typing import Array, AttendOptions, AxisOrder, Lengths, PrefillOptions, Table
    from .stats import Stats

__all__ = ["attend", "prefill_attention", "select"]


def _new_mask(ops: Any, q: Any, k: Any, layout: Layout, policy: Policy) -> BlockMask:
    """Return an empty mask for the policy to fill."""
    tile_tokens = tile_tokens_of(policy.share_heads, q.shape[-2] // k.shape[-2])
    heads = k.shape[-2] if policy.share_heads else q.shape[-2]
    shape = layout.mask_shape(heads, tile_tokens, policy.block_size)
    room = policy._vertical_slash_room(layout.max_seqlen_k)
    list_room, segment_tiles = policy._key_list_room(layout.max_seqlen_k, tile_tokens)
    segment_rows = key_list_rows(layout, segment_tiles * tile_tokens)
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
        ops.zero_counts(q, (heads, segment_rows, 2 + list_room)) if list_room else None,
        segment_tiles,
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


@overload
def prefill_attention(
    q: Array,
    k: Array,
    v: Array,
    policy: Policy | str | None = ...,
    *,
    out: Array | None = ...,
    return_lse: Literal[False] = ...,
    return_stats: Literal[False] = ...,
    **options: Unpack[PrefillOptions],
) -> Array: ...


@overload
def prefill_attention(
    q: Array,
    k: Array,
    v: Array,
    policy: Policy | str | None = ...,
    *,
    out: Array | None = ...,
    return_lse: Literal[True],
    return_stats: Literal[False] = ...,
    **options: Unpack[PrefillOptions],
) -> tuple[Array, Array]: ...


@overload
def prefill_attention(
    q: Array,
    k: Array,
    v: Array,
    policy: Policy | str | None = ...,
    *,
    out: Array | None = ...,
    return_lse: Literal[False] = ...,
    return_stats: Literal[True],
    **options: Unpack[PrefillOptions],
) -> tuple[Array, Stats]: ...


@overload
def prefill_attention(
    q: Array,
    k: Array,
    v: Array,
    policy: Policy | str | None = ...,
    *,
    out: Array | None = ...,
    return_lse: Literal[True],
    return_stats: Literal[True],
    **options: Unpack[PrefillOptions],
) -> tuple[Array, Array, Stats]: ...


@overload
def prefill_attention(
    q: Array,
    k: Array,
    v: Array,
    policy: Policy | str | None = ...,
    *,
    out: Array | None = ...,
    return_lse: bool = ...,
    return_stats: bool = ...,
    **options: Unpack[PrefillOptions],
) -> Array | tuple[Any, ...]: ...


def prefill_attention(
    q: Any,
    k: Any,
    v: Any,
    policy: Policy | str | None = None,
    *,
    softmax_scale: float | None = None,
    causal: bool = True,
    cu_seqlens_q: Lengths | None = None,
    cu_seqlens_k: Lengths | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_k: Lengths | None = None,
    block_table: Table | None = None,
    layout: AxisOrder | None = None,
    final_chunk: bool | Sequence[bool] = True,
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
        causal: False: every query sees every key, as in encoders and in image or video diffusion. Then
            :class:`XAttention`, :class:`SpargeAttn` (both on the CPU), :class:`Dense` and a
            :class:`MaskPolicy` select; a window of more than one block and a dense tail have no meaning
            and are refused.
        cu_seqlens_q: cumulative query lengths of packed sequences, [batch + 1], integers of any kind.
        cu_seqlens_k: cumulative key lengths of packed sequences, likewise.
        max_seqlen_q: an upper bound of packed query lengths, in tokens. On a GPU and under torch.compile give
            both: they are not read from the device, which would synchronise; without them the total is used
            as the bound.
        max_seqlen_k: an upper bound of packed or paged key lengths, in tokens.
        seqused_k: keys of each sequence that are in use, [batch].
        block_table: page of each run of page_size keys, [batch, pages per sequence].
        layout: the order of axes of q, k, v and out. "bthd" is the one above; "bhtd" is PyTorch's own,
            [batch, heads, tokens, head_dim]. The default is "bthd", with a warning where there are more heads
            than tokens.
        final_chunk: whether q ends its prompt, so that the policy's dense tail applies; or one bool per
            sequence.
        out: where to write the result: of q's shape and dtype, in memory of its own.
        return_lse: return the natural logarithm of each row's softmax denominator too, fp32 [batch, heads,
            tokens], or [heads, tokens] where q has 3 axes.
        return_stats: return a :class:`Stats` too.
        threads: CPU threads at most. The default is torch.get_num_threads() for torch tensors, else what
            OpenMP would use.
        backend: the name of one of :func:`flashprefill.backends`; the default is the best.
        target: one of the backend's instruction sets, or on CUDA whose kernels run (``"portable"``); the
            default is the best.

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
    flip = heads_first(layout, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, block_table=block_table)
    if flip:
        q, k, v = swapped(q), swapped(k), swapped(v)
    own_out, out = out, swapped(out) if flip else out
    places = layout_of(
        ops,
        (q, k, v),
        causal,
        (cu_seqlens_q, cu_seqlens_k),
        (max_seqlen_q, max_seqlen_k),
        seqused_k,
        block_table,
        layout is None,
    )
    policy = FlashPrefill() if policy is None else policy_of(policy)
    final_chunk = final_chunk_of(final_chunk, places.batch)
    shared = shared_of(q, places, softmax_scale, threads, backend, target)
    check_bool("return_stats", return_stats)
    out, lse = results_of(ops, q, out, return_lse)
    mask = None
    if isinstance(policy, MaskPolicy):
        mask = _select(ops, q, k, places, policy, final_chunk, shared)
        ops.attend(*ATTEND.pack(q=q, k=k, v=v, out=out, lse=lse, **mask._given, **shared))
    else:
        lists = BlockMask._no_lists
        if return_stats:
            mask = _new_mask(ops, q, k, places, policy)
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
    results = [as_given(out, own_out, flip)]
    if lse is not None:
        results.append(lse)
    if return_stats and mask is not None:
        results.append(mask.stats)
    return results[0] if len(results) == 1 else tuple(results)


def select(
    q: Array,
    k: Array,
    policy: Policy | str | None = None,
    *,
    softmax_scale: float | None = None,
    causal: bool = True,
    cu_seqlens_q: Lengths | None = None,
    cu_seqlens_k: Lengths | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_k: Lengths | None = None,
    block_table: Table | None = None,
    layout: AxisOrder | None = None,
    final_chunk: bool | Sequence[bool] = True,
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
        causal: False: every query sees every key, as in encoders and in image or video diffusion. Then
            :class:`XAttention`, :class:`SpargeAttn` (both on the CPU), :class:`Dense` and a
            :class:`MaskPolicy` select; a window of more than one block and a dense tail have no meaning
            and are refused.
        cu_seqlens_q: as in :func:`prefill_attention`.
        cu_seqlens_k: as in :func:`prefill_attention`.
        max_seqlen_q: as in :func:`prefill_attention`.
        max_seqlen_k: as in :func:`prefill_attention`.
        seqused_k: as in :func:`prefill_attention`.
        block_table: as in :func:`prefill_attention`.
        layout: as in :func:`prefill_attention`.
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
    flip = heads_first(layout, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, block_table=block_table)
    if flip:
        q, k = swapped(q), swapped(k)
    places = layout_of(
        ops,
        (q, k, k),
        causal,
        (cu_seqlens_q, cu_seqlens_k),
        (max_seqlen_q, max_seqlen_k),
        seqused_k,
        block_table,
        layout is None,
    )
    policy = FlashPrefill() if policy is None else policy_of(policy)
    final_chunk = final_chunk_of(final_chunk, places.batch)
    shared = shared_of(q, places, softmax_scale, threads, backend, target)
    return _select(ops, q, k, places, policy, final_chunk, shared)


@overload
def attend(
    q: Array,
    k: Array,
    v: Array,
    mask: BlockMask,
    *,
    out: Array | None = ...,
    return_lse: Literal[False] = ...,
    **options: Unpack[AttendOptions],
) -> Array: ...


@overload
def attend(
    q: Array,
    k: Array,
    v: Array,
    mask: BlockMask,
    *,
    out: Array | None = ...,
    return_lse: Literal[True],
    **options: Unpack[AttendOptions],
) -> tuple[Array, Array]: ...


@overload
def attend(
    q: Array,
    k: Array,
    v: Array,
    mask: BlockMask,
    *,
    out: Array | None = ...,
    return_lse: bool,
    **options: Unpack[AttendOptions],
) -> Array | tuple[Array, Array]: ...


def attend(
    q: Any,
    k: Any,
    v: Any,
    mask: BlockMask,
    *,
    softmax_scale: float | None = None,
    causal: bool | None = None,
    cu_seqlens_q: Lengths | None = None,
    cu_seqlens_k: Lengths | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_k: Lengths | None = None,
    block_table: Table | None = None,
    layout: AxisOrder | None = None,
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
        layout: as in :func:`prefill_attention`.
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
    flip = heads_first(layout, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, block_table=block_table)
    if flip:
        q, k, v = swapped(q), swapped(k), swapped(v)
    own_out, out = out, swapped(out) if flip else out
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
    places = layout_of(
        ops,
        (q, k, v),
        causal,
        (cu_seqlens_q, cu_seqlens_k),
        (max_seqlen_q, max_seqlen_k),
        seqused_k,
        block_table,
        layout is None,
    )
    if places.causal != made_for.causal:
        refuse("causal", causal, f"what the mask was made for ({made_for.causal})")
    for name in ("batch", "total_q", "max_seqlen_q", "max_seqlen_k"):
        if getattr(places, name) != getattr(made_for, name):
            refuse(f"mask's {name}", getattr(made_for, name), f"that of q and k ({getattr(places, name)})")
    given = _fitting(ops, mask, q, k)
    shared = shared_of(q, places, softmax_scale, threads, backend, target)
    out, lse = results_of(ops, q, out, return_lse)
    ops.attend(*ATTEND.pack(q=q, k=k, v=v, out=out, lse=lse, **given, **shared))
    out = as_given(out, own_out, flip)
    return out if lse is None else (out, lse)


def _fitting(ops: Any, mask: BlockMask, q: Any, k: Any) -> dict[str, Any]:
    """Return a mask for q and k: of q's array library, with as many heads as they ask for. Or refuse it."""
    bits, lists = mask.bits, {"vertical_slash": mask.vertical_slash, "key_lists": mask.key_lists}
    if mask._ops is not ops:  # made with the other array library: its words, in host memory
        bits = ops.words_of(mask._ops.to_host(bits))
        lists = {n: None if x is None else ops.from_host(mask._ops.to_host(x)) for n, x in lists.items()}
    if not ops.same_device(bits, q):
        refuse("mask's device", bits.device, f"q's ({q.device})")
    heads = k.shape[-2] if mask.share_heads else q.shape[-2]
    if bits.shape[0] == 1 and heads > 1:
        bits = ops.expand_heads(bits, heads)
        if lists["key_lists"] is not None:
            lists["key_lists"] = ops.expand_heads(lists["key_lists"], heads)
    if bits.shape[0] != heads:
        what = "kv_heads" if mask.share_heads else "q_heads"
        refuse("mask's number of heads", bits.shape[0], f"1, or {what} ({heads})")
    return {**mask._given, "bits": bits, **lists}
