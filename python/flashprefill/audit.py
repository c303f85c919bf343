"""audit: how much of the attention a mask keeps, measured beside any operator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._arguments import scaled, shared_of
from ._axes import heads_first, swapped
from ._calls import AUDIT
from ._given_mask import fitting, places_of_mask
from ._ops import ops_of
from .errors import refuse, refuse_type, shown
from .guard import Guard, GuardReport, guard_of
from .mask import BlockMask

if TYPE_CHECKING:
    from ._typing import AxisOrder, Lengths, Scale, Table

__all__ = ["audit"]


def audit(
    q: Any,
    k: Any,
    mask: BlockMask,
    guard: Guard | str = "observe",
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
    q_descale: Scale | None = None,
    k_descale: Scale | None = None,
    layout: AxisOrder | None = None,
    threads: int | None = None,
    backend: str | None = None,
    target: str | None = None,
) -> GuardReport:
    """Measure how much of the attention a mask keeps, by a few exact rows of each head.

    Args:
        q: queries, as in :func:`prefill_attention`.
        k: keys, as in :func:`prefill_attention`.
        mask: from :func:`select`, or :meth:`BlockMask.from_dense`; made for sequences of these lengths.
        guard: a :class:`Guard` or a text of one. Modes other than "observe" change the mask: heads that keep
            too little then keep everything, since a mask tells no budget to enlarge.
        softmax_scale: factor of the scores; the default is head_dim**-0.5.
        causal: the default is what the mask was made for.
        cu_seqlens_q: as in :func:`attend`.
        cu_seqlens_k: as in :func:`attend`.
        max_seqlen_q: as in :func:`attend`.
        max_seqlen_k: as in :func:`attend`.
        seqused_k: as in :func:`attend`.
        block_table: as in :func:`attend`.
        k_scale: as in :func:`prefill_attention`.
        q_descale: as in :func:`prefill_attention`.
        k_descale: as in :func:`prefill_attention`.
        layout: as in :func:`prefill_attention`.
        threads: as in :func:`prefill_attention`.
        backend: as in :func:`prefill_attention`.
        target: as in :func:`prefill_attention`.

    Returns:
        What was found.

    Raises:
        InvalidArgumentError, ArgumentTypeError, UnsupportedError: as :func:`prefill_attention`.
    """
    ops = ops_of("q", q)
    if heads_first(layout, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, block_table=block_table):
        q, k = swapped(q), swapped(k)
    wanted = guard_of(guard)
    if wanted is None:
        refuse_type("guard", "None", "a Guard, or a text of one")
    given_q, q = q, ops.widened(q) if ops.is_fp8(q) else q
    lengths = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), seqused_k, block_table
    places = places_of_mask(ops, mask, (q, k, k), causal, lengths, layout is None)
    given = fitting(ops, mask, q, k)
    own = given["bits"] is mask.bits
    if wanted.mode != "observe" and not own:
        refuse("guard's mode", shown(wanted.mode), "observe for a mask of one head, or of another library")
    scales: dict[str, Any] = {"q_descale": q_descale, "k_scale": k_scale, "k_descale": k_descale}
    q, scales = scaled(ops, (given_q, q, k, None), places, scales)
    shared = shared_of(q, places, softmax_scale, threads, backend, target, **scales)
    report = GuardReport(ops, wanted, q, places.batch)
    counts = mask.counts if own else None
    ops.audit(*AUDIT.pack(q=q, k=k, counts=counts, **given, **shared, **report.arguments()))
    return report
