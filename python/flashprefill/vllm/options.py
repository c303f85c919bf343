"""The plugin's options: the value of the key "flashprefill" in vLLM's additional config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..engines.options import KEY, Options, of_value, value_of
from ..guard import Guard
from ..policies import Policy


def config(
    policy: Policy | str = "flashprefill",
    *,
    first_dense_layers: int = 0,
    min_chunk: int | None = None,
    log_seconds: float = 10.0,
    metrics_hook: str | None = None,
    guard: Guard | str | None = None,
    **parameters: Any,
) -> dict[str, Any]:
    """Return a dict for vLLM's ``additional_config`` that turns the plugin on.

    Args:
        policy: a policy, or a text of one: "sketch(mass=0.9)", or "module:function" for a selection of your
            own (:class:`flashprefill.MaskPolicy`), which each of the engine's processes imports.
        first_dense_layers: layers at the model's beginning that stay dense.
        min_chunk: rows; shorter pieces of prompts stay dense. 1: none does, not even what a prefix cache
            leaves of a prompt. The default is 128 on CPUs and 448 on GPUs.
        log_seconds: seconds between lines of statistics in the engine's log.
        metrics_hook: "module:function" to be called with the statistics, in the engine's process.
        guard: measure how much of the attention sparse layers keep, and perhaps act on it: "observe",
            "repair(target=0.95)", "strict". What it finds is part of the statistics.
        **parameters: fields of the policy, where it is given as text.

    Raises:
        ValueError, TypeError: a value is wrong; the message names it.
    """
    value = value_of(
        policy,
        parameters,
        first_dense_layers=first_dense_layers,
        min_chunk=min_chunk,
        log_seconds=log_seconds,
        metrics_hook=metrics_hook,
        guard=guard,
    )
    return {KEY: value}


def of_config(additional_config: Any) -> Options | None:
    """Return what vLLM's additional config asks for, None if it does not name us."""
    return of_value(additional_config.get(KEY) if isinstance(additional_config, Mapping) else None)
