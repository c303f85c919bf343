"""Policies written as text: `flashprefill(alpha=0.2)`, `sketch`, `Streaming(sink_blocks=1)`.

The text is read as a Python call but never run: only a known name and keyword arguments that are plain
numbers, booleans, None or strings get through. What the fields may be is the policies' own business, whose
one-line refusals are passed on.
"""

from __future__ import annotations

import ast
import dataclasses
from typing import Any

from .. import policies
from .errors import UsageError

POLICIES: dict[str, type[policies.Policy]] = {
    "dense": policies.Dense,
    "streaming": policies.Streaming,
    "flashprefill": policies.FlashPrefill,
    "sketch": policies.Sketch,
    "flexprefill": policies.FlexPrefill,
    "minference": policies.MInference,
    "xattention": policies.XAttention,
    "rrattention": policies.RRAttention,
    "spargeattn": policies.SpargeAttn,
    "prism": policies.Prism,
    "sampleattention": policies.SampleAttention,
}
THRESHOLDS = (
    "alpha",
    "mass",
    "gain",
    "gamma",
    "threshold",
    "cdf",
    "topk",
    "coverage",
)  # what a policy is known by, so it is always shown


def parse_policy(text: str) -> policies.Policy:
    """The policy that a text names, or a UsageError of one line."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        raise UsageError(
            f"policy {text!r}: write a name with or without arguments, like flashprefill(alpha=0.2)"
        ) from None
    name, keywords = (tree.func, tree.keywords) if isinstance(tree, ast.Call) else (tree, [])
    if not isinstance(name, ast.Name) or name.id.lower() not in POLICIES:
        raise UsageError(f"policy {text!r}: the name must be one of {', '.join(POLICIES)}")
    if isinstance(tree, ast.Call) and tree.args:
        raise UsageError(f"policy {text!r}: arguments are given by name, like alpha=0.2")
    policy = POLICIES[name.id.lower()]
    known = [field.name for field in dataclasses.fields(policy)]  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for keyword in keywords:
        if keyword.arg not in known:
            raise UsageError(
                f"policy {text!r}: {keyword.arg or '**'} is unknown; {name.id} takes {', '.join(known)}"
            )
        try:
            arguments[keyword.arg] = ast.literal_eval(keyword.value)
        except ValueError:
            raise UsageError(f"policy {text!r}: {keyword.arg} must be a plain value") from None
    try:
        return policy(**arguments)
    except (ValueError, TypeError) as error:
        raise UsageError(f"policy {text!r}: {error}") from None


def spell(policy: policies.Policy) -> str:
    """Return a text that parse_policy reads back: the threshold, and what is not a default."""
    default = type(policy)()
    shown = {}
    for field in dataclasses.fields(policy):  # type: ignore[arg-type]
        value = getattr(policy, field.name)
        if value != getattr(default, field.name) or (field.name in THRESHOLDS and value is not None):
            shown[field.name] = value
    if any(shown.get(name) is not None for name in ("alpha", "gain")):
        shown.pop("mass", None)  # one of them decides; the others are None by themselves
    if shown.get("topk") is not None:
        shown.pop("cdf", None)
    return f"{type(policy).__name__}({', '.join(f'{name}={value!r}' for name, value in shown.items())})"
