"""Continuous batching, ``model.generate_batch``: each call of a layer holds the rows of several requests.

Transformers' paged cache gathers the keys that a call reads, so q, k and v are sequences laid end to end,
with their lengths in ``cu_seq_lens_q`` and ``cu_seq_lens_k``. A request's prompt, or a chunk of it, runs
sparse by itself; decode steps, prompts that are too short to leave anything out, and layers with a window,
softcap or sinks run the model's own dense attention, a request at a time. No mask of pairs of all requests
is made.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from .. import _timings
from ..api import prefill_attention
from ..errors import UnsupportedError
from ..guard import Guard
from ..policies import Policy
from ..stats import Stats
from . import stats
from .dense import dense_attention
from .fallback import DETAILED, warn_once
from .masks import MIN_ROWS
from .reasons import as_sdpa_casts, describe, forced_keys, why_never

if TYPE_CHECKING:
    from .._typing import MathName

# What is continuous batching's own among a layer's arguments.
_OWN: tuple[str, ...] = (
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "read_index",
    "write_index",
)
_OWN += ("block_table", "cache", "k_cache", "v_cache", "logits_indices", "logits_processor_args")


def is_continuous(kwargs: dict[str, Any]) -> bool:
    """Return whether a call is one of continuous batching's."""
    return kwargs.get("write_index") is not None and isinstance(kwargs.get("cu_seq_lens_k"), torch.Tensor)


def attention(
    module: Any,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    policy: Policy | None,
    eager: bool,
    dropout: float,
    scaling: float | None,
    kwargs: dict[str, Any],
    measure: bool,
    guard: Guard | None = None,
    math: MathName = "input",
) -> tuple[torch.Tensor, list[stats.Measured] | str]:
    """Return (out [1, rows, heads, head_dim], what was measured or why no request's rows were sparse)."""
    own = {name: value for name, value in kwargs.items() if name not in _OWN}
    never = "policy" if policy is None else why_never(module, tensors, dropout, kwargs)
    # Transformers' own paged attention reads the layer's attribute; Qwen2-MoE's layers hand on nothing.
    window = kwargs.get("sliding_window") or getattr(module, "sliding_window", None) or None
    query, key, value = as_sdpa_casts(tensors)
    shape = (1, query.shape[2], query.shape[1], value.shape[3])
    out = torch.zeros(shape, dtype=query.dtype, device=query.device)  # padding, if there is any, stays zero
    measured: list[stats.Measured] = []
    outcome = never or "decode"
    for rows, keys in _requests(kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"]):
        count, seen = rows.stop - rows.start, keys.stop - keys.start
        parts = query[:, :, rows], key[:, :, keys], value[:, :, keys]
        reason = never
        if reason is None and count < MIN_ROWS:
            reason = "decode" if count == 1 else "short"
        elif reason is None and window is not None and seen > window:
            reason = "sliding window"
        elif reason is None and policy is not None and seen <= forced_keys(policy):
            reason = "short"
        if reason is None and policy is not None:
            try:
                measured += _sparse(parts, policy, scaling, out[:, rows], measure, guard, math)
                continue
            except UnsupportedError:
                reason = "backend"
        reason = reason or "decode"
        outcome = reason if outcome == "decode" else outcome
        warn_once(reason, module, describe(tensors) if reason in DETAILED else "")
        out[:, rows] = _dense(module, parts, eager, dropout, scaling, window, own)
    return out, measured or outcome


def _requests(queries: torch.Tensor, keys: torch.Tensor) -> list[tuple[slice, slice]]:
    """Return the rows and the keys of each request that has rows."""
    q, k = queries.tolist(), keys.tolist()
    ranges = zip(q[:-1], q[1:], k[:-1], k[1:], strict=False)
    return [(slice(a, b), slice(c, d)) for a, b, c, d in ranges if b > a]


def _sparse(
    parts: tuple[torch.Tensor, ...],
    policy: Policy,
    scaling: float | None,
    out: torch.Tensor,
    measure: bool,
    guard: Guard | None,
    math: MathName,
) -> list[stats.Measured]:
    q, k, v = (x.transpose(1, 2) for x in parts)
    with _timings.collect_timings() if measure else contextlib.nullcontext(_timings.Timings()) as timings:
        result: Any = prefill_attention(
            q, k, v, policy, softmax_scale=scaling, guard=guard, out=out, return_stats=measure, math=math
        )
    if not measure:
        return []
    kept: Stats = result[1]
    return [stats.Measured.of(kept, timings)]


def _dense(
    module: Any,
    parts: tuple[torch.Tensor, ...],
    eager: bool,
    dropout: float,
    scaling: float | None,
    window: int | None,
    own: dict[str, Any],
) -> torch.Tensor:
    query, key, value = parts
    rows, keys = query.shape[2], key.shape[2]
    mask = None
    if rows > 1 or (window is not None and keys > window):
        places = torch.arange(keys, device=query.device)
        here = places[keys - rows :, None]
        mask = places[None, :] <= here
        if window is not None:
            mask = mask & (places[None, :] > here - window)
        mask = mask[None, None]
    own = {name: argument for name, argument in own.items() if name != "is_causal"}
    return dense_attention(module, query, key, value, mask, None, eager, dropout, scaling, False, own)[0]
