"""How engines' caches look: K and V as [pages, page_size, kv_heads, head_dim], by strides alone."""

from __future__ import annotations

import torch


def transposed_pages(kv_cache: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return K and V of vLLM's CPU backend's cache, [pages, kv_heads, page_size, 2 * head_dim].

    That shape is its size only: a page and head holds K transposed, [head_dim, page_size], and after it V,
    [page_size, head_dim].
    """
    pages, heads, page_size, _ = kv_cache.shape
    page, head = kv_cache.stride()[:2]
    begin = kv_cache.storage_offset()
    shape = (pages, page_size, heads, head_dim)
    return (
        kv_cache.as_strided(shape, (page, 1, head, page_size), begin),
        kv_cache.as_strided(shape, (page, head_dim, head, 1), begin + page_size * head_dim),
    )


def halves_pages(kv_cache: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return K and V of vLLM's FlashAttention backend's cache, [pages, kv_heads, page_size, 2 * head_dim].

    K is the first half of the last axis, V the second; the other axes may lie in any order.
    """
    tokens = kv_cache.transpose(1, 2)
    return tokens[..., :head_dim], tokens[..., head_dim:]


def slot_pages(buffer: torch.Tensor, page_size: int, heads: int, head_dim: int) -> torch.Tensor:
    """Return K or V of SGLang's pool: [slots, heads, head_dim], or pages of [heads, page_size, head_dim].

    Slots may be strided, where layers or K and V share memory.
    """
    if buffer.dim() == 4:
        return buffer.transpose(1, 2)
    slots = buffer.view(buffer.shape[0], heads, head_dim)
    slot, head, element = slots.stride()
    return slots.as_strided(
        (slots.shape[0] // page_size, page_size, heads, head_dim), (slot * page_size, slot, head, element)
    )
