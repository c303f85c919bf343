"""The attention function that Transformers calls in each layer: which calls are sparse, and how.

Sparse are prefills: at least a tile of rows of causal self-attention, with a cache or without, whose
padding lies at the ends. q, k and v go to the kernel as the views that they are: [batch, heads, tokens,
head_dim] read as [batch, tokens, heads, head_dim], KV heads unrepeated, a padded sequence as its slice, a
static cache up to what is used. Nothing is copied, and the result has the layout that the output projection
reads. Under autocast they are cast first, as SDPA would.

All other calls run as the model's own attention does: reasons.py says which, dense.py how. Continuous
batching's calls hold several sequences each: packed.py.
"""

from __future__ import annotations

import contextlib
import contextvars
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .. import _timings
from ..api import prefill_attention
from ..errors import UnsupportedError
from ..guard import NO_STATE, Guard
from ..policies import FlashPrefill, Policy, Reuse
from ..stats import Stats
from ..torch_op import empty_like
from . import packed, stats
from .configs import is_patched
from .dense import dense_attention, supports_sdpa
from .fallback import DETAILED, note_once, warn_once
from .masks import Plan, Span, is_general_export, is_jit_tracing, is_roles, plan_of
from .reasons import as_sdpa_casts, describe, why_dense

if TYPE_CHECKING:
    from .._typing import MathName

ATTRIBUTE = "_flashprefill"  # of a patched model's attention layers: a Layer


@dataclass
class Layer:
    """An attention layer's policy, set by patch_model."""

    policy: Policy | None  # None: the model's own dense attention
    eager: bool  # that is eager's, not SDPA's
    guard: Guard | None = None
    math: MathName = "input"


# What a model has that was loaded with attn_implementation="flashprefill" and not patched.
_UNPATCHED = FlashPrefill()

# Length of the prompt that generate() is reading, all its chunks; None if unknown. Set by register.py.
prompt_length: contextvars.ContextVar[int | None] = contextvars.ContextVar("prompt_length", default=None)

# What computes the layers of a forward whose rows are spread over ranks. Set by flashprefill.distributed.
over_ranks: contextvars.ContextVar[Callable[..., torch.Tensor] | None] = contextvars.ContextVar(
    "over_ranks", default=None
)


def flashprefill_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    final_chunk: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return (out [batch, tokens, heads, head_dim], None): the function that AttentionInterface calls.

    Args:
        module: the attention layer.
        query: [batch, heads, tokens, head_dim].
        key: [batch, kv_heads, keys, head_dim], the cache's tokens included.
        value: like key.
        attention_mask: what flashprefill_mask returned.
        dropout: dropout of the weights.
        scaling: factor of the scores; the default is head_dim**-0.5.
        is_causal: whether rows see only what comes before, if there is no mask; the default is the module's.
        final_chunk: whether these rows end their prompt. It may be given to the model's forward. The default
            is what generate() knows, else yes.
        **kwargs: what else the model's layers hand on.
    """
    layer: Layer | None = getattr(module, ATTRIBUTE, None)
    arguments = (query, key, value), attention_mask, dropout, scaling, is_causal, final_chunk, kwargs
    policy = layer.policy if layer is not None else None
    if isinstance(policy, Reuse) and policy.layer is not None and not torch.compiler.is_compiling():
        with policy.held.call(policy.layer):  # dense calls too: that is how a new forward is known
            return _attention(module, layer, *arguments)
    return _attention(module, layer, *arguments)


def _attention(
    module: Any,
    layer: Layer | None,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    final_chunk: bool | None,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Decide how a layer's call runs, and run it."""
    query, key, value = tensors
    compiling = torch.compiler.is_compiling()
    ranks = None if compiling else over_ranks.get()  # a model over ranks then refuses its results
    guard = layer.guard if layer is not None else None
    math = layer.math if layer is not None else "input"
    if guard is not None and ranks is not None:  # not to be left out in silence
        raise UnsupportedError("guard is given; it must be None for a model over several ranks")
    if guard is not None and guard.state is not None and query.is_cuda:
        raise UnsupportedError(f"guard's state is given; it must be None {NO_STATE}")
    if ranks is not None:
        return ranks(module, (query, key, value), layer, dropout, scaling, kwargs), None
    eager = layer.eager if layer is not None else not supports_sdpa(module)
    if (not compiling and is_jit_tracing()) or is_general_export(query.shape[2]):  # to be right at any length
        warn_once("tracing", module)
        return dense_attention(
            module, query, key, value, attention_mask, None, eager, dropout, scaling, is_causal, kwargs
        )  # fmt: skip
    unpatched = layer is None and is_patched(getattr(module, "config", None))
    policy = layer.policy if layer is not None else None if unpatched else _UNPATCHED
    rows = query.shape[2]
    recorders = [] if compiling else stats.recorders_of(module)
    begin = time.perf_counter() if recorders else 0.0

    def record(outcome: list[stats.Measured] | str) -> None:
        for recorder in recorders:
            seconds = time.perf_counter() - begin
            recorder.add(module, rows, key.shape[2], query.shape[1], seconds, outcome)

    if packed.is_continuous(kwargs):
        out, outcome = packed.attention(
            module, tensors, policy, eager, dropout, scaling, kwargs, bool(recorders), guard, math
        )
        record(outcome)
        return out, None

    plan = None
    if is_roles(attention_mask, rows):
        plan = plan_of(attention_mask, query.shape[0], rows, key.shape[2])  # type: ignore[arg-type]
    reason = why_dense(module, tensors, attention_mask, plan, policy, dropout, is_causal, kwargs)
    if reason is None:
        assert policy is not None
        if torch.is_grad_enabled() and not compiling:
            note_once("sparse in grad mode", type(module).__name__)
        try:
            cast = as_sdpa_casts(tensors)
            out, measured = _sparse(
                module, cast, policy, scaling, plan, final_chunk, bool(recorders), guard, math
            )
        except UnsupportedError:
            reason = "backend"
        else:
            record(measured)
            return out, None

    if unpatched and reason == "policy":
        reason = "unpatched"
    if not compiling:
        warn_once(reason, module, describe(tensors) if reason in DETAILED else "")
    result = dense_attention(
        module, query, key, value, attention_mask, plan, eager, dropout, scaling, is_causal, kwargs
    )  # fmt: skip
    record(reason)
    return result


def _sparse(
    module: Any,
    tensors: tuple[torch.Tensor, ...],
    policy: Policy,
    scaling: float | None,
    plan: Plan | None,
    final_chunk: bool | None,
    measure: bool,
    guard: Guard | None,
    math: MathName,
) -> tuple[torch.Tensor, list[stats.Measured]]:
    """Run the kernel on each span of sequences with the same rows and keys. Rows of padding get zeros."""
    q, k, v = (x.transpose(1, 2) for x in tensors)
    batch, rows = q.shape[:2]
    if plan is None:
        spans, end = [Span(0, batch, 0, rows, 0, k.shape[1])], rows
    else:
        spans, end = plan.spans, plan.used
    covered = len(spans) == 1 and spans[0][:4] == (0, batch, 0, rows)
    whole = covered and spans[0][4:] == (0, k.shape[1])  # nothing to slice, which takes the host 20 us
    out = empty_like(q) if covered else torch.zeros(q.shape, dtype=q.dtype, device=q.device)

    if final_chunk is None:
        # Positions count padding, and so does the length of the prompt that generate() reads.
        length = None if torch.compiler.is_compiling() else prompt_length.get()
        final_chunk = length is None or end >= length
    short = plan is not None and plan.short
    if final_chunk and not short and sum(span.batch_end - span.batch_begin for span in spans) < batch:
        note_once("nothing but padding", type(module).__name__, f"rows {end - rows} to {end}")
    measured = []
    for span in spans:
        ends = final_chunk or span.key_end < end  # a sequence that ends before the chunk does ends here
        parts = [q, k, v, out]
        if not whole:
            sequences = slice(span.batch_begin, span.batch_end)
            here, there = slice(span.row_begin, span.row_end), slice(span.key_begin, span.key_end)
            parts = [x[sequences, where] for x, where in zip(parts, (here, there, there, here), strict=True)]
        with _timings.collect_timings() if measure else contextlib.nullcontext(_timings.Timings()) as timings:
            result = prefill_attention(
                parts[0],
                parts[1],
                parts[2],
                policy,
                softmax_scale=scaling,
                layout="bthd",
                final_chunk=ends,
                guard=guard,
                out=parts[3],
                return_stats=measure,
                math=math,
            )
        if measure:
            kept: Stats = result[1]
            measured.append(stats.Measured.of(kept, timings))
    return out, measured
