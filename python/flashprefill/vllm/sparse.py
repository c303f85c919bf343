"""A batch's sparse rows by vLLM's metadata; for the CPU's and CUDA's backends.

Once a step, `plan_of` takes the batch apart and makes the engine's own metadata of a smaller batch, for the
rows that are not sparse. The rest knows no engine: flashprefill/engines/sparse.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..engines.options import Options
from ..engines.rows import split
from ..engines.sparse import Plan, Scales, call_of, mark_dense, run, starts_of, to_device
from .host import host
from .metrics import metrics

__all__ = ["ATTRIBUTE", "Plan", "Scales", "plan_of", "run", "with_block_table"]

ATTRIBUTE = "flashprefill"  # of the engine's metadata: a Plan, where some rows are sparse


def plan_of(
    common: Any,
    final: Sequence[bool] | None,
    options: Options,
    build: Callable[[Any], Any],
    short_keys: int = 0,
) -> Plan | None:
    """Divide a batch into sparse and dense requests.

    Args:
        common: vLLM's CommonAttentionMetadata.
        final: whether each request's rows end its prompt; None if unknown. The same object for all
            groups of layers of a step.
        options: what the user asked for.
        build: makes the engine's metadata of a CommonAttentionMetadata.
        short_keys: keys up to which prompts are left to the engine whatever the options say.

    Returns:
        None if no row is sparse: the engine's own metadata says all.
    """
    if common.is_prefilling is None or common.causal is not True:
        return None
    if common.mm_req_doc_ranges or common.rswa_prefix_lens is not None:
        return None  # spans of images that see both ways; windows that spare a prompt
    if common.logits_indices_padded is not None or common.dcp_local_seq_lens is not None:
        return None  # the fast prefill of layers that share a cache; contexts that are split over GPUs
    # A step that only decodes should cost nothing.
    if common.max_query_len == 1 and (options.least_rows > 1 or not bool(common.is_prefilling.any())):
        if metrics.begins(final):
            metrics.count_dense("decode", common.num_actual_tokens)
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
    prefilling = common.is_prefilling[: len(keys)].tolist()
    parts = split(starts, keys, prefilling, final, options, short_keys)
    if new:
        metrics.count_batch(parts)
    if not parts.spans:
        return None
    calls = [call_of(span, common.seq_lens, common.block_table_tensor) for span in parts.spans]
    plan = Plan(host, options, parts, calls)
    if parts.dense_rows:
        _leave_to_engine(plan, common, starts, lengths, build)
    return plan


def _leave_to_engine(
    plan: Plan, common: Any, starts: list[int], lengths: torch.Tensor, build: Callable[[Any], Any]
) -> None:
    """Make a batch of the dense requests alone, and the engine's metadata for it."""
    device, dense = common.seq_lens.device, plan.split.dense
    rows = mark_dense(plan, starts, device)
    begins = starts_of(rows)
    on_host = torch.tensor(dense, dtype=torch.int64)
    begins_on_host = torch.tensor(begins, dtype=torch.int32)
    plan.engine = build(
        replace(
            common,
            query_start_loc=to_device(device, begins, torch.int32),
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
    return replace(plan, calls=calls, engine=engine, counts={})
