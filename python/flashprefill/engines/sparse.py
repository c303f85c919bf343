"""From a divided batch to the kernel: what is made once per step, and what each layer does with it.

Once a step a plugin takes its engine's batch apart (rows.py) and makes a `Plan`: for each run of sparse
requests the arguments of a call of our kernel, and for all others together a smaller batch for the engine's
own kernel, in whatever form that engine wants. Then each layer calls `run` with its queries and its cache,
which is read in place through the block table. Both kinds of rows end in one output buffer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..api import prefill_attention
from ..errors import FlashPrefillError
from ..policies import Policy
from .host import Host
from .options import Options
from .rows import Span, Split


@dataclass
class Call:
    """One run of sparse requests, as the kernel takes it."""

    span: Span
    cu_seqlens_q: torch.Tensor  # int32 [requests + 1], from 0
    seqused_k: torch.Tensor  # int32 [requests]
    block_table: torch.Tensor  # int32 [requests, pages]
    possible: int = -1  # blocks that one mask head could keep; -1: not yet known


@dataclass
class Plan:
    """A batch, divided into sparse and dense requests.

    Attributes:
        host: the engine.
        options: what the user asked for.
        split: the requests.
        calls: of our kernel.
        engine: the engine's metadata for the dense requests; None if there are none.
        engine_rows: rows of the batch that these are: a slice where they lie together, else their numbers.
        requests: numbers of the dense requests on the device; None if there are none.
    """

    host: Host
    options: Options
    split: Split
    calls: list[Call]
    engine: Any = None
    engine_rows: slice | torch.Tensor | None = None
    requests: torch.Tensor | None = None


def to_device(device: torch.device, numbers: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return numbers as a tensor on a device, which is not waited for."""
    tensor = torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda")
    return tensor.to(device, non_blocking=True)


def starts_of(rows: Sequence[int]) -> list[int]:
    """Return the rows before each request, and in all: [requests + 1]."""
    starts = [0]
    for count in rows:
        starts.append(starts[-1] + count)
    return starts


def call_of(span: Span, seq_lens: torch.Tensor, block_table: torch.Tensor) -> Call:
    """Return the call for a run of requests.

    Args:
        span: the requests.
        seq_lens: keys of each request of the batch, int32 [requests].
        block_table: their pages, int32 [requests, pages].
    """
    here = slice(span.first, span.past)
    cu_seqlens_q = to_device(seq_lens.device, starts_of(span.rows), torch.int32)
    return Call(span, cu_seqlens_q, seq_lens[here], block_table[here])


def mark_dense(plan: Plan, starts: Sequence[int], device: torch.device) -> list[int]:
    """Set the plan's `engine_rows` and `requests`; return the rows of each dense request."""
    dense = plan.split.dense
    together = plan.split.dense_range(starts)
    if together is not None:
        plan.engine_rows = slice(*together)
    else:
        numbers = [row for request in dense for row in range(starts[request], starts[request + 1])]
        plan.engine_rows = to_device(device, numbers, torch.int64)
    plan.requests = to_device(device, dense, torch.int64)
    return [starts[request + 1] - starts[request] for request in dense]


def run(
    plan: Plan,
    query: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    output: torch.Tensor,
    scale: float,
    engine: Callable[[torch.Tensor, Any, torch.Tensor], Any],
    layer: int = 0,
) -> bool:
    """Compute a layer of a batch.

    Args:
        plan: what the batch is made of.
        query: [rows, heads, head_dim].
        k_pages: the cache's keys, [pages, page_size, kv_heads, head_dim] of any strides.
        v_pages: values, likewise.
        output: where results go, of query's shape.
        scale: factor of the scores.
        engine: computes (query, metadata, output) densely.
        layer: the layer's number.

    Returns:
        Whether it is done. If not, the log says why, and the caller is to run the whole batch densely.
    """
    try:
        policy = plan.options.policy.at_layer(layer)
        for call in plan.calls:
            _attend(plan, policy, call, query, k_pages, v_pages, output, scale)
    except FlashPrefillError as error:
        plan.host.metrics.fallbacks[str(error)] += 1
        plan.host.say_once(logging.WARNING, f"flashprefill: a batch was run densely: {error}")
        return False
    rows = plan.engine_rows
    if isinstance(rows, slice):
        engine(query[rows], plan.engine, output[rows])
    elif rows is not None:
        gathered = query[rows]
        result = torch.empty_like(gathered)
        engine(gathered, plan.engine, result)
        output[rows] = result
    return True


def _attend(
    plan: Plan,
    policy: Policy,
    call: Call,
    query: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    output: torch.Tensor,
    scale: float,
) -> None:
    span = call.span
    here = slice(span.begin, span.end)
    _, stats = prefill_attention(
        query[here],
        k_pages,
        v_pages,
        policy,
        softmax_scale=scale,
        cu_seqlens_q=call.cu_seqlens_q,
        max_seqlen_q=max(span.rows),
        seqused_k=call.seqused_k,
        max_seqlen_k=max(span.keys),
        block_table=call.block_table,
        final_chunk=span.final,
        out=output[here],
        return_stats=True,
    )
    counts = stats._counts
    if call.possible < 0:
        call.possible = sum(
            sum(stats._layout.visible(rows, keys, stats._tile_tokens, stats._block_size))
            for rows, keys in zip(span.rows, span.keys, strict=True)
        )
    plan.host.metrics.count_call(counts, call.possible * counts.shape[0])
