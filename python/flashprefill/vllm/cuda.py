"""The FlashAttention backend with a prefill of ours.

Metadata and cache live on the GPU. What is decided on the host is decided from vLLM's own host copies, so
nothing waits for the GPU.

A CUDA graph replays what was captured, whatever a batch holds. So the engine may capture batches that only
decode, which never have sparse rows, and runs the others piecewise, with attention outside the graphs.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from ..engines.caches import halves_pages
from . import options
from .backend import BuilderMixin, ImplMixin


class FlashBackend(FlashAttentionBackend):
    """FLASH_ATTN."""

    @staticmethod
    def get_impl_cls() -> type[FlashImpl]:
        """Return what computes a layer."""
        return FlashImpl

    @staticmethod
    def get_builder_cls() -> type[FlashBuilder]:
        """Return what prepares a batch."""
        return FlashBuilder


class FlashBuilder(BuilderMixin, FlashAttentionMetadataBuilder):
    """Divides batches into sparse and dense requests."""

    # On an H200 a prompt of 32K tokens in chunks of 512 rows takes 0.84 of the stock engine's time; shorter
    # ones were not measured. A chunk is what requests that generate leave of a batch: a little less.
    min_chunk = 448
    # The schedule of FlashAttention 3 would go to a buffer that the whole batch's schedule lies in.
    build_options = {"fast_build": True}

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Return which batches may be replayed whole: those without prefill."""
        support = super().get_cudagraph_support(vllm_config, kv_cache_spec)
        if options.of_config(vllm_config.additional_config) is None:
            return support
        return min(support, AttentionCGSupport.UNIFORM_BATCH, key=lambda level: level.value)


class FlashImpl(ImplMixin, FlashAttentionImpl):
    """Computes a layer."""

    fp8_caches = ("fp8", "fp8_e4m3")

    def pages_of(self, kv_cache: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return K and V of a cache."""
        pages = kv_cache.view(torch.float8_e4m3fn) if self.kv_cache_dtype in self.fp8_caches else kv_cache
        return halves_pages(pages, self.head_size)
