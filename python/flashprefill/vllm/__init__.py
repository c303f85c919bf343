"""Sparse prefill inside vLLM: an out-of-tree plugin, found through the entry point ``vllm.general_plugins``.

    LLM(model, additional_config=flashprefill.vllm.config(fp.FlashPrefill(alpha=0.12)))
    vllm serve MODEL --additional-config '{"flashprefill": true}'

vLLM loads `register` in each of its processes. That puts subclasses in the place of two of its attention
backends, CPU_ATTN and FLASH_ATTN. They do what their bases do until vLLM's additional config has a key
"flashprefill"; then prompts are read sparsely and all else stays the engine's own. docs/vllm.md has the rest.

Importing this package imports neither torch nor vLLM.
"""

from __future__ import annotations

import functools
from typing import Any

from .host import host
from .metrics import WorkerExtension, metrics, snapshot
from .options import config

__all__ = ["WorkerExtension", "config", "register", "snapshot"]

BACKENDS = {"CPU_ATTN": "cpu.CPUBackend", "FLASH_ATTN": "cuda.FlashBackend"}


def register() -> None:
    """Put the backends in their places. vLLM calls it; calling it again changes nothing.

    Where that cannot be done the engine is left as it is, dense, with a line in its log that says why.
    """
    import vllm
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if not host.knows(vllm.__version__):
        return
    for name, path in BACKENDS.items():
        backend, ours = AttentionBackendEnum[name], f"{__name__}.{path}"
        if backend.is_overridden() and backend.get_path() != ours:
            host.logger.warning(
                "flashprefill: another plugin has replaced the attention backend %s by %s; it stays, and "
                "prompts are read densely",
                name,
                backend.get_path(),
            )
            continue
        register_backend(backend, ours)
    _watch_models()


def _watch_models() -> None:
    """Have each worker, once its model is loaded, say so if the plugin is on and has nothing to do.

    And have it count no batch that it makes up: to warm itself up, to capture graphs, to keep others company.
    """
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    initialize = WorkerWrapperBase.initialize_from_config
    if hasattr(initialize, "_flashprefill"):
        return

    @functools.wraps(initialize)
    def initialize_and_look(self: Any, *arguments: Any, **keywords: Any) -> None:
        initialize(self, *arguments, **keywords)
        from .backend import warn_if_unused

        warn_if_unused(self.vllm_config.additional_config)

    initialize_and_look._flashprefill = True  # type: ignore[attr-defined]
    WorkerWrapperBase.initialize_from_config = initialize_and_look
    for name in ("compile_or_warm_up_model", "execute_dummy_batch"):
        setattr(WorkerWrapperBase, name, _uncounted(name))


def _uncounted(name: str) -> Any:
    """Return a method of a worker's wrapper that calls the worker's and counts none of its batches."""

    def call(self: Any, *arguments: Any, **keywords: Any) -> Any:
        with metrics.paused():
            return getattr(self.worker, name)(*arguments, **keywords)

    call.__name__ = name
    return call
