"""patch_model and unpatch_model: which layer of a model has which policy.

A policy sits at the attention layer itself, as one plain attribute, so that a forward looks nothing up,
torch.compile sees a constant, and deep copies of a model keep what they had. The name of the attention is
written into configs of the model's own (configs.py); the links to those that it had before are kept at the
model and at the models inside it, to go back to.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers.modeling_utils import PreTrainedModel

from .._arguments import math_of
from ..errors import refuse, refuse_type, shown
from ..guard import Guard, guard_of
from ..policies import Policy
from ..policies.text import parse
from .attention import ATTRIBUTE, Layer
from .configs import RECORD, configs_of, copies_of, links_of, mark, point, write_back
from .dense import supports_sdpa
from .fallback import FlashPrefillWarning, stack_level
from .register import IMPLEMENTATION, register_transformers
from .stats import attention_layers

if TYPE_CHECKING:
    from .._typing import MathName


def _policy(value: Any, options: Mapping[str, Any] | None = None) -> Policy | None:
    if isinstance(value, str):
        return parse(value, options)
    if options is not None:
        refuse_type(
            "options", shown(dict(options)), f"None where the policy is not a name but {shown(value)}"
        )
    if value is not None and not isinstance(value, Policy):
        refuse_type("policy", shown(value), "a policy, a name of one, or a mapping from layers to policies")
    return value


def _by_layer(policy: Any, options: Mapping[str, Any] | None, layers: int) -> list[Policy | None]:
    if not isinstance(policy, Mapping):
        return _at_layers([_policy(policy, options)] * layers)
    if options is not None:
        refuse_type("options", shown(dict(options)), "None where the policy is a mapping")
    result = [_policy(policy.get("default"))] * layers
    for key, value in policy.items():
        if key == "default":
            continue
        if isinstance(key, bool) or not isinstance(key, int):
            refuse_type("a layer of policy", shown(key), 'an integer, or "default"')
        if not -layers <= key < layers:
            refuse("a layer of policy", key, f"from {-layers} to {layers - 1}")
        result[key] = _policy(value)
    return _at_layers(result)


def _at_layers(policies: list[Policy | None]) -> list[Policy | None]:
    count = len(policies)
    return [
        None if policy is None else policy._in_model(count).at_layer(layer)
        for layer, policy in enumerate(policies)
    ]


def _model(model: Any) -> PreTrainedModel:
    """Return the Transformers model: the argument itself, or what a wrapper (PEFT, torch.compile) wraps."""
    if not hasattr(model, "modules"):
        refuse_type("model", f"a {type(model).__name__}", "a Transformers model")
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    return refuse_type("model", f"a {type(model).__name__}", "a Transformers model, or one inside a wrapper")


def patch_model(
    model: Any,
    policy: Any = "flashprefill",
    options: Mapping[str, Any] | None = None,
    *,
    guard: Guard | str | None = None,
    math: MathName = "input",
) -> Any:
    """Make a loaded model prefill sparsely. Patching a patched model changes its policy.

    Args:
        model: a Transformers model whose attention goes through AttentionInterface; it is changed in place.
        policy: a policy, a text of one ("sketch(mass=0.9)"), or a mapping from layer to either. In a mapping
            None, or a layer that is missing, means the model's own dense attention; the key "default" stands
            for all layers that are missing, and negative layers count from the end.
        options: with a text: fields of the policy.
        guard: measures how much of the attention the policy keeps, and may act on it, in every sparse layer:
            a :class:`flashprefill.Guard` or a text of one ("repair(target=0.95)"). :func:`collect_stats` has
            what it finds. CPU only: calls of a patched model on a GPU are refused.
        math: "8bit" permits 8-bit products in every sparse layer, as in
            :func:`flashprefill.prefill_attention`.

    Returns:
        The model.
    """
    guard = guard_of(guard)
    math_of(math)
    inner = _model(model)
    layers = attention_layers(inner)
    policies = _by_layer(policy, options, max((layer.layer_idx for layer in layers), default=-1) + 1)
    for own in policies:
        if own is not None:
            own.check_model(inner.config)
    if not type(inner)._can_set_attn_implementation() or not layers:
        refuse("model", f"a {type(inner).__name__}", "one that uses Transformers' AttentionInterface")
    register_transformers()
    before = links_of(inner)
    links = before + copies_of(configs_of(inner), before)
    point(inner, {id(link.original): link.copy for link in links})
    try:
        inner.set_attn_implementation(IMPLEMENTATION)
    except Exception:
        if not before:
            point(inner, {id(link.copy): link.original for link in links})
        raise
    mark(links, IMPLEMENTATION)
    was = {id(link.copy): link.original._attn_implementation for link in links}
    for module in inner.modules():
        if isinstance(module, PreTrainedModel):
            setattr(module, RECORD, links)
        number = getattr(module, "layer_idx", None)
        if isinstance(number, int) or hasattr(module, "is_causal"):
            name = was.get(id(getattr(module, "config", None)))
            eager = name == "eager" if name in ("eager", "sdpa") else not supports_sdpa(module)
            # Attention without a number is a vision tower's, or the like: left as it is.
            policy_here = policies[number] if isinstance(number, int) else None
            guard_here = None if guard is None or not isinstance(number, int) else guard.at_layer(number)
            setattr(module, ATTRIBUTE, Layer(policy_here, eager, guard_here, math))
    _warn_if_useless(inner, layers)
    return model


def _why_never(layer: Any) -> str:
    """Return why no call of a layer can be sparse, as far as its code says, or nothing."""
    code = getattr(inspect.unwrap(type(layer).forward), "__code__", None)
    if code is None:
        return ""
    if "ALL_ATTENTION_FUNCTIONS" not in code.co_names:
        return "they are no attention layers, or do not call Transformers' AttentionInterface"
    if not getattr(layer, "is_causal", True):
        return "their attention is not causal"
    return "they add a position bias to the scores" if "position_bias" in code.co_varnames else ""


def _warn_if_useless(model: PreTrainedModel, layers: list[Any]) -> None:
    """Warn of a model that has no layer which could run sparse."""
    reasons = [_why_never(layer) for layer in layers]
    if all(reasons):
        warnings.warn(
            f"flashprefill: no layer of {type(model).__name__} can run sparse, and the model stays as it "
            f"was: {'; '.join(sorted(set(reasons)))}",
            FlashPrefillWarning,
            stacklevel=stack_level(),
        )


def unpatch_model(model: Any) -> Any:
    """Undo patch_model: every layer and config is again what it was before the first patch.

    Args:
        model: a model that patch_model has patched.

    Returns:
        The model.
    """
    inner = _model(model)
    links = links_of(inner)
    if not links:
        refuse("model", f"a {type(inner).__name__} that is not patched", "one that patch_model has patched")
    for link in links:
        write_back(link)
    point(inner, {id(link.copy): link.original for link in links})
    for module in inner.modules():
        for name in (ATTRIBUTE, RECORD):
            if name in vars(module):
                delattr(module, name)
    return model
