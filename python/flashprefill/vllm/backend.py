"""Mix-ins of our attention backends, which come before vLLM's own classes.

Both do exactly what their bases do unless the engine's config turns the plugin on and a batch has sparse
rows. This module needs no vLLM, so its tests need none either.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from .._prepared import dense_keys
from ..engines.options import MIN_CHUNK, Options
from ..errors import FlashPrefillError
from . import layers, options, runner, sparse
from .host import host
from .metrics import metrics


class BuilderMixin:
    """Divides batches, once per step. A mix-in before an AttentionMetadataBuilder.

    `build_options` are what its build gets for the dense requests of a batch that has sparse ones too.
    """

    options: Options | None
    short_keys = 0  # keys up to which our kernel would keep everything
    min_chunk = MIN_CHUNK  # where the options leave it open
    build_options: dict[str, Any] = {}

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]
        self.options = options.of_config(vllm_config.additional_config)
        if self.options is None:
            return
        if self.options.min_chunk is None:
            self.options = replace(self.options, min_chunk=self.min_chunk)
        reason = self.why_dense()
        if not reason:
            try:
                self.short_keys = dense_keys(self.options.policy, getattr(device, "type", "cpu"))
            except FlashPrefillError as error:
                reason = str(error)
        if reason:
            host.announce_dense(len(layer_names), reason)
            self.options = None
            return
        if layers.announce(self.impls(layer_names, vllm_config), self.options):
            runner.install(vllm_config)
        else:
            self.options = None

    def why_dense(self) -> str:
        """Return why none of these layers can be sparse, "" if they can."""
        return ""

    def impls(self, layer_names: list[str], vllm_config: Any) -> dict[str, Any]:
        """Return what computes each of these layers."""
        from vllm.config import get_layers_from_vllm_config
        from vllm.model_executor.layers.attention import Attention

        group = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        return {name: layer.impl for name, layer in group.items()}

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """Build the engine's metadata, with a plan where rows are sparse."""
        engine = super().build  # type: ignore[misc]
        metadata = engine(common_prefix_len, common_attn_metadata, fast_build)
        if self.options is not None:
            metrics.tick(self.options)
            build = functools.partial(engine, 0, **self.build_options)
            final = runner.final_chunks()
            plan = sparse.plan_of(common_attn_metadata, final, self.options, build, self.short_keys)
            setattr(metadata, sparse.ATTRIBUTE, plan)
        return metadata

    def build_for_drafting(self, common_attn_metadata: Any, draft_index: int) -> Any:
        """Leave drafts to the engine."""
        return super().build(0, common_attn_metadata, fast_build=True)  # type: ignore[misc]

    def update_block_table(self, metadata: Any, blk_table: torch.Tensor, slot_mapping: torch.Tensor) -> Any:
        """Return metadata of the same batch for another group of layers, with a cache of its own."""
        engine = super().update_block_table  # type: ignore[misc]
        updated = engine(metadata, blk_table, slot_mapping)
        plan: sparse.Plan | None = getattr(metadata, sparse.ATTRIBUTE, None)
        if plan is not None:
            plan = sparse.with_block_table(plan, blk_table, lambda m, table: engine(m, table, m.slot_mapping))
            setattr(updated, sparse.ATTRIBUTE, plan)
        return updated


class ImplMixin:
    """Computes a layer: our kernel and the engine's, each its rows. A mix-in before an AttentionImpl."""

    head_size: int
    scale: float
    kv_cache_dtype: str
    fp8_caches: tuple[str, ...] = ()  # names of the FP8 caches that `pages_of` knows
    _is_sparse: bool | None = None  # not yet known
    _number = 0  # the layer's
    _pages: tuple[Any, int, tuple[torch.Tensor, torch.Tensor]] | None = None  # of which cache, lying where

    def pages_of(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return K and V of a cache as [pages, page_size, kv_heads, head_dim], without copying."""
        raise NotImplementedError

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write attention of query [rows, heads, head_dim] over the cache into output, and return that."""
        engine: Callable[..., torch.Tensor] = super().forward  # type: ignore[misc]
        plan: sparse.Plan | None = getattr(attn_metadata, sparse.ATTRIBUTE, None)
        if plan is None:  # the fast path: each layer of each generated token
            return engine(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )

        def dense(queries: torch.Tensor, metadata: Any, results: torch.Tensor) -> Any:
            return engine(
                layer, queries, key, value, kv_cache, metadata, results, output_scale, output_block_scale
            )

        if output_scale is None and self._wants(layer, plan.options):
            k_pages, v_pages = self._pages_of(kv_cache)
            scales: sparse.Scales = (None, None)
            if self.kv_cache_dtype in self.fp8_caches:
                scales = layer._k_scale, layer._v_scale
            ours = query if query.dtype == output.dtype else dequantised(query, layer._q_scale, output.dtype)
            if sparse.run(
                plan, ours, k_pages, v_pages, output, self.scale, dense, self._number, scales, query
            ):
                return output
        dense(query, attn_metadata, output)
        return output

    def _pages_of(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `pages_of`; a layer's cache stays where it is, and each step asks again."""
        place = kv_cache.data_ptr()
        if self._pages is None or self._pages[0] is not kv_cache or self._pages[1] != place:
            self._pages = kv_cache, place, self.pages_of(kv_cache)
        return self._pages[2]

    def _wants(self, layer: Any, wanted: Options) -> bool:
        if self._is_sparse is None:
            self._number = layers.number_of(layer.layer_name)
            self._is_sparse = not layers.why_dense(self) and self._number >= wanted.first_dense_layers
        return self._is_sparse


def dequantised(query: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return queries that the engine has stored in FP8 in a dtype of 16 bits.

    Args:
        query: [rows, heads, head_dim].
        scale: what they are multiplied by, fp32 [1] or [kv_heads].
        dtype: the result's.
    """
    by_head = scale.repeat_interleave(query.shape[1] // scale.numel())[:, None]
    return (query.float() * by_head).to(dtype)


def warn_if_unused(additional_config: Any) -> None:
    """Say so if the plugin is on and no layer of the model came to it."""
    try:
        wanted = options.of_config(additional_config)
    except (TypeError, ValueError):
        return  # said when the model was loaded
    if wanted is not None and not host.announced:
        host.say_once(
            logging.WARNING,
            "flashprefill: it is turned on, but no layer of this model has the attention backend CPU_ATTN or "
            "FLASH_ATTN, which are all that it extends; prompts are read densely",
        )
