"""The attention function that Transformers calls in each layer: which calls are sparse, and how.

Sparse are prefills: at least a tile of rows of causal self-attention, with a cache or without, whose
padding lies at the ends. q, k and v go to the kernel as the views that they are: [batch, heads, tokens,
head_dim] read as [batch, tokens, heads, head_dim], KV heads unrepeated, a padded sequence as its slice, a
static cache up to what is used. Nothing is copied, and the result has the layout that the output projection
reads.

All other calls run as the model's own attention does: fallback.py.
"""

from __future__ import annotations

import contextlib
import contextvars
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache

from .. import _timings
from ..api import prefill_attention
from ..errors import UnsupportedError
from ..policies import FlashPrefill, Policy
from ..stats import Stats
from ..torch_op import empty_like
from . import stats
from .fallback import dense_attention, supports_sdpa, warn_once
from .masks import MIN_ROWS, Plan, Span, is_roles, plan_of

ATTRIBUTE = "_flashprefill"  # of a patched model's attention layers: a Layer
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Layer:
    """An attention layer's policy, set by patch_model."""

    policy: Policy | None  # None: the model's own dense attention
    eager: bool  # that is eager's, not SDPA's


# What a model has that was loaded with attn_implementation="flashprefill" and not patched.
_UNPATCHED = FlashPrefill()

# Length of the prompt that generate() is reading, all its chunks; None if unknown. Set by register.py.
prompt_length: contextvars.ContextVar[int | None] = contextvars.ContextVar("prompt_length", default=None)


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
    rows = query.shape[2]
    layer: Layer | None = getattr(module, ATTRIBUTE, None)
    policy = _UNPATCHED if layer is None else layer.policy
    compiling = torch.compiler.is_compiling()
    recorders = [] if compiling else stats.recorders_of(module)
    begin = time.perf_counter() if recorders else 0.0

    plan = None
    if is_roles(attention_mask, rows):
        plan = plan_of(attention_mask, query.shape[0], rows, key.shape[2])  # type: ignore[arg-type]
    reason = _why_dense(module, query, key, value, attention_mask, plan, policy, dropout, is_causal, kwargs)
    if reason is None:
        assert policy is not None
        try:
            out, measured = _sparse(query, key, value, policy, scaling, plan, final_chunk, bool(recorders))
        except UnsupportedError:
            reason = "backend"
        else:
            for recorder in recorders:
                seconds = time.perf_counter() - begin
                recorder.add(module, rows, key.shape[2], query.shape[1], seconds, measured)
            return out, None

    if not compiling:
        warn_once(reason, module)
    eager = layer.eager if layer is not None else not supports_sdpa(module)
    result = dense_attention(
        module, query, key, value, attention_mask, plan, eager, dropout, scaling, is_causal, kwargs
    )  # fmt: skip
    for recorder in recorders:
        recorder.add(module, rows, key.shape[2], query.shape[1], time.perf_counter() - begin, reason)
    return result


def _why_dense(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    plan: Plan | None,
    policy: Policy | None,
    dropout: float,
    is_causal: bool | None,
    kwargs: dict[str, Any],
) -> str | None:
    """Return why this call runs dense, a key of fallback.py's tables, or None if it need not."""
    rows, keys = query.shape[2], key.shape[2]
    if rows < MIN_ROWS:
        return "decode" if rows == 1 else "short"
    if policy is None:
        return "policy"

    # Other kwargs change the formula, or SDPA ignores them too.
    if kwargs.get("softcap") is not None:
        return "softcap"
    if kwargs.get("s_aux") is not None:
        return "attention sinks"
    if kwargs.get("output_attentions"):
        return "attention weights"
    if kwargs.get("position_bias") is not None:
        return "position bias"
    if not isinstance(kwargs.get("cache"), (Cache, type(None))):  # continuous batching's is no Cache
        return "paged cache"
    if kwargs.get("cu_seq_lens_q") is not None or kwargs.get("cu_seq_lens_k") is not None:
        return "packed sequences"
    if dropout > 0.0:
        return "dropout"
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return "gradients"

    if query.shape[-1] != value.shape[-1]:
        return "value head_dim"
    if (
        query.dtype not in _DTYPES
        or not query.dtype == key.dtype == value.dtype
        or key.shape[:3] != value.shape[:3]
        or query.shape[0] != key.shape[0]
        or query.shape[1] % key.shape[1] != 0
        or query.shape[-1] != key.shape[-1]
        or query.shape[-1] > 512
    ):
        return "layout"

    window = kwargs.get("sliding_window")
    used = keys
    if plan is not None:
        used = plan.used
        if plan.holes:
            return "custom mask"
    elif mask is not None:
        if window is not None:
            return "sliding window"
        return "compiled mask" if torch.compiler.is_compiling() else "custom mask"
    elif not (is_causal if is_causal is not None else getattr(module, "is_causal", True)):
        return "bidirectional"
    elif rows != keys:
        return "custom mask"
    if window is not None and used > window:
        return "sliding window"
    forced = (getattr(policy, "sink_blocks", 0) + getattr(policy, "window_blocks", 0)) * policy.block_size
    return "short" if used <= forced else None


def _sparse(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    policy: Policy,
    scaling: float | None,
    plan: Plan | None,
    final_chunk: bool | None,
    measure: bool,
) -> tuple[torch.Tensor, list[stats.Measured]]:
    """Run the kernel on each span of sequences with the same rows and keys. Rows of padding get zeros."""
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
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
                out=parts[3],
                return_stats=measure,
            )
        if measure:
            kept: Stats = result[1]
            measured.append(stats.Measured(kept, timings.select_seconds, timings.attend_seconds))
    return out, measured
