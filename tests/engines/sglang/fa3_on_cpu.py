"""Lets SGLang's FlashAttention 3 backend run on a CPU: its class and metadata, with torch for its kernel.

So what the plugin reads of that backend, and the smaller batches that it has it plan, go through the engine's
own code in the shapes that they have on a GPU. `install` is called in the engine's process, before it starts.
"""

import sys
import types

import torch


def attend(
    q, k_cache, v_cache, *, page_table, cache_seqlens, cu_seqlens_q=None, softmax_scale, causal=False,
    out=None, window_size=(-1, -1), softcap=0.0, k_descale=None, v_descale=None, return_softmax_lse=False,
    **others,
):  # fmt: skip
    """Do what flash_attn_with_kvcache does with a paged cache; q is packed, or one row per request."""
    assert not return_softmax_lse and k_descale is None and v_descale is None and not softcap
    assert page_table.dtype == cache_seqlens.dtype == torch.int32, "the kernel takes nothing else"
    packed = q.dim() == 3
    rows = q if packed else q.flatten(0, 1)
    result = torch.empty_like(rows) if out is None else out.view(rows.shape)
    starts = list(range(len(rows) + 1)) if cu_seqlens_q is None else cu_seqlens_q.tolist()
    assert starts[-1] == len(rows) and len(starts) == len(cache_seqlens) + 1 <= len(page_table) + 1
    page = k_cache.shape[1]
    for i, keys in enumerate(cache_seqlens.tolist()):
        pages = page_table[i, : -(-keys // page)].long()
        k, v = (cache[pages].flatten(0, 1)[:keys].transpose(0, 1) for cache in (k_cache, v_cache))
        mine = slice(starts[i], starts[i + 1])
        count = starts[i + 1] - starts[i]
        far = torch.arange(keys - count, keys)[:, None] - torch.arange(keys)[None, :]
        seen = (far >= 0) if causal else torch.ones_like(far, dtype=torch.bool)
        if window_size[0] >= 0:
            seen &= far <= window_size[0]
        result[mine] = torch.nn.functional.scaled_dot_product_attention(
            rows[mine].transpose(0, 1), k, v, attn_mask=seen, scale=softmax_scale, enable_gqa=True
        ).transpose(0, 1)
    return result.view(q.shape)


def install():
    """Put the kernel in its places, and call this machine a Hopper GPU where that backend asks."""
    kernels = types.ModuleType("sgl_kernel.flash_attn")
    kernels.flash_attn_with_kvcache = kernels.flash_attn_varlen_func = attend
    kernels.get_scheduler_metadata = lambda *_, **__: None
    sys.modules["sgl_kernel.flash_attn"] = kernels
    from sglang.srt.layers.attention import attention_registry, flashattention_backend

    for module in (attention_registry, flashattention_backend):
        module.get_device_capability = lambda *_: (9, 0)
    flashattention_backend.flash_attn_with_kvcache = attend
    flashattention_backend._should_disable_scheduler_metadata_precompute = lambda: True
