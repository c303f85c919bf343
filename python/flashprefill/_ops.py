"""The array library of an argument: NumPy or torch."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _numpy_ops
from .errors import refuse_type

_LOADED: dict[str, Any] = {}  # an import statement takes 1 us per call even where all is imported


def ops_of(name: str, x: Any, what: str = "a NumPy array or a torch tensor") -> Any:
    """Return _numpy_ops or torch_op. torch is imported only when a torch tensor comes in."""
    if isinstance(x, np.ndarray):
        return _numpy_ops
    if hasattr(x, "data_ptr") and hasattr(x, "requires_grad"):
        if "torch" not in _LOADED:
            from . import torch_op

            _LOADED["torch"] = torch_op
        return _LOADED["torch"]
    return refuse_type(name, f"a {type(x).__name__}", what)
