"""A batch's sparse rows by SGLang's ForwardBatch.

Once a step, `plan_of` takes the batch apart and makes a smaller ForwardBatch of the requests that are not
sparse. The rest knows no engine: flashprefill/engines/sparse.py. All is decided from the host's own copies of
lengths, so nothing waits for a GPU.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from ..engines.options import Options
from ..engines.rows import split
from ..engines.sparse import Plan, call_of, mark_dense, starts_of
from . import hooks
from .host import host


def plan_of(batch: Any, pages: torch.Tensor, page_size: int, options: Options) -> Plan | None:
    """Divide a batch into sparse and dense requests.

    Args:
        batch: SGLang's ForwardBatch.
        pages: token slots of each request's positions, int32 [slots of requests, positions].
        page_size: tokens per page.
        options: what the user asked for.

    Returns:
        None if no row is sparse. Where some requests are dense, `engine` is a ForwardBatch of these.
    """
    if not is_plain(batch):
        return None
    rows, past = batch.extend_seq_lens_cpu, batch.extend_prefix_lens_cpu
    keys = [new + old for new, old in zip(rows, past, strict=True)]
    known = hooks.requests_of(batch.rids)
    if known is None:
        prefilling, final = [count > 1 for count in rows], _final_by_lengths(batch, keys)
    else:
        prefilling, final = known
    starts = starts_of(rows)
    parts = split(starts, keys, prefilling, final, options)
    host.metrics.count_batch(parts)
    if not parts.spans:
        return None
    table = pages[batch.req_pool_indices, : max(keys) : page_size]
    if page_size > 1:
        table = table // page_size
    lengths = batch.seq_lens.to(torch.int32)
    plan = Plan(host, options, parts, [call_of(span, lengths, table) for span in parts.spans])
    if parts.dense_rows:
        counts = mark_dense(plan, starts, batch.seq_lens.device)
        plan.engine = _batch_of(batch, plan, counts)
    return plan


def is_plain(batch: Any) -> bool:
    """Return whether a batch is of prompts, or of prompts and generated tokens, and plain."""
    return (
        batch.forward_mode.name in ("EXTEND", "MIXED")
        and batch.rids is not None  # else it warms up, or is captured
        and batch.extend_seq_lens_cpu is not None
        and batch.extend_prefix_lens_cpu is not None
        and batch.encoder_lens is None
        and batch.multi_item_delimiter_indices is None
        and batch.dcp_kv_mask is None
        and not batch.encoder_swa_replay
    )


def _final_by_lengths(batch: Any, keys: Sequence[int]) -> list[bool] | None:
    """Return whether each request's keys are all of its prompt; None if the lengths are on a GPU."""
    whole = batch.orig_seq_lens
    if whole is None or whole.device.type != "cpu":
        return None
    return [count >= prompt for count, prompt in zip(keys, whole.tolist(), strict=True)]


def _batch_of(batch: Any, plan: Plan, rows: list[int]) -> Any:
    """Return a ForwardBatch of the dense requests alone."""
    dense, chosen = plan.split.dense, plan.requests
    on_host = torch.tensor(dense, dtype=torch.int64)
    part = copy.copy(batch)
    part.batch_size = len(dense)
    for name in ("req_pool_indices", "seq_lens", "extend_seq_lens", "extend_prefix_lens", "orig_seq_lens"):
        _cut(part, name, chosen)
    for name in ("seq_lens_cpu", "req_pool_indices_cpu"):
        _cut(part, name, on_host)
    for name in ("input_ids", "positions", "out_cache_loc"):
        _cut(part, name, plan.engine_rows)
    part.kv_loc_plan = None  # where the whole batch writes; the part's keys and values lie there already
    part.rids = [batch.rids[request] for request in dense]
    part.extend_seq_lens_cpu = rows
    part.extend_prefix_lens_cpu = [batch.extend_prefix_lens_cpu[request] for request in dense]
    part.seq_lens_sum = sum(rows) + sum(part.extend_prefix_lens_cpu)
    part.extend_num_tokens = sum(rows)
    part.global_num_token_non_padded_cpu = part.extend_num_tokens
    if batch.extend_start_loc is not None:
        part.extend_start_loc = part.extend_seq_lens.cumsum(0).sub_(part.extend_seq_lens)
        part.extend_start_loc = part.extend_start_loc.to(batch.extend_start_loc.dtype)
    return part


def _cut(part: Any, name: str, chosen: Any) -> None:
    value = getattr(part, name)
    if value is not None:
        setattr(part, name, value[chosen])
