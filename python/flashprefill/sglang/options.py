"""The plugin's options: an environment variable.

SGLang's arguments have no place for those of a plugin. Its processes inherit the environment of the one that
starts them.
"""

from __future__ import annotations

import json
import os
from typing import Any

from ..engines.options import MIN_CHUNK, Options, of_value, value_of
from ..errors import refuse, shown
from ..guard import Guard
from ..policies import Policy

VARIABLE = "FLASHPREFILL_SGLANG"
_WORDS = {"": False, "0": False, "false": False, "off": False, "1": True, "true": True, "on": True}


def config(
    policy: Policy | str = "flashprefill",
    *,
    first_dense_layers: int = 0,
    min_chunk: int = MIN_CHUNK,
    log_seconds: float = 10.0,
    metrics_hook: str | None = None,
    guard: Guard | str | None = None,
    **parameters: Any,
) -> dict[str, str]:
    """Return the environment that turns the plugin on.

    ``os.environ.update(config(...))``, before an Engine is made.

    Args:
        policy: a policy, or a text of one: "sketch(mass=0.9)", or "module:function" for a selection of your
            own (:class:`flashprefill.MaskPolicy`), which each of the engine's processes imports.
        first_dense_layers: layers at the model's beginning that stay dense.
        min_chunk: rows; shorter pieces of prompts stay dense.
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
    return {VARIABLE: json.dumps(value)}


def of_environment() -> Options | None:
    """Return what the environment asks for, None if the plugin is to stay off.

    Raises:
        ValueError, TypeError: it cannot be read, or a value is wrong; the message names it.
    """
    text = os.environ.get(VARIABLE, "").strip()
    if text.lower() in _WORDS:
        return of_value(_WORDS[text.lower()])
    if not text.startswith(("{", '"')):
        return of_value(text)
    try:
        value = json.loads(text)
    except ValueError as error:
        refuse(VARIABLE, shown(text), f"1, the text of a policy, or JSON ({error})")
    return of_value(value)
