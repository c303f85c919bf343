"""Policies written as text: ``flashprefill(alpha=0.2)``, ``sketch``, ``my_module:my_function``.

The text is read as a Python call but never run: only a known name and keyword arguments that are plain
numbers, booleans, None, strings or tuples get through. "module:function" imports a function for
:class:`MaskPolicy`. Wherever the package takes a policy it takes such a text.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..errors import ArgumentTypeError, FlashPrefillError, InvalidArgumentError, refuse_type, shown
from .base import Policy
from .library import FIELDS
from .mask_policy import MaskPolicy
from .reuse import Reuse
from .streaming import Streaming
from .token_sparse import TokenSparse


def named() -> dict[str, type[Policy]]:
    """Return the policies that the library selects for, by name."""
    kinds = {kind.kind: kind for kind in Policy.__subclasses__()}
    return {name: kinds[name] for name in FIELDS if name in kinds}


_SHAPES: dict[str, Callable[..., Policy]] = {"ashape": Streaming.a_shape, "trishape": Streaming.tri_shape}
_TOKENS = {"ashape": ("n_init", "n_local"), "trishape": ("n_init", "n_local", "n_last")}


def parse(text: str, options: Mapping[str, Any] | None = None) -> Policy:
    """Return the policy that a text describes.

    Args:
        text: a policy's name in any case and spelling ("flex_prefill"), or "module:function"; with or without
            fields in brackets.
        options: more fields.

    Raises:
        InvalidArgumentError, ArgumentTypeError: the text cannot be read, a field is unknown, wrong or
            missing, or a file that it names cannot be opened. The message is one line.
    """
    try:
        name, fields = _read(text)
        return make(name, {**fields, **(options or {})})
    except FlashPrefillError as error:
        raise type(error)(f"policy {text!r}: {error}") from None
    except OSError as error:
        raise InvalidArgumentError(f"policy {text!r}: {error.filename!r}: {error.strerror}") from None


def make(name: str, fields: Mapping[str, Any]) -> Policy:
    """Return the policy of a name with these fields. Raises as `parse` does."""
    if ":" in name:
        _check_names("MaskPolicy", fields, MaskPolicy._names()[1:])
        return MaskPolicy(name, **fields)  # type: ignore[arg-type]
    known, plain = named(), name.lower().replace("-", "").replace("_", "")
    if plain in _SHAPES:
        _check_names(name, fields, [*_TOKENS[plain], *Streaming._names()])
        return _SHAPES[plain](**fields)
    for wrapper in (Reuse, TokenSparse):
        if plain == wrapper.kind:
            _check_names(name, fields, wrapper._names())
            _check_given(wrapper, fields)
            return wrapper(**fields)
    if plain not in known:
        names = ", ".join([*known, *_SHAPES, Reuse.kind, TokenSparse.kind])
        raise InvalidArgumentError(f"the name must be one of {names}, or module:function")
    fields = known[plain].own_names(fields)
    _check_names(name, fields, [*known[plain]._extra_names, *(field.name for field in known[plain]._fields)])
    return known[plain](**fields)


def policy_of(value: Any, argument: str = "policy") -> Policy:
    """Return a policy or the one that a text describes; refuse all else."""
    if isinstance(value, str):
        return _parsed(value)
    if isinstance(value, type) and issubclass(value, Policy):
        refuse_type(argument, f"the class {value.__name__}", f"called: flashprefill.{value.__name__}()")
    if not isinstance(value, Policy):
        refuse_type(argument, shown(value), "a policy, such as flashprefill.FlashPrefill(), or a text of one")
    return value


@functools.lru_cache(maxsize=256)
def _parsed(text: str) -> Policy:
    return parse(text)


def _check_names(name: str, given: Iterable[str], known: list[str]) -> None:
    for field in given:
        if field not in known:
            raise ArgumentTypeError(f"{field} is unknown; {name} takes {', '.join(known)}")


def _check_given(kind: Any, given: Mapping[str, Any]) -> None:
    """Refuse fields of which one is missing that has no default."""
    for field in dataclasses.fields(kind):
        if field.default is field.default_factory is dataclasses.MISSING and field.name not in given:
            raise ArgumentTypeError(f"{field.name} is missing; {kind.kind} needs it")


def _read(text: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the fields of a text."""
    function, bracket, rest = text.strip().partition("(")
    text = function.replace("-", "_") + bracket + rest  # "tri-shape" is a name too
    if ":" in function:  # no name in Python's grammar
        return function.strip(), _read("function" + bracket + rest)[1]
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):  # the last two: brackets in brackets
        tree = None
    name, keywords = (tree.func, tree.keywords) if isinstance(tree, ast.Call) else (tree, [])
    if not isinstance(name, ast.Name):
        raise InvalidArgumentError("write a name with or without arguments, like flashprefill(alpha=0.2)")
    if isinstance(tree, ast.Call) and tree.args:
        raise InvalidArgumentError("arguments are given by name, like alpha=0.2")
    fields: dict[str, Any] = {}
    for keyword in keywords:
        if keyword.arg is None:
            raise InvalidArgumentError("arguments are given by name, like alpha=0.2")
        try:
            nested = keyword.arg == "inner" and isinstance(keyword.value, ast.Call)  # a policy inside of one
            fields[keyword.arg] = ast.unparse(keyword.value) if nested else _value(keyword.value)
        except (ValueError, TypeError, MemoryError, RecursionError):
            raise InvalidArgumentError(f"{keyword.arg} must be a plain value") from None
    return name.id, fields


def _value(node: ast.expr) -> Any:
    """Return a value: a Python literal, or a word as the library writes it (true, none, both)."""
    if isinstance(node, ast.Name):
        return _WORDS.get(node.id.lower(), node.id)
    if isinstance(node, (ast.List, ast.Tuple)):
        return tuple(_value(each) for each in node.elts)
    return ast.literal_eval(node)


_WORDS = {"true": True, "false": False, "none": None, "nan": None}
