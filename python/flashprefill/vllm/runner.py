"""Where prompts end: the model runner knows, so its method that prepares a batch is wrapped.

A policy's dense tail belongs to the last chunk of a prompt. What vLLM hands to attention backends says
whether a request is within its prompt, not whether this chunk is its last. Both of its model runners do know:
the first notes which requests are not to be sampled from yet, the second has the lengths in its batch.
Without this knowledge each chunk would count as the last, which costs time and no quality.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Sequence
from typing import Any

_final: contextvars.ContextVar[Sequence[bool] | None] = contextvars.ContextVar(
    "flashprefill_final", default=None
)
_MARK = "_flashprefill_wrapped"


def final_chunks() -> Sequence[bool] | None:
    """Return for each request of the batch in preparation whether its rows end its prompt, or None."""
    return _final.get()


def of_first_runner(runner: Any, *arguments: Any, **keywords: Any) -> Sequence[bool]:
    """Read it off vllm.v1.worker.gpu_model_runner.GPUModelRunner, from which the CPU's inherits."""
    requests = runner.input_batch.num_reqs
    return [not unfinished for unfinished in runner.discard_request_mask.np[:requests].tolist()]


def of_second_runner(state: Any, input_batch: Any, *arguments: Any, **keywords: Any) -> Sequence[bool]:
    """Read it off the batch of vllm.v1.worker.gpu.model_runner.GPUModelRunner."""
    ends = input_batch.num_computed_prefill_tokens_np + input_batch.num_scheduled_tokens
    return list((ends >= input_batch.prefill_len_np).tolist())


def wrap(owner: type, name: str, read: Callable[..., Sequence[bool]]) -> None:
    """Have a method tell `final_chunks` what `read` returns. Wrapping again changes nothing."""
    method = getattr(owner, name)
    if hasattr(method, _MARK):
        return

    @functools.wraps(method)
    def told(self: Any, *arguments: Any, **keywords: Any) -> Any:
        token = _final.set(read(self, *arguments, **keywords))
        try:
            return method(self, *arguments, **keywords)
        finally:
            _final.reset(token)

    setattr(told, _MARK, True)
    setattr(owner, name, told)


def install(vllm_config: Any) -> None:
    """Wrap the model runner that this engine uses."""
    if vllm_config.use_v2_model_runner:
        from vllm.v1.worker.gpu.model_states.default import DefaultModelState

        wrap(DefaultModelState, "prepare_attn", of_second_runner)
    else:
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        wrap(GPUModelRunner, "_build_attention_metadata", of_first_runner)
