"""What the methods' authors publish for models, and how a model, a config or a name tells its family.

A row is a family's name, the values and where they come from. Names are compared as a hub id is read:
"meta-llama/Llama-3.1-8B-Instruct" is of the family "llama-3.1".
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from ..errors import refuse, refuse_type


class Preset(NamedTuple):
    """Published values of a policy's fields, and who published them for what."""

    values: dict[str, Any]
    source: str


def _flashprefill(alpha: float, model: str) -> Preset:
    return Preset({"alpha": alpha}, f"alpha of FlashPrefill's evaluation scripts for {model}")


def _flexprefill(gamma: float, model: str) -> Preset:
    fields = {"gamma": gamma, "tau": 0.1, "min_budget": 1024}
    return Preset(fields, f"gamma, tau and min_budget of FlexPrefill's scripts for {model}")


# By a policy's name and a family of models.
PRESETS: dict[str, dict[str, Preset]] = {
    "flashprefill": {
        "llama-3.1": _flashprefill(0.18, "Llama-3.1-8B"),
        "qwen2": _flashprefill(0.08, "Qwen2-7B"),
        "qwen2.5": _flashprefill(0.08, "Qwen2.5-7B"),
        "qwen2.5-vl": _flashprefill(0.10, "Qwen2.5-VL"),
        "qwen3-30b": _flashprefill(0.12, "Qwen3-30B-A3B"),
        "qwen3-moe": _flashprefill(0.12, "Qwen3-30B-A3B"),
        "qwen3-vl-30b": _flashprefill(0.22, "Qwen3-VL-30B-A3B"),
    },
    "flexprefill": {
        "llama-3.1": _flexprefill(0.95, "Llama-3.1-8B-Instruct"),
        "glm-4": _flexprefill(0.95, "GLM-4-9B-Chat-1M"),
        "qwen2": _flexprefill(0.9, "Qwen2-7B"),
        "yi-9b-200k": _flexprefill(0.9, "Yi-9B-200K"),
    },
    "xattention": {
        "llama-3.1": Preset(
            {"threshold": 0.9, "stride": 8},
            "threshold and stride of XAttention's paper for Llama-3.1-8B-Instruct, one threshold for all "
            "heads (its table by layer and head is in the authors' repository: XAttention.from_config)",
        ),
        "qwen2-vl": Preset(
            {"threshold": 0.9, "stride": 16},
            "threshold and stride of XAttention's paper for Qwen2-VL-7B-Instruct (Table 3)",
        ),
    },
    "tokensparse": {
        "llama-3.1": Preset(
            {"coverage": 0.005, "layers": tuple(range(15, 31))},
            "coverage and layers of Token Sparse Attention for Llama-3.1-8B-Instruct",
        ),
        "mistral-nemo": Preset(
            {"coverage": 0.008, "layers": (14, 15, *range(20, 38))},
            "coverage and layers of Token Sparse Attention for Mistral-Nemo-12B-Instruct",
        ),
    },
    "minference": {
        "llama-3.1": Preset(
            {"vertical": 512, "slash": 2048},
            "MInference's second table for Llama-3.1-8B, one pair of numbers for all heads",
        ),
    },
}

# Parts of names that make another family: models that see, and GLM-4's second generation.
_MARKS = ("-vl", "-0414")


def _plain(name: str) -> str:
    """Return a name as it is compared: without its owner, in small letters, "llama-3.1" as "llama3.1"."""
    last = name.strip().rstrip("/").rsplit("/", 1)[-1].lower().replace("_", "-")
    return re.sub(r"(llama|qwen|glm|yi)-(?=\d)", r"\1", last)


def _by_name(name: str, families: Iterable[str]) -> str | None:
    """Return the family that a name holds, the longest if several."""
    text, found = _plain(name), []
    for family in families:
        plain = _plain(family)
        same = all((mark in text) == (mark in plain) for mark in _MARKS)
        if same and re.search(rf"(^|[-.]){re.escape(plain)}($|-)", text):
            found.append(family)
    return max(found, key=len, default=None)


def _number(config: Any, *names: str) -> int:
    return next((int(value) for name in names if (value := getattr(config, name, None))), 0)


def _by_config(config: Any) -> tuple[str, ...]:
    """Return the families that a config's type and sizes name, without the name of its model."""
    kind = str(getattr(config, "model_type", ""))
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if kind == "llama":  # 3.1 stretches its rotary base by 8, 3.2 by 32
        stretched = rope.get("rope_type") == "llama3" and rope.get("factor") == 8.0
        return ("llama-3.1",) if stretched else ()
    if kind in ("glm", "chatglm"):  # earlier ChatGLMs have 65,024 tokens
        return ("glm-4",) if _number(config, "vocab_size", "padded_vocab_size") > 150_000 else ()
    return {
        "qwen2": ("qwen2", "qwen2.5"),
        "qwen2_vl": ("qwen2-vl",),
        "qwen2_5_vl": ("qwen2.5-vl",),
        "qwen3_moe": ("qwen3-moe",),
        "qwen3_vl_moe": ("qwen3-vl-30b",),
    }.get(kind, ())


def preset_of(method: str, model: Any) -> Preset:
    """Return what a method's authors publish for a model.

    Args:
        method: a policy's name.
        model: a family's name, a hub id, a folder of a model, a config, or a model that has one.

    Raises:
        InvalidArgumentError: nothing is published for it; the message lists the families that have values.
    """
    known = PRESETS.get(method, {})
    if not known:
        refuse("model", _shown(model), f"left to the defaults: nothing is published for {method} by model")
    if isinstance(model, str) or hasattr(model, "__fspath__"):
        text = str(model)
        family = _by_name(text, known)
        for config_type in () if family else _by_config_type(text):
            family = family or (config_type if config_type in known else None)
    else:
        config = getattr(model, "config", model)
        if not hasattr(config, "model_type"):
            refuse_type(
                "model", f"a {type(model).__name__}", "a model, a config, a hub id or a family's name"
            )
        family = _by_name(str(getattr(config, "_name_or_path", "") or ""), known)
        for each in () if family else _by_config(config):
            family = family or (each if each in known else None)
    if family is None:
        refuse("model", _shown(model), f"of a family with published values: {', '.join(sorted(known))}")
    return known[family]


_TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_moe", "qwen3_vl_moe")  # each is one family's alone


def _by_config_type(text: str) -> tuple[str, ...]:
    """Return the families of a config's type, where that alone tells."""
    return _by_config(_Typed(text)) if text in _TYPES else ()


class _Typed(NamedTuple):
    """A config of which only the type is known."""

    model_type: str


def _shown(model: Any) -> str:
    """Return a model in a few words."""
    if isinstance(model, str):
        return repr(model)
    config = getattr(model, "config", model)
    name = getattr(config, "_name_or_path", "") or getattr(config, "model_type", "")
    return f"a {type(model).__name__}" + (f" of {name!r}" if name else "")
