"""Sparse prefill inside SGLang: an out-of-tree plugin, found through the entry point ``sglang.srt.plugins``.

    os.environ.update(flashprefill.sglang.config(fp.FlashPrefill(alpha=0.12)))  # before the engine is made
    FLASHPREFILL_SGLANG=1 python -m sglang.launch_server --model-path MODEL

SGLang calls `register` in each of its processes. Turned on, that puts a factory around four of its attention
backends' own: what comes out is the stock backend, its class extended by a prefill of ours. No backend gets a
new name, so all that SGLang decides by names (page sizes, CUDA graphs, speculation) stays as it is. Turned
off, nothing is touched. docs/sglang.md has the rest.

Importing this package imports neither torch nor SGLang.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ..engines.options import Options
from .host import host
from .options import config, of_environment

__all__ = ["config", "register", "snapshot"]

BACKENDS = ("torch_native", "fa3", "triton", "flashinfer")
_CONTROLLER = "sglang.srt.managers.scheduler_components.internal_state.SchedulerInternalStateController"
_SETUP = "sglang.srt.model_executor.model_runner_components.attention_backend_setup"
_HOOKS = {
    "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new": "note_batch",
    f"{_CONTROLLER}.get_internal_state": "add_statistics",
    f"{_SETUP}.build_attention_backends": "warn_if_unused",
}
_MARK = "_flashprefill"


def snapshot() -> dict[str, Any]:
    """Return the counters of this process: the one that computes, not a server's front end.

    Returns:
        What `flashprefill.engines.metrics.Metrics.snapshot` describes.
    """
    return host.metrics.snapshot()


def register() -> None:
    """Put the factories in their places. SGLang calls it; calling it again changes nothing.

    Where that cannot be done the engine is left as it is, dense, with a line in its log that says why.
    Options that are wrong stop the engine: SGLang logs and swallows what a plugin raises here, so the
    factories raise it.
    """
    wanted: Options | Exception | None
    try:
        wanted = of_environment()
        host.metrics.hook(wanted.metrics_hook if wanted else None)
    except Exception as error:
        host.logger.error("flashprefill: %s", error)
        wanted = error
    if wanted is None:
        return
    import sglang
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if not host.knows(sglang.__version__) or hasattr(ATTENTION_BACKENDS[BACKENDS[0]], _MARK):
        return
    for name in BACKENDS:
        ATTENTION_BACKENDS[name] = around(name, ATTENTION_BACKENDS[name], wanted)
    if isinstance(wanted, Options):
        from . import hooks

        hooks.options = wanted
        for target, name in _HOOKS.items():
            HookRegistry.register(target, getattr(hooks, name), HookType.AFTER)


def around(name: str, factory: Callable[[Any], Any], wanted: Options | Exception) -> Callable[[Any], Any]:
    """Return a factory of the same backends, each with a prefill of ours where its model can have one."""

    @functools.wraps(factory)
    def make(runner: Any) -> Any:
        if isinstance(wanted, Exception):
            raise wanted
        backend = factory(runner)
        if not runner.is_draft_worker:
            from .backend import extend

            extend(backend, lambda: factory(runner), runner, wanted)
        return backend

    setattr(make, _MARK, name)
    return make
