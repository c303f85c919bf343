"""Which calls of an attention layer run dense, and why: keys of fallback.py's tables."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad
from transformers.cache_utils import Cache

from ..policies import Policy
from .masks import MIN_ROWS, Plan, forward_had_grad_mode, is_watched, is_wrapped

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DEVICES = ("cpu", "cuda")


def cast_dtype(tensors: tuple[torch.Tensor, ...]) -> torch.dtype | None:
    """Return the dtype to which SDPA would cast its arguments here, or None outside of autocast."""
    kind = tensors[0].device.type
    autocast = kind in _DEVICES and torch.is_autocast_enabled(kind)  # which refuses some other devices
    return torch.get_autocast_dtype(kind) if autocast else None


def as_sdpa_casts(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Cast as autocast does for SDPA: everything but fp64."""
    dtype = cast_dtype(tensors)
    if dtype is None:
        return tensors
    return tuple(x.to(dtype) if _is_cast(x) else x for x in tensors)


def _is_cast(x: torch.Tensor) -> bool:
    return x.is_floating_point() and x.dtype != torch.float64


def describe(tensors: tuple[torch.Tensor, ...]) -> str:
    """Return the dtypes, shapes and devices of q, k and v in words."""
    names = [f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}" for x in tensors]
    dtype = cast_dtype(tensors)
    under = "" if dtype is None else f", under autocast to {str(dtype).removeprefix('torch.')}"
    return f"q is {names[0]}, k {names[1]}, v {names[2]}{under}"


def why_dense(
    module: Any,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    mask: torch.Tensor | None,
    plan: Plan | None,
    policy: Policy | None,
    dropout: float,
    is_causal: bool | None,
    kwargs: dict[str, Any],
) -> str | None:
    """Return why a call runs dense, or None if it need not."""
    query, key, _ = tensors
    rows, keys = query.shape[2], key.shape[2]
    if rows < MIN_ROWS:
        return "decode" if rows == 1 else "short"
    if policy is None:
        return "policy"
    if not isinstance(kwargs.get("cache"), (Cache, type(None))):
        return "paged cache"
    if kwargs.get("cu_seq_lens_q") is not None or kwargs.get("cu_seq_lens_k") is not None:
        return "packed sequences"
    reason = why_never(module, tensors, dropout, kwargs)
    if reason is not None:
        return reason

    window = kwargs.get("sliding_window")
    used = keys
    if plan is not None:
        used = plan.used
        if plan.holes:
            return "custom mask"
    elif mask is not None:
        if window is not None or getattr(module, "sliding_window", None):  # some layers don't hand it on
            return "sliding window"
        return "compiled mask" if torch.compiler.is_compiling() else "custom mask"
    elif not (is_causal if is_causal is not None else getattr(module, "is_causal", True)):
        return "bidirectional"
    elif rows != keys:
        return "custom mask"
    if window is not None and used > window:
        return "sliding window"
    return "short" if used <= forced_keys(policy) else None


def forced_keys(policy: Policy) -> int:
    """Return how many keys a policy's sink and window cover."""
    blocks: int = getattr(policy, "sink_blocks", 0) + getattr(policy, "window_blocks", 0)
    return blocks * policy.block_size


def why_never(
    module: Any,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    dropout: float,
    kwargs: dict[str, Any],
) -> str | None:
    """Return why no rows of a call can be sparse, whatever they see, or None if some can."""
    # Other kwargs change the formula, or SDPA ignores them too.
    if kwargs.get("softcap") is not None:
        return "softcap"
    if kwargs.get("s_aux") is not None:
        return "attention sinks"
    if kwargs.get("output_attentions"):
        return "attention weights"
    if kwargs.get("position_bias") is not None:
        return "position bias"
    if dropout > 0.0:
        return "dropout"
    return _why_not_these(module, tensors)


def _why_not_these(module: Any, tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> str | None:
    """Return why the kernel does not take these tensors, or None if it does."""
    query, key, value = tensors
    if query.device.type not in _DEVICES:
        return "device"
    if not torch.compiler.is_compiling() and (
        is_watched() or any(type(x) is not torch.Tensor or is_wrapped(x) for x in tensors)
    ):
        return "fake tensors"
    if _gradients(module, tensors):
        return "gradients"
    if query.shape[-1] != value.shape[-1]:
        return "value head_dim"
    cast = cast_dtype(tensors)
    dtypes = {cast if cast is not None and _is_cast(x) else x.dtype for x in tensors}
    if (
        len(dtypes) > 1
        or not dtypes.issubset(_DTYPES)
        or key.shape[:3] != value.shape[:3]
        or query.shape[0] != key.shape[0]
        or query.shape[1] % key.shape[1] != 0
        or query.shape[-1] != key.shape[-1]
        or query.shape[-1] > 512
        or any(x.device != query.device for x in tensors)
    ):
        return "layout"
    return None


def _gradients(module: Any, tensors: tuple[torch.Tensor, ...]) -> bool:
    """Return whether a gradient flows through a call, or may flow through what comes of its result."""
    if forward_ad._current_level >= 0:
        return True
    if torch.is_grad_enabled():
        return any(x.requires_grad for x in tensors) or _trains(module)
    return not torch.compiler.is_compiling() and forward_had_grad_mode() and _trains(module)


def _trains(module: Any) -> bool:
    """Return whether a layer is in training mode, its own weights perhaps frozen."""
    return bool(module.training) and next(module.parameters(), None) is not None
