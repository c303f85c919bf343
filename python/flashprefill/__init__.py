"""Sparse attention for the prefill of long prompts.

    import flashprefill as fp
    q, k, v = fp.example_inputs(8192)  # or your own: NumPy or torch, [tokens, heads, head_dim]
    out = fp.prefill_attention(q, k, v, fp.FlashPrefill(alpha=0.12))

For every head and every tile of queries a policy finds, in one cheap pass, the blocks of keys that matter
(``select``); then exact softmax attention is computed over just those (``attend``). ``prefill_attention``
does both.

Importing the package needs NumPy only; torch and Transformers are imported when they are used.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from . import _transformers_hook, policies
from ._timings import Timings, collect_timings
from .api import attend, prefill_attention, select
from .audit import audit
from .errors import (
    ArgumentTypeError,
    DeviceError,
    FlashPrefillError,
    InternalError,
    InvalidArgumentError,
    OutOfMemoryError,
    UnsupportedError,
)
from .examples import example_inputs
from .guard import Guard, GuardReport, GuardState
from .info import Backend, backends, library_path, library_version, thread_runtime
from .mask import BlockMask
from .policies import *  # noqa: F403
from .stats import Stats

if TYPE_CHECKING:
    from . import distributed as distributed
    from .transformers import collect_stats as collect_stats
    from .transformers import patch_model as patch_model
    from .transformers import register_transformers as register_transformers
    from .transformers import unpatch_model as unpatch_model

__version__ = "0.1.0"

__all__ = [
    "ArgumentTypeError",
    "Backend",
    "BlockMask",
    "DeviceError",
    "FlashPrefillError",
    "Guard",
    "GuardReport",
    "GuardState",
    "InternalError",
    "InvalidArgumentError",
    "OutOfMemoryError",
    "Stats",
    "Timings",
    "UnsupportedError",
    "__version__",
    "attend",
    "audit",
    "backends",
    "collect_timings",
    "example_inputs",
    "library_path",
    "library_version",
    "prefill_attention",
    "select",
    "thread_runtime",
]
__all__ += policies.__all__

# Not in __all__: `from flashprefill import *` must not need torch.
_TRANSFORMERS = ("collect_stats", "patch_model", "register_transformers", "unpatch_model")


def __getattr__(name: str) -> Any:
    """Import what needs torch and Transformers when it is asked for."""
    if name == "distributed":
        return import_module(".distributed", __name__)
    if name in _TRANSFORMERS:
        missing = [module for module in ("torch", "transformers") if find_spec(module) is None]
        if missing:
            needs = " ".join(missing)
            message = f"{name} needs {needs}: pip install {needs}"
            raise ModuleNotFoundError(message, name=missing[0]) from None
        from . import transformers

        return getattr(transformers, name)
    raise AttributeError(f"module 'flashprefill' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_TRANSFORMERS, "distributed"})


_transformers_hook.install()
