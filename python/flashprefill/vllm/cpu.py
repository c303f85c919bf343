"""The CPU's attention backend with a prefill of ours.

Its cache is [pages, kv_heads, page_size, 2 * head_dim]. Inside a page and head K comes first and transposed,
[head_dim, page_size], then V, [page_size, head_dim]; strides say that to the kernel, and nothing is copied.
How a page looks depends on the instruction set that vLLM chose (AMX has a packing of its own), so before the
first use a few keys are written with the engine's own function and read back through our strides.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from vllm import _custom_ops
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from . import layers, options, runner, sparse
from .metrics import metrics


def pages_of(kv_cache: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return K and V of a cache as [pages, page_size, kv_heads, head_dim], without copying."""
    pages, heads, page_size, _ = kv_cache.shape
    page, head = kv_cache.stride()[:2]
    begin = kv_cache.storage_offset()
    shape = (pages, page_size, heads, head_dim)
    return (
        kv_cache.as_strided(shape, (page, 1, head, page_size), begin),
        kv_cache.as_strided(shape, (page, head_dim, head, 1), begin + page_size * head_dim),
    )


@functools.lru_cache
def reads_back(isa: str, dtype: torch.dtype, page_size: int, head_dim: int) -> bool:
    """Return whether what the engine writes into a page is where `pages_of` looks for it."""
    tokens, heads = page_size + 5, 2
    numbers = torch.arange(2 * tokens * heads * head_dim) % 251  # exact in all dtypes
    key, value = numbers.to(dtype).view(2, tokens, heads, head_dim)
    kv_cache = torch.zeros(3, heads, page_size, 2 * head_dim, dtype=dtype)
    slots = torch.arange(tokens) + page_size  # pages 1 and 2
    k_raw, v_raw = kv_cache.view(3, heads, 2 * page_size, head_dim).chunk(2, dim=2)
    _custom_ops.cpu_attn_reshape_and_cache(key, value, k_raw, v_raw, slots, isa)
    k_pages, v_pages = (pages.flatten(0, 1)[slots] for pages in pages_of(kv_cache, head_dim))
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


class CPUBuilder(CPUAttentionMetadataBuilder):
    """Takes batches apart, once a step."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.options = options.of_config(vllm_config.additional_config)
        if self.options is None:
            return
        group = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        if not reads_back(self.isa, kv_cache_spec.dtype, self.block_size, self.head_dim):
            sparse.say_once(
                logging.WARNING,
                f"flashprefill: the KV cache of {self.dtype} that vLLM lays out for {self.isa} is none that the "
                f"plugin can read; {len(group)} layers stay dense",
            )
            self.options = None
            return
        layers.announce({name: layer.impl for name, layer in group.items()}, self.options)
        runner.install(vllm_config)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """Build the engine's metadata, with a plan where rows are sparse."""
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        if self.options is not None:
            metrics.tick(self.options)
            build = functools.partial(super().build, 0)
            plan = sparse.plan_of(common_attn_metadata, runner.final_chunks(), self.options, build)
            setattr(metadata, sparse.ATTRIBUTE, plan)
        return metadata

    def build_for_drafting(self, common_attn_metadata: Any, draft_index: int) -> Any:
        """Leave drafts to the engine."""
        return super().build(0, common_attn_metadata, fast_build=True)


class CPUImpl(CPUAttentionBackendImpl):
    """Computes a layer: our kernel and the engine's, each its rows."""

    _sparse: bool | None = None  # not yet known

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write attention of query [rows, heads, head_dim] over the cache into output."""
        plan: sparse.Plan | None = getattr(attn_metadata, sparse.ATTRIBUTE, None)

        def dense(queries: torch.Tensor, metadata: Any, results: torch.Tensor) -> torch.Tensor:
            return super(CPUImpl, self).forward(
                layer, queries, key, value, kv_cache, metadata, results, output_scale, output_block_scale
            )

        if plan is not None and self._is_sparse(layer, plan.options) and output_scale is None:
            k_pages, v_pages = pages_of(kv_cache, self.head_size)
            if sparse.run(plan, query, k_pages, v_pages, output, self.scale, dense):
                return output
        return dense(query, attn_metadata, output)

    def _is_sparse(self, layer: Any, wanted: options.Options) -> bool:
        if self._sparse is None:
            number = layers.number_of(layer.layer_name)
            self._sparse = not layers.why_dense(self) and number >= wanted.first_dense_layers
        return self._sparse
