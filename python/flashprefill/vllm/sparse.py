"""A batch's sparse rows, from the engine's metadata to the kernel; for the CPU's and CUDA's backends.

Once a step, `plan_of` takes the batch apart (rows.py), and prepares two things: for each run of sparse
requests the arguments of a call of our kernel, and for all others together a smaller batch for the engine's
own kernel. Then each layer calls `run` with its queries and its cache, which is read in place through the
block table. Both kinds of rows end in the engine's one output buffer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..api import prefill_attention
from ..errors import FlashPrefillError
from ..policies import Policy
from .metrics import metrics
from .options import Options
from .rows import Span, Split, split

ATTRIBUTE = "flashprefill"  # of the engine's metadata: a Plan, where some rows are sparse

logger = logging.getLogger("vllm.flashprefill")
_said: set[str] = set()


def say_once(level: int, message: str) -> None:
    """Log a line that each layer and step could repeat."""
    if message not in _said:
        _said.add(message)
        logger.log(level, message)


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
        options: what the user asked for.
        split: the requests.
        calls: of our kernel.
        engine: the engine's metadata for the dense requests; None if there are none.
        engine_rows: rows of the batch that these are: a slice where they lie together, else their numbers.
        requests: numbers of the dense requests on the device; None if there are none.
    """

    options: Options
    split: Split
    calls: list[Call]
    engine: Any
    engine_rows: slice | torch.Tensor | None
    requests: torch.Tensor | None


def plan_of(
    common: Any, final: Sequence[bool] | None, options: Options, build: Callable[[Any], Any]
) -> Plan | None:
    """Divide a batch into sparse and dense requests.

    Args:
        common: vLLM's CommonAttentionMetadata.
        final: whether each request's rows end its prompt; None if unknown. The same object for all
            groups of layers of a step.
        options: what the user asked for.
        build: makes the engine's metadata of a CommonAttentionMetadata.

    Returns:
        None if no row is sparse: the engine's own metadata says all.
    """
    if common.is_prefilling is None or common.causal is not True:
        return None
    if common.mm_req_doc_ranges or common.rswa_prefix_lens is not None:
        return None  # spans of images that see both ways; windows that spare a prompt
    if common.logits_indices_padded is not None or common.dcp_local_seq_lens is not None:
        return None  # the fast prefill of layers that share a cache; contexts that are split over GPUs
    if common.max_query_len == 1:  # a step that only decodes should cost nothing
        if metrics.begins(final):
            metrics.dense_rows["decode"] += common.num_actual_tokens
        return None
    # Host copies: exact for all rows that prefill, at most too large for drafts of requests that generate.
    lengths = common.seq_lens_cpu_upper_bound
    if lengths is None:
        if common.seq_lens.device.type != "cpu":
            return None
        lengths = common.seq_lens
    new = metrics.begins(final)
    starts = common.query_start_loc_cpu.tolist()
    keys = lengths[: common.num_reqs].tolist()
    if final is not None and len(final) != len(keys):
        final = None  # half of a batch, or one that is padded
    parts = split(starts, keys, common.is_prefilling[: len(keys)].tolist(), final, options)
    if new:
        metrics.count_batch(parts)
    if not parts.spans:
        return None
    calls = [_call(common, span) for span in parts.spans]
    plan = Plan(options, parts, calls, None, None, None)
    if parts.dense_rows:
        _leave_to_engine(plan, common, starts, lengths, build)
    return plan


def _to(device: torch.device, numbers: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    tensor = torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda")
    return tensor.to(device, non_blocking=True)


def _call(common: Any, span: Span) -> Call:
    starts = [0]
    for rows in span.rows:
        starts.append(starts[-1] + rows)
    here = slice(span.first, span.past)
    cu_seqlens_q = _to(common.seq_lens.device, starts, torch.int32)
    return Call(span, cu_seqlens_q, common.seq_lens[here], common.block_table_tensor[here])


def _leave_to_engine(
    plan: Plan, common: Any, starts: list[int], lengths: torch.Tensor, build: Callable[[Any], Any]
) -> None:
    """Make a batch of the dense requests alone, and the engine's metadata for it."""
    device, dense = common.seq_lens.device, plan.split.dense
    rows = [starts[request + 1] - starts[request] for request in dense]
    begins = [0]
    for count in rows:
        begins.append(begins[-1] + count)
    together = plan.split.dense_range(starts)
    if together is not None:
        plan.engine_rows = slice(*together)
    else:
        numbers = [row for request in dense for row in range(starts[request], starts[request + 1])]
        plan.engine_rows = _to(device, numbers, torch.int64)
    plan.requests = _to(device, dense, torch.int64)
    on_host = torch.tensor(dense, dtype=torch.int64)
    begins_on_host = torch.tensor(begins, dtype=torch.int32)
    plan.engine = build(
        replace(
            common,
            query_start_loc=begins_on_host.to(device),
            query_start_loc_cpu=begins_on_host,
            seq_lens=common.seq_lens[plan.requests],
            seq_lens_cpu_upper_bound=lengths[on_host],
            num_reqs=len(dense),
            num_actual_tokens=begins[-1],
            max_query_len=max(rows),
            max_seq_len=int(lengths[on_host].max()),
            block_table_tensor=common.block_table_tensor[plan.requests],
            slot_mapping=common.slot_mapping[plan.engine_rows],
            is_prefilling=common.is_prefilling[on_host],
            positions=None,
            req_idx=None,
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
        )
    )


def with_block_table(plan: Plan, block_table: torch.Tensor, update: Callable[[Any, Any], Any]) -> Plan:
    """Return the plan of the same batch over another group's cache.

    Args:
        plan: of the first group.
        block_table: the other group's.
        update: puts a block table into a copy of the engine's metadata.
    """
    calls = [replace(call, block_table=block_table[call.span.first : call.span.past]) for call in plan.calls]
    engine = None if plan.engine is None else update(plan.engine, block_table[plan.requests])
    return replace(plan, calls=calls, engine=engine)


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
            _attend(policy, call, query, k_pages, v_pages, output, scale)
    except FlashPrefillError as error:
        metrics.fallbacks[str(error)] += 1
        say_once(logging.WARNING, f"flashprefill: a batch was run densely: {error}")
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
    metrics.count_call(counts, call.possible * counts.shape[0])
