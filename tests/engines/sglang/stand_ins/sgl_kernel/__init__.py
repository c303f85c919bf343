"""Stands in for SGLang's kernels on a CPU that has none: its names can be imported, and say so when called.

The package on PyPI is for CUDA alone, and its CPU counterpart is not published. On this path SGLang computes
with torch's own operators; it imports names from here, and calls none of them for the models of these tests.
"""

from __future__ import annotations

from typing import Any, NoReturn

__version__ = "0.0.0"


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*arguments: Any, **keywords: Any) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name}: there are no kernels here")

    absent.__name__ = name
    return absent
