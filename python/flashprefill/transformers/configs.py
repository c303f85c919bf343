"""A patched model's own configs.

Transformers reads the name of a model's attention from its config, and several models may have one config
object: a model and its dense twin, an assistant, a reference model. So a patched model gets copies of its
configs, and the name is written into those. A copy's name is a :class:`PatchedName`: a string like any other
that knows its :class:`Link`, the config that it was copied from. It goes with the config wherever that goes,
so a model that is made from a patched model's config finds back to the config that was never patched.

What is changed in a copy while the model is patched (``use_cache``, ``vocab_size``) is changed in the
original when the model is unpatched.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

RECORD = "_flashprefill_before"  # of a patched model and the models inside it: a list of Link
_NAME = "_attn_implementation_internal"  # where a config has the name of its attention


@dataclass(eq=False)
class Link:
    """A config of a patched model, and the one that it stands for."""

    original: Any
    copy: Any
    at_copy: dict[str, Any]  # the fields that both had


class PatchedName(str):
    """The name of an attention implementation, in a config that patch_model made."""

    link: Link


def configs_of(model: PreTrainedModel) -> list[Any]:
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


def links_of(model: PreTrainedModel) -> list[Link]:
    """Return the links of a model and of the models inside it, each once."""
    found = {id(link): link for module in model.modules() for link in getattr(module, RECORD, ())}
    return list(found.values())


def copies_of(configs: list[Any], known: Iterable[Link]) -> list[Link]:
    """Copy configs, except those for which there is a link already. What was one object is one copy."""
    memo: dict[int, Any] = {id(link.original): link.copy for link in known}
    memo.update({id(link.copy): link.copy for link in known})
    new = [config for config in configs if id(config) not in memo]
    return [Link(config, copy.deepcopy(config, memo), _fields(config)) for config in new]


def point(model: PreTrainedModel, configs: dict[int, Any]) -> None:
    """Exchange the configs that modules hold: a table from a config's id to the one in its place."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, PreTrainedConfig) and id(value) in configs:
                vars(module)[name] = configs[id(value)]


def mark(links: list[Link], name: str) -> None:
    """Make the name in patched configs one that knows where its config comes from."""
    for link in links:
        if getattr(link.copy, _NAME, None) == name:
            marked = PatchedName(name)
            marked.link = link
            setattr(link.copy, _NAME, marked)


def write_back(link: Link) -> None:
    """Change in the original what has been changed in the copy."""
    now = _fields(link.copy)
    for name, value in now.items():
        if name not in link.at_copy or _differ(link.at_copy[name], value):
            vars(link.original)[name] = value
    for name in link.at_copy.keys() - now.keys():
        vars(link.original).pop(name, None)


def is_patched(config: Any) -> bool:
    """Return whether a config is one that patch_model made."""
    return isinstance(getattr(config, _NAME, None), PatchedName)


def leave_patched_configs(model: PreTrainedModel) -> None:
    """Give a model that was made from a patched model's configs the ones that were never patched."""
    links = [getattr(config, _NAME).link for config in configs_of(model) if is_patched(config)]
    if links:
        for link in links:
            write_back(link)
        point(model, {id(link.copy): link.original for link in links})


def _fields(config: Any) -> dict[str, Any]:
    """Return a copy of what a config says itself: neither its attention's name nor the configs inside it."""
    return {
        name: copy.deepcopy(value)
        for name, value in vars(config).items()
        if name != _NAME and not isinstance(value, PreTrainedConfig)
    }


def _differ(a: Any, b: Any) -> bool:
    try:
        return bool(a != b)
    except (TypeError, ValueError, RuntimeError):  # arrays
        return True
