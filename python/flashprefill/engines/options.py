"""A plugin's options, which users write as JSON: the same names in each engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..errors import refuse, refuse_type, shown
from ..guard import Guard, guard_of
from ..policies import FlashPrefill, Policy, Reuse, TokenSparse, VSPrefill
from ..policies.text import parse as parse_policy

KEY = "flashprefill"
MIN_CHUNK = 128  # rows: a tile of queries


@dataclass(frozen=True)
class Options:
    """How prompts are prefilled.

    Attributes:
        policy: which blocks are kept.
        first_dense_layers: layers at the model's beginning that stay dense.
        min_chunk: rows; shorter pieces of prompts stay dense. 1: none does, not even what a prefix cache
            leaves of a prompt. None: the plugin knows a good number for its engine and device.
        log_seconds: seconds between lines of statistics in the engine's log; 0: one per step.
        metrics_hook: "module:function", called with `snapshot`'s dict whenever such a line is due; or None.
        guard: measures how much of the attention sparse layers keep, and may act on it; or None.
    """

    policy: Policy
    first_dense_layers: int = 0
    min_chunk: int | None = None
    log_seconds: float = 10.0
    metrics_hook: str | None = None
    guard: Guard | None = None

    @property
    def least_rows(self) -> int:
        """Rows of the shortest pieces that are not dense."""
        return MIN_CHUNK if self.min_chunk is None else self.min_chunk

    @property
    def forced_keys(self) -> int:
        """Keys up to which a prompt's sink and window blocks are all there is to keep."""
        blocks = getattr(self.policy, "sink_blocks", 0) + getattr(self.policy, "window_blocks", 0)
        return int(blocks * self.policy.block_size)


def value_of(
    policy: Policy | str,
    parameters: Mapping[str, Any],
    *,
    first_dense_layers: int,
    min_chunk: int | None,
    log_seconds: float,
    metrics_hook: str | None,
    guard: Guard | str | None,
) -> dict[str, Any]:
    """Return options as a mapping that `parse` reads, made of texts and numbers alone.

    Args:
        policy: a policy, or a text of one.
        parameters: fields of the policy, where it is given as text.
        first_dense_layers: as in `Options`, like the others.
        min_chunk: likewise.
        log_seconds: likewise.
        metrics_hook: likewise.
        guard: likewise, or a text of one.

    Raises:
        ValueError, TypeError: a value is wrong; the message names it.
    """
    if isinstance(policy, Policy):
        if parameters:
            refuse("parameters", sorted(parameters), "none where the policy is not a text")
        policy = _alone(policy).text
    value = {
        "policy": policy,
        "parameters": dict(parameters),
        "first_dense_layers": first_dense_layers,
        "min_chunk": min_chunk,
        "log_seconds": log_seconds,
        "metrics_hook": metrics_hook,
        "guard": None if guard is None else _stateless(guard_of(guard)).call,
    }
    parse(value)
    return value


def of_value(value: Any) -> Options | None:
    """Return what a value asks for: None, for None or false, to leave the plugin off."""
    return None if value is None or value is False else parse(value)


def parse(value: Any) -> Options:
    """Read a value: True, a text of a policy, or a mapping of what `value_of` takes."""
    if value is True:
        value = {}
    if isinstance(value, str):
        value = {"policy": value}
    if not isinstance(value, Mapping):
        refuse_type(KEY, shown(value), "true, a text of a policy, or a mapping")
    known = {"parameters"} | {field.name for field in fields(Options)}
    for name in value:
        if name not in known:
            refuse(f"{KEY}'s option", shown(name), "one of " + ", ".join(sorted(known)))
    policy = _policy(value.get("policy", FlashPrefill.kind), value.get("parameters") or {})
    hook = value.get("metrics_hook")
    if hook is not None and (not isinstance(hook, str) or hook.count(":") != 1):
        refuse("metrics_hook", shown(hook), '"module:function"')
    seconds = value.get("log_seconds", 10.0)
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds >= 0:
        refuse("log_seconds", shown(seconds), "a number of at least 0")
    return Options(
        policy,
        _integer("first_dense_layers", value.get("first_dense_layers", 0), 0),
        None if value.get("min_chunk") is None else _integer("min_chunk", value["min_chunk"], 1),
        float(seconds),
        hook,
        None if value.get("guard") is None else _stateless(guard_of(value["guard"])),
    )


def _policy(text: Any, parameters: Any) -> Policy:
    if not isinstance(text, str):
        refuse_type("policy", shown(text), "a text, such as 'flashprefill(alpha=0.12)'")
    if not isinstance(parameters, Mapping):
        refuse_type("parameters", shown(parameters), "a mapping from a policy's fields to values")
    return _alone(parse_policy(text, parameters))


def _stateless(guard: Guard | None) -> Guard:
    """Refuse a guard that learns: an engine's processes would each have a state of their own."""
    if guard is None or guard.state is not None:
        refuse("guard's state", shown(guard), "None in an engine")
    return guard


def _alone(policy: Policy) -> Policy:
    """Refuse a policy whose layers differ: the layers of an engine's step share one prepared call."""
    if isinstance(policy, (Reuse, VSPrefill)):
        refuse(
            "policy",
            policy.kind,
            "one for all layers: VSPrefill's weights and Reuse's masks are for Transformers",
        )
    if isinstance(policy, TokenSparse):
        refuse("policy", policy.text, "a selection: dropping tokens is for flashprefill.patch_model")
    return policy


def _integer(name: str, value: Any, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        refuse(name, shown(value), f"an integer of at least {low}")
    return int(value)
