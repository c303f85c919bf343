"""The three verbs: prefill_attention, select, attend.

They check what can be seen of their arguments without reading memory, allocate results, and hand over to the
engine: for NumPy arrays by a call, for torch tensors through a torch operator (torch_op.py), so that
torch.compile traces every line here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, overload

from . import _tokens
from ._arguments import final_chunk_of, results_of, scaled, shared_of
from ._axes import as_given, heads_first, swapped
from ._calls import ATTEND, AUDIT, PREFILL, SELECT
from ._given_mask import fitting, places_of_mask
from ._layout import Layout, check_bool, layout_of
from ._lines import join_lines, selects_in_torch
from ._ops import ops_of
from ._prototype import join_function
from ._reused import mask_of
from .errors import UnsupportedError, refuse
from .guard import Guard, GuardReport, guard_of
from .mask import BlockMask
from .policies import FlashPrefill, MaskPolicy, Policy, Reuse, TokenSparse
from .policies.text import policy_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._typing import Array, AttendOptions, AxisOrder, Lengths, PrefillOptions, Scale, Table
    from .stats import Stats

__all__ = ["attend", "prefill_attention", "select"]


def _select(
    ops: Any,
    q: Any,
    k: Any,
    layout: Layout,
    policy: Policy,
    final_chunk: list[bool],
    shared: dict[str, Any],
    v: Any = None,
) -> BlockMask:
    """Return the policy's mask; all arguments are checked. v: of policies that read it."""
    if isinstance(policy, Reuse):
        inner = partial(_select, ops, q, k, layout, policy.policy, final_chunk, shared, v)
        return mask_of(ops, policy, layout, (k if policy.share_heads else q).shape[-2], inner)
    if isinstance(policy, TokenSparse):
        raise UnsupportedError(
            f"{policy.kind} drops tokens and has no mask: it is for prefill_attention alone"
        )
    if isinstance(policy, MaskPolicy) or selects_in_torch(policy, k):
        mask = _select(ops, q, k, layout, policy.forced, final_chunk, shared)
        join = join_function if isinstance(policy, MaskPolicy) else join_lines
        ops.in_python(join, mask, policy, (q, k, v), layout)
        return mask
    mask = BlockMask._for_policy(ops, q, k, layout, policy)
    ops.select(
        *SELECT.pack(q=q, k=k, v=v, **mask._lists, final_chunk=final_chunk, policy=policy.text, **shared)
    )
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
    k_scale: Scale | None = None,
    v_scale: Scale | None = None,
    q_descale: Scale | None = None,
    k_descale: Scale | None = None,
    v_descale: Scale | None = None,
    layout: AxisOrder | None = None,
    final_chunk: bool | Sequence[bool] = True,
    guard: Guard | str | None = None,
    out: Any = None,
    return_lse: bool = False,
    return_stats: bool = False,
    threads: int | None = None,
    backend: str | None = None,
    target: str | None = None,
    math: str = "input",
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
            :class:`SpargeAttn`, :class:`XAttention` (this one on the CPU), :class:`Dense` and a
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
        k_scale: what FP8 keys are multiplied by, a number or fp32 [1], [kv_heads] or [batch, kv_heads]. k and
            v may be torch.float8_e4m3fn (or that of ml_dtypes), in any layout; the default is 1.
        v_scale: what FP8 values are multiplied by, likewise.
        q_descale: what FP8 queries are multiplied by, likewise. Such queries become bf16, and so does out.
        k_descale: another name of ``k_scale``, FlashAttention's.
        v_descale: another name of ``v_scale``.
        layout: the order of axes of q, k, v and out. "bthd" is the one above; "bhtd" is PyTorch's own,
            [batch, heads, tokens, head_dim]. The default is "bthd", with a warning where there are more heads
            than tokens.
        final_chunk: whether q ends its prompt, so that the policy's dense tail applies; or one bool per
            sequence.
        guard: measure how much of the attention is kept, in the stats' ``guard``, and perhaps act on it: a
            :class:`Guard` or a text of one ("observe", "repair(target=0.95)", "strict"). With a
            :class:`MaskPolicy` heads that keep too little become dense in the mode "repair" too.
        out: where to write the result: of q's shape and dtype, in memory of its own.
        return_lse: return the natural logarithm of each row's softmax denominator too, fp32 [batch, heads,
            tokens], or [heads, tokens] where q has 3 axes.
        return_stats: return a :class:`Stats` too.
        threads: CPU threads at most. The default is torch.get_num_threads() for torch tensors, else what
            OpenMP would use.
        backend: the name of one of :func:`flashprefill.backends`; the default is the best.
        target: one of the backend's instruction sets, or on CUDA whose kernels run (``"portable"``); the
            default is the best.
        math: "input" is products in q's own dtype. "8bit" permits 8-bit ones, which err by about 4 %, where
            there are any: on a Hopper GPU, for head_dim above 64 up to 128 and blocks of a multiple of 128.

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
    given, q = q, ops.widened(q) if ops.is_fp8(q) else q
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
    scales: dict[str, Any] = {"q_descale": q_descale, "k_scale": k_scale, "k_descale": k_descale}
    scales |= {"v_scale": v_scale, "v_descale": v_descale}
    q, scales = scaled(ops, (given, q, k, v), places, scales)
    shared = shared_of(q, places, softmax_scale, threads, backend, target, math, **scales)
    check_bool("return_stats", return_stats)
    guard = guard_of(guard)
    report = None if guard is None else GuardReport(ops, guard, q, places.batch)
    guarded = {} if report is None else report.arguments()
    out, lse = results_of(ops, q, out, return_lse)
    mask = None
    stats = None
    if isinstance(policy, TokenSparse):
        if ops.is_fp8(k) or ops.is_fp8(v):
            raise UnsupportedError(f"FP8 keys and values are not for {policy.kind}")
        if report is not None:
            raise UnsupportedError(f"guard needs a policy with a mask, and {policy.kind} drops tokens")
        stats = ops.in_python(
            _tokens.prefill, ops, (q, k, v), (out, lse), policy, places, final_chunk, shared
        )
    elif isinstance(policy, (MaskPolicy, Reuse)) or selects_in_torch(policy, k):
        values = v if policy.reads_values else None
        mask = _select(ops, q, k, places, policy, final_chunk, shared, values)
        if report is not None:
            ops.audit(*AUDIT.pack(q=q, k=k, counts=mask.counts, **mask._given, **shared, **guarded))
        ops.attend(*ATTEND.pack(q=q, k=k, v=v, out=out, lse=lse, **mask._given, **shared))
    else:
        lists: dict[str, Any] = {}
        if return_stats:
            mask = BlockMask._for_policy(ops, q, k, places, policy)
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
                **guarded,
            )
        )
    results = [as_given(out, own_out, flip)]
    if lse is not None:
        results.append(lse)
    if return_stats:
        results.append(stats if mask is None else mask.stats._with(report))
    return results[0] if len(results) == 1 else tuple(results)


def select(
    q: Array,
    k: Array,
    policy: Policy | str | None = None,
    *,
    v: Array | None = None,
    softmax_scale: float | None = None,
    causal: bool = True,
    cu_seqlens_q: Lengths | None = None,
    cu_seqlens_k: Lengths | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_k: Lengths | None = None,
    block_table: Table | None = None,
    k_scale: Scale | None = None,
    q_descale: Scale | None = None,
    k_descale: Scale | None = None,
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
        v: values, of k's shape. Only a policy with ``reads_values`` (:class:`VSPrefill`) needs them.
        softmax_scale: factor of the scores; the default is head_dim**-0.5.
        causal: as in :func:`prefill_attention`.
        cu_seqlens_q: as in :func:`prefill_attention`.
        cu_seqlens_k: as in :func:`prefill_attention`.
        max_seqlen_q: as in :func:`prefill_attention`.
        max_seqlen_k: as in :func:`prefill_attention`.
        seqused_k: as in :func:`prefill_attention`.
        block_table: as in :func:`prefill_attention`.
        k_scale: as in :func:`prefill_attention`.
        q_descale: as in :func:`prefill_attention`.
        k_descale: as in :func:`prefill_attention`.
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
        q, k, v = swapped(q), swapped(k), None if v is None else swapped(v)
    given, q = q, ops.widened(q) if ops.is_fp8(q) else q
    places = layout_of(
        ops,
        (q, k, k if v is None else v),
        causal,
        (cu_seqlens_q, cu_seqlens_k),
        (max_seqlen_q, max_seqlen_k),
        seqused_k,
        block_table,
        layout is None,
    )
    policy = FlashPrefill() if policy is None else policy_of(policy)
    final_chunk = final_chunk_of(final_chunk, places.batch)
    if policy.reads_values and v is None:
        refuse("v", None, f"given: {type(policy).__name__} reads values")
    scales: dict[str, Any] = {"q_descale": q_descale, "k_scale": k_scale, "k_descale": k_descale}
    q, scales = scaled(ops, (given, q, k, None), places, scales)
    shared = shared_of(q, places, softmax_scale, threads, backend, target, **scales)
    return _select(ops, q, k, places, policy, final_chunk, shared, v if policy.reads_values else None)


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
    k_scale: Scale | None = None,
    v_scale: Scale | None = None,
    q_descale: Scale | None = None,
    k_descale: Scale | None = None,
    v_descale: Scale | None = None,
    layout: AxisOrder | None = None,
    out: Any = None,
    return_lse: bool = False,
    threads: int | None = None,
    backend: str | None = None,
    target: str | None = None,
    math: str = "input",
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
        k_scale: as in :func:`prefill_attention`.
        v_scale: as in :func:`prefill_attention`.
        q_descale: as in :func:`prefill_attention`.
        k_descale: as in :func:`prefill_attention`.
        v_descale: as in :func:`prefill_attention`.
        layout: as in :func:`prefill_attention`.
        out: where to write the result: of q's shape and dtype, in memory of its own.
        return_lse: return the natural logarithm of each row's softmax denominator too, fp32 [batch, heads,
            tokens], or [heads, tokens] where q has 3 axes.
        threads: as in :func:`prefill_attention`.
        backend: as in :func:`prefill_attention`.
        target: as in :func:`prefill_attention`.
        math: as in :func:`prefill_attention`.

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
    lengths = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), seqused_k, block_table
    given, q = q, ops.widened(q) if ops.is_fp8(q) else q
    places = places_of_mask(ops, mask, (q, k, v), causal, lengths, layout is None)
    parts = fitting(ops, mask, q, k)
    scales: dict[str, Any] = {"q_descale": q_descale, "k_scale": k_scale, "k_descale": k_descale}
    scales |= {"v_scale": v_scale, "v_descale": v_descale}
    q, scales = scaled(ops, (given, q, k, v), places, scales)
    shared = shared_of(q, places, softmax_scale, threads, backend, target, math, **scales)
    out, lse = results_of(ops, q, out, return_lse)
    ops.attend(*ATTEND.pack(q=q, k=k, v=v, out=out, lse=lse, **parts, **shared))
    out = as_given(out, own_out, flip)
    return out if lse is None else (out, lse)
