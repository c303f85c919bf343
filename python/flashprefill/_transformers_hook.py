"""Registers ``attn_implementation="flashprefill"``, whichever package is imported first.

``import flashprefill`` must stay light: no torch, no Transformers. So if Transformers' models are not there
yet, a finder is put before Python's own which waits for one module name, lets Python import it as always,
and registers afterwards.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

__all__ = ["install"]

_MODULE = "transformers.modeling_utils"  # when it is there, so are models and the interface to register with


def _register() -> None:
    """Register. If this version of Transformers does not fit, say so without breaking its import."""
    try:
        from .transformers.register import register_transformers

        register_transformers()
    except (ImportError, AttributeError) as error:
        warnings.warn(f"flashprefill could not register itself with Transformers: {error}", stacklevel=2)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Register now if Transformers' models are imported already, else as soon as they are."""
    if _MODULE in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
