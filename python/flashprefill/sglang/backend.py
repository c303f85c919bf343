"""A stock attention backend, extended by a prefill of ours.

The object keeps its class as the one base of its new class: it still is what SGLang took it for, and all that
is not named here is the stock backend's. Once per step a plan is made of the batch; each layer then calls our
kernel for the rows of long prompts, and a second stock instance, which has planned the other requests alone,
for the rest. Layers and batches that are not plain go to the first instance as if we were not there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from ..engines.caches import slot_pages
from ..engines.options import Options
from ..engines.sparse import Plan, run
from .batches import is_plain, plan_of
from .host import host
from .layers import why_all_dense, why_dense


class Prefill:
    """What an extended backend has besides its stock state.

    Args:
        make: makes another stock backend of the same ModelRunner.
        runner: the ModelRunner.
        options: what the user asked for.

    Attributes:
        plan: of the batch in preparation or in computation; None: it is all the engine's.
    """

    def __init__(self, make: Callable[[], Any], runner: Any, options: Options) -> None:
        self.make = make
        self.options = options
        self.page_size: int = runner.page_size
        self.requests = runner.req_to_token_pool
        self.cache = runner.token_to_kv_pool
        self.plan: Plan | None = None
        self._rows = 0  # of the plan's batch
        self._rest: Any = None
        self._is_sparse: dict[int, bool] = {}  # by the layer's number

    def prepare(self, batch: Any) -> None:
        """Plan a batch, which the stock backend has planned already."""
        self.plan = None
        if batch.forward_mode.is_decode_or_idle():
            return
        if is_plain(batch) and _is_split_over_ranks(batch):
            host.say_once(
                logging.WARNING,
                "flashprefill: prompts that context parallelism splits over ranks are read densely",
            )
            return
        self.plan = plan_of(batch, self.requests.req_to_token, self.page_size, self.options)
        if self.plan is not None:
            self._rows = sum(batch.extend_seq_lens_cpu)
            if self.plan.engine is not None:
                if self._rest is None:
                    self._rest = self.make()
                self._rest.init_forward_metadata(self.plan.engine)

    def wants(self, layer: Any, rows: int, keywords: dict[str, Any]) -> bool:
        """Return whether a layer of the planned batch has rows for us."""
        if self.plan is None or rows != self._rows:
            return False
        given = [name for name, value in keywords.items() if value is not None and value is not False]
        if given:  # sinks, scales, parts of a head: the stock backend knows what they mean
            names = ", ".join(given)
            host.say_once(logging.WARNING, f"flashprefill: layers that are computed with {names} stay dense")
            return False
        sparse = self._is_sparse.get(layer.layer_id)
        if sparse is None:
            sparse = layer.layer_id >= self.options.first_dense_layers and not why_dense(layer)
            self._is_sparse[layer.layer_id] = sparse
        return sparse

    def run(self, q: torch.Tensor, k: Any, v: Any, layer: Any, batch: Any, save: bool) -> torch.Tensor | None:
        """Compute a layer of the planned batch.

        Args:
            q: [rows, heads * head_dim].
            k: [rows, kv_heads, head_dim], or None if the cache has them.
            v: likewise.
            layer: the RadixAttention.
            batch: the ForwardBatch.
            save: whether k and v are to be written to the cache.

        Returns:
            [rows, heads * head_dim]; None if the kernel refused: then k and v are in the cache, and all rows
            are the stock backend's.
        """
        plan = self.plan
        assert plan is not None
        if save and k is not None:
            _write(self.cache, layer, batch, k, v)
        query = q.reshape(q.shape[0], layer.tp_q_head_num, layer.qk_head_dim)
        output = batch._attn_output
        output = torch.empty(query.shape, dtype=q.dtype, device=q.device) if output is None else output
        output = output.view(query.shape)
        k_pages, v_pages = (
            slot_pages(buffer, self.page_size, layer.tp_k_head_num, layer.qk_head_dim)
            for buffer in self.cache.get_kv_buffer(layer.layer_id)
        )

        def dense(queries: torch.Tensor, part: Any, results: torch.Tensor) -> None:
            rows = plan.engine_rows
            k_part, v_part = (None, None) if k is None else (k[rows], v[rows])
            heads = queries.flatten(1)
            computed = self._rest.forward_extend(heads, k_part, v_part, layer, part, save_kv_cache=False)
            results.copy_(computed.view(results.shape))

        scales = (layer.k_scale, layer.v_scale) if k_pages.dtype == torch.float8_e4m3fn else (None, None)
        done = run(plan, query, k_pages, v_pages, output, layer.scaling, dense, layer.layer_id, scales)
        return output.flatten(1) if done else None


def _write(cache: Any, layer: Any, batch: Any, k: torch.Tensor, v: torch.Tensor) -> None:
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc

    where = KVWriteLoc.for_layer(batch, layer)
    cache.set_kv_buffer(layer, where, k, v, layer.k_scale, layer.v_scale)


def _is_split_over_ranks(batch: Any) -> bool:
    from sglang.srt.layers.cp.utils import is_cp_active

    return bool(is_cp_active(batch))


def extended(stock: type) -> type:
    """Return a class of the same objects that reads prompts with us."""

    class Extended(stock):
        flashprefill: Prefill

        def init_forward_metadata(self, forward_batch: Any) -> None:
            """Plan a batch, outside of CUDA graphs."""
            super().init_forward_metadata(forward_batch)
            self.flashprefill.prepare(forward_batch)

        def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
            """Plan a batch whose attention a CUDA graph holds: all of it is the engine's."""
            self.flashprefill.plan = None
            super().init_forward_metadata_out_graph(forward_batch, in_capture)

        def forward_extend(
            self,
            q: Any,
            k: Any,
            v: Any,
            layer: Any,
            forward_batch: Any,
            save_kv_cache: bool = True,
            **keywords: Any,
        ) -> Any:
            """Compute a layer of prompts."""
            ours = self.flashprefill
            if ours.wants(layer, q.shape[0], keywords):
                output = ours.run(q, k, v, layer, forward_batch, save_kv_cache)
                if output is not None:
                    return output
                save_kv_cache = False  # done
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **keywords)

    Extended.__name__ = Extended.__qualname__ = f"FlashPrefill{stock.__name__}"
    return Extended


def extend(backend: Any, make: Callable[[], Any], runner: Any, options: Options) -> None:
    """Extend a backend, unless no layer of its model can be sparse. The log says what is done.

    Args:
        backend: what the stock factory made of the runner.
        make: the stock factory.
        runner: SGLang's ModelRunner, with its model loaded.
        options: what the user asked for.
    """
    from sglang.srt.layers.radix_attention import RadixAttention

    layers = [layer for layer in runner.model.modules() if isinstance(layer, RadixAttention)]
    reason = why_all_dense(runner, backend)
    if reason:
        host.announce_dense(len(layers), reason)
        return

    def why(layer: Any) -> str:
        early = layer.layer_id < options.first_dense_layers
        return why_dense(layer) or ("first_dense_layers" if early else "")

    if host.announce((why(layer) for layer in layers), options.policy):
        backend.flashprefill = Prefill(make, runner, options)
        backend.__class__ = extended(type(backend))
