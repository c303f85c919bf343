"""From a divided batch to the kernel: what is made once per step, and what each layer does with it.

Once a step a plugin takes its engine's batch apart (rows.py) and makes a `Plan`: for each run of sparse
requests the arguments of a call of our kernel, and for all others together a smaller batch for the engine's
own kernel, in whatever form that engine wants. Then each layer calls `run` with its queries and its cache,
which is read in place through the block table. Both kinds of rows end in one output buffer.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .._prepared import PreparedPrefill, signature
from ..api import prefill_attention
from ..errors import FlashPrefillError
from ..guard import Guard
from ..policies import MaskPolicy, Policy
from .findings import Findings, sums_of
from .host import Host
from .metrics import Metrics
from .options import Options
from .rows import Span, Split

if TYPE_CHECKING:
    from .findings import Places

Scales = tuple[torch.Tensor | None, torch.Tensor | None]  # of FP8 keys and values, fp32 [1] or [kv_heads]
LAYERS = 32  # whose counts of kept blocks lie in one buffer, cleared and summed at once


@dataclass
class Call:
    """One run of sparse requests, as the kernel takes it."""

    span: Span
    cu_seqlens_q: torch.Tensor  # int32 [requests + 1], from 0
    seqused_k: torch.Tensor  # int32 [requests]
    block_table: torch.Tensor  # int32 [requests, pages]
    prepared: dict[Any, PreparedPrefill] = field(default_factory=dict, init=False)  # by what layers differ in
    _alone: list[Call] = field(default_factory=list, init=False)

    def alone(self) -> list[Call]:
        """Return a call for each request.

        On a GPU a call over an FP8 cache takes scratch memory for its longest request times their number.
        """
        span = self.span
        if len(span.rows) == 1:
            return [self]
        if not self._alone:
            starts = starts_of(span.rows)
            for i, (rows, keys, final) in enumerate(zip(span.rows, span.keys, span.final, strict=True)):
                one = Span(span.first + i, span.begin + starts[i], [rows], [keys], [final])
                cu_seqlens_q = to_device(self.seqused_k.device, [0, rows], torch.int32)
                here = slice(i, i + 1)
                self._alone.append(Call(one, cu_seqlens_q, self.seqused_k[here], self.block_table[here]))
        return self._alone


@dataclass
class Counts:
    """Where layers count the blocks that they keep: rows of zeroed buffers."""

    buffer: torch.Tensor | None = None
    used: int = LAYERS
    address: int = 0  # of the next row
    step: int = 0  # bytes

    def row(self, shape: tuple[int, int], like: torch.Tensor, metrics: Metrics) -> int:
        """Return the address of zeros of this shape that nothing else counts in.

        `metrics` sums them up later; until then they live.
        """
        if self.used == LAYERS:
            self.buffer = torch.zeros((LAYERS, *shape), dtype=torch.int32, device=like.device)
            self.used, self.address = 0, self.buffer.data_ptr()
            self.step = self.buffer.stride(0) * self.buffer.element_size()
            metrics.count_later(self.buffer)
        address = self.address
        self.used, self.address = self.used + 1, address + self.step
        return address


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
        counts: of kept blocks, by the shape that a layer has.
        findings: of a guard, by sequences and heads of a call.
    """

    host: Host
    options: Options
    split: Split
    calls: list[Call]
    engine: Any = None
    engine_rows: slice | torch.Tensor | None = None
    requests: torch.Tensor | None = None
    counts: dict[tuple[int, int], Counts] = field(default_factory=dict)
    findings: dict[tuple[int, int], Findings] = field(default_factory=dict)

    def places_for(self, batch: int, query: torch.Tensor) -> Places | None:
        """Return where a guard's results of a call go; None without a guard."""
        if self.options.guard is None:
            return None
        shape = batch, query.shape[1]
        here = self.findings.get(shape)
        places = None if here is None else here.next()
        if places is None:
            here = self.findings[shape] = Findings(*shape, query.device)
            self.host.metrics.count_findings(here.sums, self.options.guard)
            places = here.next()
        return places


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
    scales: Scales = (None, None),
    engine_query: torch.Tensor | None = None,
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
        scales: of an FP8 cache.
        engine_query: what the engine gets in place of query, where that is another dtype.

    Returns:
        Whether it is done. If not, the log says why, and the caller is to run the whole batch densely.
    """
    try:
        policy = plan.options.policy.at_layer(layer)
        for call in plan.calls:
            for part in call.alone() if k_pages.dtype == torch.float8_e4m3fn else [call]:
                _attend(plan, policy, part, query, k_pages, v_pages, output, scale, scales, layer)
    except FlashPrefillError as error:
        plan.host.metrics.fallbacks[str(error)] += 1
        plan.host.say_once(logging.WARNING, f"flashprefill: a batch was run densely: {error}")
        return False
    rows = plan.engine_rows
    queries = query if engine_query is None else engine_query
    if isinstance(rows, slice):
        engine(queries[rows], plan.engine, output[rows])
    elif rows is not None:
        gathered = queries[rows]
        result = torch.empty(gathered.shape, dtype=output.dtype, device=output.device)
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
    scales: Scales,
    layer: int,
) -> None:
    span, metrics, guard = call.span, plan.host.metrics, plan.options.guard
    if span.begin > 0 or span.end < len(query):
        query, output = query[span.begin : span.end], output[span.begin : span.end]
    if isinstance(policy, MaskPolicy):
        by_layer = None if guard is None else guard.at_layer(layer)
        _attend_by_mask(metrics, policy, by_layer, call, query, k_pages, v_pages, output, scale)
        return
    strides = (None if x is None else (x.shape, x.stride()) for x in scales)
    key = (policy.text, scale, *strides, *signature(query, k_pages, v_pages, output))
    prepared = call.prepared.get(key)
    if prepared is None:
        prepared = call.prepared[key] = PreparedPrefill(
            query,
            k_pages,
            v_pages,
            output,
            policy,
            softmax_scale=scale,
            cu_seqlens_q=call.cu_seqlens_q,
            seqused_k=call.seqused_k,
            block_table=call.block_table,
            rows_and_keys=list(zip(span.rows, span.keys, strict=True)),
            final_chunk=span.final,
            k_scale=scales[0],
            v_scale=scales[1],
            guard=guard,
        )
    counts = plan.counts.get(prepared.counts_shape)
    if counts is None:
        counts = plan.counts[prepared.counts_shape] = Counts()
    row = counts.row(prepared.counts_shape, query, metrics)
    places = plan.places_for(len(span.rows), query)
    prepared.run(query, k_pages, v_pages, output, row, *scales, places, layer)
    metrics.count_call(prepared.causal_blocks)


def _attend_by_mask(
    metrics: Metrics,
    policy: MaskPolicy,
    guard: Guard | None,
    call: Call,
    query: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    output: torch.Tensor,
    scale: float,
) -> None:
    """Attend by a selection that is written in Python, and has to see this layer's queries and keys."""
    span = call.span
    _, stats = prefill_attention(
        query,
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
        out=output,
        return_stats=True,
        guard=guard,
    )
    if guard is not None and stats.guard is not None:
        metrics.count_findings(functools.partial(sums_of, *stats.guard.results[1:]), guard)
    metrics.count_later(stats._counts)
    visible = (
        stats._layout.visible(rows, keys, stats._tile_tokens, stats._block_size)
        for rows, keys in zip(span.rows, span.keys, strict=True)
    )
    metrics.count_call(sum(map(sum, visible)) * stats._counts.shape[0])
