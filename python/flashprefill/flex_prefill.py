"""FlexPrefill's own names over this library: change ``from flex_prefill import ...`` and nothing else.

    from flashprefill.flex_prefill import flex_prefill_attention, patch_model

This version takes more: batches of any size, a cached prefix, every block size, head dimension and dtype of
the library, CPU and GPU. docs/methods/flexprefill.md says what the method does, and where its rules had to
be generalised.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ._layout import check_bool
from .api import prefill_attention
from .policies import FlexPrefill

__all__ = ["flex_prefill_attention", "patch_model"]


def flex_prefill_attention(
    q: Any,
    k: Any,
    v: Any,
    gamma: float,
    tau: float = 0.0,
    min_budget: int | None = None,
    max_budget: int | None = None,
    gqa_interleave: bool = False,
    softmax_scale: float | None = None,
    block_size: int = 128,
    return_computational_ratio: bool = False,
) -> Any:
    """Attend causally over what FlexPrefill (arXiv 2502.20766) selects.

    Args:
        q: queries [batch, tokens, heads, head_dim], NumPy or torch.
        k: keys [batch, tokens, kv_heads, head_dim]; tokens before the queries' may come first.
        v: values, of k's shape.
        gamma: share of the attention mass to keep, in (0, 1].
        tau: Jensen-Shannon distance below which a head is query-aware; 0: none is.
        min_budget: tokens that verticals and slashes hold at least; None is 1.
        max_budget: tokens that they hold at most; None is no limit.
        gqa_interleave: whether query head h reads KV head h % kv_heads (GLM-4) instead of h // group. The
            heads of q are brought into the other order and those of the result back, a copy each.
        softmax_scale: factor of the scores; the default is head_dim**-0.5.
        block_size: keys per block, and the number of query rows that are looked at.
        return_computational_ratio: return the share of blocks computed too.

    Returns:
        The output, of q's shape; or (output, ratio), where ratio is kept blocks over causally visible ones, a
        float. (FlexPrefill's own counts those of the future too, so it is about half of this one.)
    """
    check_bool("gqa_interleave", gqa_interleave)
    check_bool("return_computational_ratio", return_computational_ratio)
    policy = FlexPrefill(
        gamma=gamma,
        tau=tau,
        min_budget=1 if min_budget is None else min_budget,
        max_budget=max_budget,
        block_size=block_size,
    )
    groups = q.shape[-2] // k.shape[-2] if gqa_interleave and k.shape[-2] else 1
    if groups > 1:
        q = _regroup(q, groups)
    result = prefill_attention(
        q, k, v, policy, softmax_scale=softmax_scale, return_stats=return_computational_ratio
    )
    out, stats = result if return_computational_ratio else (result, None)
    if groups > 1:
        out = _regroup(out, k.shape[-2])
    return out if stats is None else (out, stats.mean_density)


def _regroup(x: Any, outer: int) -> Any:
    """Reorder heads [..., outer * inner, head_dim] from outer-major to inner-major."""
    inner = x.shape[-2] // outer
    parts = x.reshape(*x.shape[:-2], outer, inner, x.shape[-1])
    return parts.swapaxes(-3, -2).reshape(x.shape)


def patch_model(model: Any, pattern: str = "flex_prefill", config: Mapping[str, Any] | None = None) -> Any:
    """Make a Transformers model prefill sparsely, as :func:`flashprefill.patch_model` does.

    Args:
        model: a loaded model; it is changed in place.
        pattern: "flex_prefill", or the name of any other policy.
        config: the policy's fields, which for "flex_prefill" may be FlexPrefill's own: "block_size",
            "flex_prefill_gamma", "flex_prefill_tau", "flex_prefill_min_budget", "flex_prefill_max_budget".

    Returns:
        The model.
    """
    from .transformers import patch_model as patch

    return patch(model, pattern, config or {})
