"""Checks of the verbs' arguments that are neither tensors nor lengths, and the tensors that verbs write."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._layout import Layout, check_bool
from .errors import refuse, refuse_type


def _scale(softmax_scale: Any, q: Any) -> float:
    if softmax_scale is None:
        return float(q.shape[-1]) ** -0.5 if q.shape[-1] else 1.0
    if isinstance(softmax_scale, float):
        return softmax_scale
    if isinstance(softmax_scale, (bool, str)) or not hasattr(softmax_scale, "__float__"):
        refuse_type("softmax_scale", repr(softmax_scale), "a number")
    return float(softmax_scale)


def final_chunk_of(final_chunk: Any, batch: int) -> list[bool]:
    """Return which sequences end their prompts: one bool for all, or one each."""
    if isinstance(final_chunk, (bool, np.bool_)):
        return [bool(final_chunk)]
    if not hasattr(final_chunk, "__len__") or isinstance(final_chunk, str):
        refuse_type("final_chunk", repr(final_chunk), "True or False, or one of them for each sequence")
    chunks = [bool(chunk) for chunk in final_chunk]
    if len(chunks) != batch:
        refuse("final_chunk", f"a list of {len(chunks)}", f"one bool for each of {batch} sequences")
    return chunks or [True]


def _threads(threads: Any) -> int:
    if threads is None:
        return -1
    if isinstance(threads, bool) or not hasattr(threads, "__index__"):
        refuse_type("threads", repr(threads), "an integer or None")
    if not 0 <= int(threads) <= 4096:
        refuse("threads", threads, "from 0 (as many as OpenMP would use) to 4096")
    return int(threads)


def _name(argument: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        refuse_type(argument, repr(value), "a string or None")
    return value


def shared_of(
    q: Any, layout: Layout, softmax_scale: Any, threads: Any, backend: Any, target: Any
) -> dict[str, Any]:
    """Return the arguments that all verbs take, checked, by their names in _calls.py."""
    return {
        **layout.arguments(),
        "softmax_scale": _scale(softmax_scale, q),
        "threads": _threads(threads),
        "backend": _name("backend", backend),
        "target": _name("target", target),
    }


def results_of(ops: Any, q: Any, out: Any, return_lse: bool) -> tuple[Any, Any]:
    """Return the outputs, out and lse; new ones unless given."""
    check_bool("return_lse", return_lse)
    if out is None:
        out = ops.empty_like(q)
    else:
        ops.check("out", out, q)
        if out.dtype != q.dtype:
            refuse_type("out.dtype", out.dtype, f"q's ({q.dtype})")
        if out.shape != q.shape:
            refuse("out.shape", tuple(out.shape), f"q's ({tuple(q.shape)})")
        ops.check_out("out", out)
    lse = None
    if return_lse:
        batch = (q.shape[0],) if len(q.shape) == 4 else ()
        lse = ops.empty_float(q, (*batch, q.shape[-2], q.shape[-3]))
    return out, lse
