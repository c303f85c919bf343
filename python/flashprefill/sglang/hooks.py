"""What SGLang's own functions are made to tell: the requests of a batch, and our counters.

A policy's dense tail belongs to the last chunk of a prompt. What SGLang hands to attention backends does not
say whether a chunk is the last. The scheduler's batch does: it holds the requests, and the scheduler and the
model runner share a process and a thread. So what is known of the requests is noted when a ForwardBatch is
made of it, and looked up by their ids when that is planned. (A mark on the ForwardBatch itself would be lost:
the runner copies it field by field.)
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from ..engines.options import Options
from .host import host

options: Options | None = None  # what the user asked for
_ids: list[str] = []  # of the last batch's requests
_known: tuple[list[bool], list[bool]] = ([], [])


def note_batch(result: Any, owner: type, batch: Any, runner: Any, *arguments: Any, **keywords: Any) -> None:
    """After ForwardBatch.init_new: note the batch's requests, count rows that generate, write a due line."""
    if options is None or runner.is_draft_worker or result.rids is None:
        return
    mode = batch.forward_mode
    if mode.is_decode():
        host.metrics.dense_rows["decode"] += result.batch_size
    elif mode.is_target_verify():
        host.metrics.dense_rows["speculative"] += len(result.input_ids)
    elif mode.is_extend():
        generating = {id(request) for request in batch.decoding_reqs or ()}
        prefilling = [id(request) not in generating for request in batch.reqs]
        final = [request.extend_end == len(request.full_untruncated_fill_ids) for request in batch.reqs]
        remember(result.rids, prefilling, final)
    host.metrics.tick(options)


def remember(ids: Sequence[str], prefilling: list[bool], final: list[bool]) -> None:
    """Keep what is known of the requests of the batch that comes next."""
    global _known
    _ids[:] = ids
    _known = prefilling, final


def requests_of(ids: Sequence[str]) -> tuple[list[bool], list[bool]] | None:
    """Return whether each of these requests is within its prompt, and whether its rows end that.

    None if they are not the requests that were noted last: half of a batch, for instance.
    """
    return _known if list(ids) == _ids else None


def add_statistics(result: Any, *arguments: Any, **keywords: Any) -> None:
    """After get_internal_state: our counters go with the server's information."""
    result.internal_state["flashprefill"] = host.metrics.snapshot()


def warn_if_unused(result: Any, *arguments: Any, **keywords: Any) -> None:
    """After build_attention_backends: say so if the plugin is on and no layer of the model came to it."""
    if not keywords["model_runner"].is_draft_worker and not host.announced:
        names = {result.prefill_attention_backend_str, result.decode_attention_backend_str}
        host.say_once(
            logging.WARNING,
            f"flashprefill: it is turned on, but does not extend the attention backend "
            f"{' and '.join(sorted(names))}; prompts are read densely",
        )
