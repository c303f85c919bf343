"""Which layers of a model are sparse, by what SGLang says about each."""

from __future__ import annotations

from typing import Any


def why_dense(layer: Any) -> str:
    """Return why a RadixAttention has to stay the engine's, "" if it need not."""
    if layer.is_cross_attention or str(getattr(layer.attn_type, "value", layer.attn_type)) != "decoder":
        return "it is not a decoder's self-attention"
    if layer.sliding_window_size is not None and layer.sliding_window_size > -1:
        return "a sliding window"
    if layer.logit_cap:
        return "logit softcapping"
    if layer.use_irope:
        return "attention in chunks"
    if layer.xai_temperature_len > 0:
        return "a temperature by position"
    if layer.pos_encoding_mode != "NONE":
        return f"positions in attention ({layer.pos_encoding_mode})"
    if layer.qk_head_dim != layer.v_head_dim:
        return "values of another head_dim than keys"
    return ""


def why_all_dense(runner: Any, backend: Any) -> str:
    """Return why no layer of a ModelRunner can be sparse, "" if some may."""
    if runner.use_mla_backend:
        return "attention over a latent cache (MLA)"
    if runner.model_config.is_encoder_decoder:
        return "an encoder's keys lie before the prompt's"
    if runner.kv_cache_dtype not in _dtypes():
        return f"a KV cache of {runner.kv_cache_dtype}"
    if getattr(getattr(runner, "kv_index_translator", None), "is_translating", False):
        return "a KV cache whose pages move (unified memory)"
    if getattr(backend, "_kv_shard_pool", None) is not None or getattr(backend, "dcp_size", 1) > 1:
        return "a context that is split over GPUs"
    if getattr(backend, "fa_skip_kv_cache", False):
        return "an embedding model that keeps no KV cache"
    return ""


def _dtypes() -> tuple[Any, ...]:
    import torch

    return torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn
