"""Sparse attention for the prefill of long prompts.

    import flashprefill as fp
    out = fp.prefill_attention(q, k, v, fp.FlashPrefill(alpha=0.12))  # NumPy or torch

For every head and every tile of queries a policy finds, in one cheap pass, the blocks of keys that matter
(``select``); then exact softmax attention is computed over just those (``attend``). ``prefill_attention``
does both.

Importing the package needs NumPy only; torch and Transformers are imported when they are used.
"""

from __future__ import annotations

from ._engine import Timings, collect_timings
from .api import attend, prefill_attention, select
from .errors import (
    ArgumentTypeError,
    DeviceError,
    FlashPrefillError,
    InternalError,
    InvalidArgumentError,
    OutOfMemoryError,
    UnsupportedError,
)
from .info import Backend, backends, library_path, library_version, thread_runtime
from .mask import BlockMask
from .policies import Dense, FlashPrefill, Policy, Sketch, Streaming
from .stats import Stats

__version__ = "0.1.0"

__all__ = [
    "ArgumentTypeError",
    "Backend",
    "BlockMask",
    "Dense",
    "DeviceError",
    "FlashPrefill",
    "FlashPrefillError",
    "InternalError",
    "InvalidArgumentError",
    "OutOfMemoryError",
    "Policy",
    "Sketch",
    "Stats",
    "Streaming",
    "Timings",
    "UnsupportedError",
    "__version__",
    "attend",
    "backends",
    "collect_timings",
    "library_path",
    "library_version",
    "prefill_attention",
    "select",
    "thread_runtime",
]
