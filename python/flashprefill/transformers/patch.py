"""patch_model and unpatch_model: which layer of a model has which policy.

A policy sits at the attention layer itself, as one plain attribute, so that a forward looks nothing up,
torch.compile sees a constant, and deep copies of a model keep what they had. What there was before is kept
at the model, to go back to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers.modeling_utils import PreTrainedModel

from ..errors import refuse, refuse_type
from ..policies import Policy
from ..policies.text import parse
from .attention import ATTRIBUTE, Layer
from .fallback import supports_sdpa
from .register import IMPLEMENTATION, register_transformers
from .stats import attention_layers

_RECORD = "_flashprefill_before"  # of a patched model: a list of _Before


@dataclass
class _Before:
    """A config, and the implementation of attention that it had."""

    config: Any
    implementation: str | None


def _policy(value: Any, options: Mapping[str, Any] | None = None) -> Policy | None:
    if isinstance(value, str):
        return parse(value, options)
    if options is not None:
        refuse_type("options", repr(dict(options)), f"None where the policy is not a name but {value!r}")
    if value is not None and not isinstance(value, Policy):
        refuse_type("policy", repr(value), "a policy, a name of one, or a mapping from layers to policies")
    return value


def _by_layer(policy: Any, options: Mapping[str, Any] | None, layers: int) -> list[Policy | None]:
    if not isinstance(policy, Mapping):
        return _at_layers([_policy(policy, options)] * layers)
    if options is not None:
        refuse_type("options", repr(dict(options)), "None where the policy is a mapping")
    result = [_policy(policy.get("default"))] * layers
    for key, value in policy.items():
        if key == "default":
            continue
        if isinstance(key, bool) or not isinstance(key, int):
            refuse_type("a layer of policy", repr(key), 'an integer, or "default"')
        if not -layers <= key < layers:
            refuse("a layer of policy", key, f"from {-layers} to {layers - 1}")
        result[key] = _policy(value)
    return _at_layers(result)


def _at_layers(policies: list[Policy | None]) -> list[Policy | None]:
    return [None if policy is None else policy.at_layer(layer) for layer, policy in enumerate(policies)]


def _configs(model: PreTrainedModel) -> list[Any]:
    """Return every config of a model and of the models inside it, each once."""
    found: dict[int, Any] = {}
    waiting: list[Any] = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    while waiting:
        config = waiting.pop()
        if config is None or id(config) in found:
            continue
        found[id(config)] = config
        waiting += [getattr(config, name, None) for name in config.sub_configs]
    return list(found.values())


def _model(model: Any) -> PreTrainedModel:
    """Return the Transformers model: the argument itself, or what a wrapper (PEFT, torch.compile) wraps."""
    if not hasattr(model, "modules"):
        refuse_type("model", f"a {type(model).__name__}", "a Transformers model")
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    return refuse_type("model", f"a {type(model).__name__}", "a Transformers model, or one inside a wrapper")


def patch_model(model: Any, policy: Any = "flashprefill", options: Mapping[str, Any] | None = None) -> Any:
    """Make a loaded model prefill sparsely. Patching a patched model changes its policy.

    Args:
        model: a Transformers model whose attention goes through AttentionInterface; it is changed in place.
        policy: a policy, a text of one ("sketch(mass=0.9)"), or a mapping from layer to either. In a mapping
            None, or a layer that is missing, means the model's own dense attention; the key "default" stands
            for all layers that are missing, and negative layers count from the end.
        options: with a text: fields of the policy.

    Returns:
        The model.
    """
    inner = _model(model)
    layers = attention_layers(inner)
    policies = _by_layer(policy, options, max((layer.layer_idx for layer in layers), default=-1) + 1)
    if not type(inner)._can_set_attn_implementation() or not layers:
        refuse("model", f"a {type(inner).__name__}", "one that uses Transformers' AttentionInterface")
    register_transformers()
    if not hasattr(inner, _RECORD):
        setattr(inner, _RECORD, [_Before(config, config._attn_implementation) for config in _configs(inner)])
    before = {id(x.config): x.implementation for x in getattr(inner, _RECORD)}
    inner.set_attn_implementation(IMPLEMENTATION)
    for module in inner.modules():
        number = getattr(module, "layer_idx", None)
        if isinstance(number, int) or hasattr(module, "is_causal"):
            was = before.get(id(getattr(module, "config", None)))
            eager = was == "eager" if was in ("eager", "sdpa") else not supports_sdpa(module)
            # Attention without a number is a vision tower's, or the like: left as it is.
            policy_here = policies[number] if isinstance(number, int) else None
            setattr(module, ATTRIBUTE, Layer(policy_here, eager))
    return model


def unpatch_model(model: Any) -> Any:
    """Undo patch_model: every layer and config is again what it was before the first patch.

    Args:
        model: a model that patch_model has patched.

    Returns:
        The model.
    """
    inner = _model(model)
    before = getattr(inner, _RECORD, None)
    if before is None:
        refuse("model", f"a {type(inner).__name__} that is not patched", "one that patch_model has patched")
    for module in inner.modules():
        if hasattr(module, ATTRIBUTE):
            delattr(module, ATTRIBUTE)
    for record in before:
        record.config._attn_implementation_internal = record.implementation
    delattr(inner, _RECORD)
    return model
