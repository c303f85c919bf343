"""The model's own dense attention, for calls that are not sparse.

Attention variants differ in what they add to softmax(q k) v. Whatever the kernel does not compute exactly
is left to SDPA, or where SDPA does not know it either (softcap, sinks, weights as an output) to the eager
function of the model's own file: the same choice that Transformers makes when it loads the model.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .masks import Plan, additive, causal_pairs, is_roles, models_of, pairs_of

_sdpa_of: dict[type, bool] = {}


def supports_sdpa(module: Any) -> bool:
    """Return whether Transformers would run this layer with SDPA: what the models of the layer's file say."""
    kind = type(module)
    if kind not in _sdpa_of:
        _sdpa_of[kind] = all(model._supports_sdpa for model in models_of(kind.__module__))
    return _sdpa_of[kind]


def eager_of(module: Any) -> Any:
    """Return the eager attention of the file that defines the layer, or None."""
    for kind in type(module).__mro__:
        found = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if found is not None:
            return found
    return None


def dense_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    plan: Plan | None,
    prefer_eager: bool,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run the layer as if flashprefill were not there."""
    if plan is not None and mask is not None and is_roles(mask, query.shape[2]):
        mask = pairs_of(mask, plan)
    only_eager = kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None
    if only_eager or prefer_eager or kwargs.get("output_attentions"):
        eager = eager_of(module)
        if eager is not None:
            causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
            if mask is None and causal and query.shape[2] > 1:
                mask = causal_pairs(query.shape[2], key.shape[2], query.device)
            if mask is not None:
                mask = additive(mask, query.dtype)
            return eager(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)  # type: ignore[no-any-return]
        if only_eager:
            raise NotImplementedError(
                f"flashprefill: {type(module).__name__} uses softcap or attention sinks, "
                "and its file has no eager_attention_forward"
            )
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    return sdpa(  # type: ignore[no-any-return]
        module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )
