"""The CPU's attention backend with a prefill of ours.

Its cache is [pages, kv_heads, page_size, 2 * head_dim]. Inside a page and head K comes first and transposed,
[head_dim, page_size], then V, [page_size, head_dim]; strides say that to the kernel, and nothing is copied.
How a page looks depends on the instruction set that vLLM chose (AMX has a packing of its own), so before the
first use a few keys are written with the engine's own function and read back through our strides.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from vllm import _custom_ops
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from ..engines.caches import transposed_pages
from .backend import BuilderMixin, ImplMixin


@functools.lru_cache
def reads_back(isa: str, dtype: torch.dtype, page_size: int, head_dim: int) -> bool:
    """Return whether what the engine writes into a page is where we look for it."""
    tokens, heads = page_size + 5, 2
    numbers = torch.arange(2 * tokens * heads * head_dim) % 251  # exact in all dtypes
    key, value = numbers.to(dtype).view(2, tokens, heads, head_dim)
    kv_cache = torch.zeros(3, heads, page_size, 2 * head_dim, dtype=dtype)
    slots = torch.arange(tokens) + page_size  # pages 1 and 2
    k_raw, v_raw = kv_cache.view(3, heads, 2 * page_size, head_dim).chunk(2, dim=2)
    _custom_ops.cpu_attn_reshape_and_cache(key, value, k_raw, v_raw, slots, isa)
    k_pages, v_pages = (pages.flatten(0, 1)[slots] for pages in transposed_pages(kv_cache, head_dim))
    return bool(torch.equal(k_pages, key) and torch.equal(v_pages, value))


class CPUBackend(CPUAttentionBackend):
    """CPU_ATTN."""

    @staticmethod
    def get_impl_cls() -> type[CPUImpl]:
        """Return what computes a layer."""
        return CPUImpl

    @staticmethod
    def get_builder_cls() -> type[CPUBuilder]:
        """Return what prepares a batch."""
        return CPUBuilder


class CPUBuilder(BuilderMixin, CPUAttentionMetadataBuilder):
    """Divides batches into sparse and dense requests."""

    def why_dense(self) -> str:
        """Return why no layer can be sparse."""
        if self.kv_cache_spec.dtype != self.dtype:
            return f"a KV cache of {self.kv_cache_spec.dtype} for a model of {self.dtype}"
        if not reads_back(self.isa, self.dtype, self.block_size, self.head_dim):
            return f"a KV cache that vLLM packs for {self.isa}, which the plugin cannot read"
        return ""


class CPUImpl(ImplMixin, CPUAttentionBackendImpl):
    """Computes a layer."""

    def pages_of(self, kv_cache: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return K and V of a cache."""
        return transposed_pages(kv_cache, self.head_size)
