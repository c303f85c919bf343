"""Checks of the verbs' arguments that are neither tensors nor lengths, and the tensors that verbs write."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._layout import Layout, check_bool
from .errors import refuse, refuse_type, shown


def _scale(softmax_scale: Any, q: Any) -> float:
    if softmax_scale is None:
        return float(q.shape[-1]) ** -0.5 if q.shape[-1] else 1.0
    if isinstance(softmax_scale, float):
        return softmax_scale
    if isinstance(softmax_scale, (bool, str)) or not hasattr(softmax_scale, "__float__"):
        refuse_type("softmax_scale", shown(softmax_scale), "a number")
    return float(softmax_scale)


def final_chunk_of(final_chunk: Any, batch: int) -> list[bool]:
    """Return which sequences end their prompts: one bool for all, or one each."""
    if isinstance(final_chunk, (bool, np.bool_)):
        return [bool(final_chunk)]
    if not hasattr(final_chunk, "__len__") or isinstance(final_chunk, str):
        refuse_type("final_chunk", shown(final_chunk), "True or False, or one of them for each sequence")
    chunks = [bool(chunk) for chunk in final_chunk]
    if len(chunks) != batch:
        refuse("final_chunk", f"a list of {len(chunks)}", f"one bool for each of {batch} sequences")
    return chunks or [True]


def _threads(threads: Any) -> int:
    if threads is None:
        return -1
    if isinstance(threads, bool) or not hasattr(threads, "__index__"):
        refuse_type("threads", shown(threads), "an integer or None")
    if not 0 <= int(threads) <= 4096:
        refuse("threads", threads, "from 0 (as many as OpenMP would use) to 4096")
    return int(threads)


def _name(argument: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        refuse_type(argument, shown(value), "a string or None")
    return value


_MATH = {"input": 0, "8bit": 1}  # fp_math


def math_of(math: Any) -> int:
    """Return the number of the products that an argument permits."""
    if not isinstance(math, str):
        refuse_type("math", repr(math), 'a string: "input" or "8bit"')
    if math not in _MATH:
        refuse("math", repr(math), '"input" or "8bit"')
    return _MATH[math]


def shared_of(
    q: Any,
    layout: Layout,
    softmax_scale: Any,
    threads: Any,
    backend: Any,
    target: Any,
    math: Any = "input",
    k_scale: Any = None,
    v_scale: Any = None,
) -> dict[str, Any]:
    """Return the arguments that all verbs take, checked, by their names in _calls.py."""
    return {
        **layout.arguments(),
        "k_scale": k_scale,
        "v_scale": v_scale,
        "softmax_scale": _scale(softmax_scale, q),
        "threads": _threads(threads),
        "backend": _name("backend", backend),
        "target": _name("target", target),
        "math": math_of(math),
    }


def scale_of(ops: Any, name: str, x: Any, scales: dict[str, Any], batch: int, kv_heads: int) -> Any:
    """Return the scales of FP8 q, k or v, fp32 [batch, kv_heads], or None where none is given.

    Args:
        ops: the array library.
        name: the tensor's.
        x: the tensor.
        scales: what is given, by the names that it may have.
        batch: sequences.
        kv_heads: KV heads.
    """
    given = {spelling: scale for spelling, scale in scales.items() if scale is not None}
    if not given:
        return None
    if len(given) > 1:
        first, second = given
        refuse(second, "given", f"None where {first} is: they are one")
    (spelling, scale), *_ = given.items()
    if not ops.is_fp8(x):
        refuse(spelling, "given", f"None where {name} is {x.dtype}: it is the scale of float8_e4m3fn")
    scale = ops.scales(spelling, scale, x)
    shape = tuple(scale.shape)
    if len(shape) > 2 or any(
        n not in (1, most) for n, most in zip(shape[::-1], (kv_heads, batch), strict=False)
    ):
        wanted = f"one number, ({kv_heads},) for the KV heads or {(batch, kv_heads)}"
        refuse(f"{spelling}.shape", shape, wanted)
    return ops.spread(scale, (batch, kv_heads))


def scaled(
    ops: Any, tensors: tuple[Any, Any, Any, Any], layout: Layout, scales: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Return the queries, their FP8 scale applied, and the scales of FP8 keys and values by their names.

    Args:
        ops: the array library.
        tensors: the queries as given, in a dtype that the library reads, the keys and the values (or None).
        layout: the layout of the batch.
        scales: those that the verbs take, by name.
    """
    given, q, k, v = tensors
    if not [name for name, scale in scales.items() if scale is not None]:
        return q, {}
    kv_heads = k.shape[-2]

    def of(name: str, x: Any, *spellings: str) -> Any:
        named = {spelling: scales[spelling] for spelling in spellings}
        return scale_of(ops, name, x, named, layout.batch, kv_heads)

    factor = of("q", given, "q_descale")
    if factor is not None:
        q = ops.scaled_queries(q, ops.repeated(factor, q.shape[-2] // kv_heads), layout.cu_seqlens_q)
    found = {"k_scale": of("k", k, "k_scale", "k_descale")}
    if v is not None:
        found["v_scale"] = of("v", v, "v_scale", "v_descale")
    return q, found


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
