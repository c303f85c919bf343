"""Which layers of a model are sparse, by what vLLM says about each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..engines.options import Options
from .host import host

_DTYPES = ("auto", "float16", "bfloat16", "float32")


def why_dense(impl: Any) -> str:
    """Return why an attention layer has to stay the engine's, "" if it need not."""
    if str(getattr(impl.attn_type, "value", impl.attn_type)) != "decoder":
        return "it is not a decoder's self-attention"
    if impl.sliding_window not in (-1, None, (-1, -1)):
        return "a sliding window"
    if impl.logits_soft_cap:
        return "logit softcapping"
    if impl.alibi_slopes is not None:
        return "ALiBi"
    if getattr(impl, "sinks", None) is not None:
        return "learned attention sinks"
    if impl.kv_cache_dtype not in (*_DTYPES, *getattr(impl, "fp8_caches", ())):
        return f"a KV cache of {impl.kv_cache_dtype}"
    if getattr(impl, "dcp_world_size", 1) > 1:
        return "a context that is split over GPUs"
    return ""


def number_of(layer_name: str) -> int:
    """Return a layer's number: the first one in its name ("model.layers.3.self_attn.attn")."""
    return next((int(part) for part in layer_name.split(".") if part.isdigit()), 0)


def announce(impls: Mapping[str, Any], wanted: Options) -> int:
    """Log which layers of a group are sparse and why the others are not. Returns how many are."""

    def why(name: str, impl: Any) -> str:
        early = number_of(name) < wanted.first_dense_layers
        return why_dense(impl) or ("first_dense_layers" if early else "")

    return host.announce((why(name, impl) for name, impl in impls.items()), wanted.policy)
