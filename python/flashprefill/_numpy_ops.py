"""What the verbs need from an array library, for NumPy. torch_op.py has the same functions for torch.

api.py picks one of the two modules by the type of ``q``, and is otherwise independent of the array library.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from . import _engine
from .errors import refuse, refuse_type

NAME = "a NumPy array"
_DTYPES = ("float32", "float16", "bfloat16")  # bfloat16 is that of ml_dtypes
_FP8 = "float8_e4m3fn"  # the same

select = _engine.select
attend = _engine.attend
prefill = _engine.prefill
audit = _engine.audit


def in_python(function: Any, *arguments: Any) -> Any:
    """Call a function. torch's counterpart keeps torch.compile out of it."""
    return function(*arguments)


def tracing() -> bool:
    """Return whether sizes may be symbols, which comparing would bind."""
    return False


@functools.cache
def _name(dtype: Any) -> str:
    """Return a dtype's name. Kept, since NumPy takes 2 us to find it."""
    return str(dtype.name)


@functools.cache
def _is_known(dtype: Any) -> bool:
    """Return whether the library has a dtype."""
    return dtype.name in _DTYPES and dtype.isnative


def is_fp8(x: Any) -> bool:
    """Return whether x is of the FP8 that keys and values may be stored in."""
    return isinstance(x, np.ndarray) and _name(x.dtype) == _FP8


def widened(q: Any) -> Any:
    """Return FP8 queries in bf16, which holds them exactly."""
    return q.astype("bfloat16")


def scaled_queries(q: Any, scale: Any, cu_seqlens_q: Any) -> Any:
    """Return q times the scale [batch, heads] of its sequence and head, in q's dtype."""
    if cu_seqlens_q is not None:
        factor = np.repeat(scale, np.diff(cu_seqlens_q), axis=0)[:, :, None]
    else:
        factor = scale[:, None, :, None] if q.ndim == 4 else scale[0][:, None]
    return (q.astype(np.float32) * factor).astype(q.dtype)


def scales(name: str, x: Any, like: Any) -> Any:
    """Return scales as fp32."""
    try:
        return np.asarray(x, dtype=np.float32)
    except (TypeError, ValueError):
        return refuse_type(name, f"a {type(x).__name__}", "a number or an array of numbers")


def spread(x: Any, shape: tuple[int, ...]) -> Any:
    """Return a view of x in a shape that it can be repeated to."""
    return np.broadcast_to(x, shape)


def repeated(x: Any, count: int) -> Any:
    """Repeat each column."""
    return np.repeat(x, count, axis=1)


def check(name: str, x: Any, like: Any) -> None:
    """Refuse what is not a tensor that the library can read."""
    if not isinstance(x, np.ndarray):
        refuse_type(name, f"a {type(x).__name__}", f"{NAME}, as q is")
    if not _is_known(x.dtype) and not (name in ("k", "v") and is_fp8(x)):
        more = f", or {_FP8} for keys and values" if "float8" in x.dtype.name else ""
        refuse_type(f"{name}.dtype", x.dtype, f"float32, float16 or bfloat16 (of ml_dtypes){more}")
    flags, size = x.flags, x.itemsize
    if not flags.aligned or not flags.c_contiguous and any([stride % size for stride in x.strides]):
        refuse(f"{name}.strides", x.strides, f"multiples of {size} bytes from an aligned address")


def check_out(name: str, x: np.ndarray) -> None:
    """Refuse an output that can't be written."""
    if not x.flags.writeable:
        refuse(name, "read-only", "writeable")


def index(name: str, x: Any, like: Any, ndim: int) -> np.ndarray:
    """Return lengths or pages as an int32 array."""
    try:
        values = np.asarray(x)
    except (TypeError, ValueError):
        refuse_type(name, f"a {type(x).__name__}", "an array of integers")
    if values.dtype.kind not in "iu" and values.size:
        refuse_type(name, f"an array of {values.dtype}", "an array of integers")
    if values.ndim != ndim:
        refuse(f"{name}.ndim", values.ndim, str(ndim))
    if values.size and not -(2**31) <= int(values.min()) <= int(values.max()) < 2**31:
        refuse(name, f"an array with values from {values.min()} to {values.max()}", "inside int32")
    return np.ascontiguousarray(values, dtype=np.int32)


def copy(x: Any) -> Any:
    """Return a copy that its owner can't change."""
    return x.copy()


def longest(lengths: Any, bound: int) -> int:
    """Return the largest length. `bound`, an upper bound, is for arrays whose values cannot be read."""
    return int(lengths.max()) if lengths.size else 0


def empty_like(q: Any) -> Any:
    """Return a contiguous array of q's shape and dtype."""
    return np.empty(q.shape, q.dtype)


def empty_float(like: Any, shape: tuple[int, ...]) -> Any:
    """Return an fp32 array."""
    return np.empty(shape, np.float32)


def zero_words(like: Any, shape: tuple[int, ...]) -> Any:
    """Return 64-bit words."""
    return np.zeros(shape, np.uint64)


def zero_counts(like: Any, shape: tuple[int, ...]) -> Any:
    """Return 32-bit counts."""
    return np.zeros(shape, np.int32)


def zeros(like: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """Return zeros."""
    return np.zeros(shape, dtype)


def on_gpu(x: Any) -> bool:
    """Return whether an array lies in a GPU's memory."""
    return False


def same_device(x: Any, like: Any) -> bool:
    """Return whether two arrays lie in the same memory."""
    return True


def as_bool(name: str, x: Any) -> Any:
    """Return a dense mask as bool, or refuse it."""
    values = np.asarray(x)
    if values.dtype != np.bool_:
        refuse_type(f"{name}.dtype", values.dtype, "bool")
    return values


def pack(keep: Any, words: int) -> Any:
    """Pack bools [..., blocks] into words [..., words], bit j of word w being block 64 w + j."""
    padded = np.zeros((*keep.shape[:-1], words * 64), np.bool_)
    padded[..., : keep.shape[-1]] = keep
    octets = np.packbits(padded, axis=-1, bitorder="little")
    return octets.view("<u8").astype(np.uint64, copy=False)


def unpack(bits: Any, blocks: int) -> Any:
    """Undo `pack`."""
    octets = np.ascontiguousarray(bits).astype("<u8", copy=False).view(np.uint8)
    return np.unpackbits(octets, axis=-1, bitorder="little", count=blocks).astype(np.bool_)


def visible_before(limits: list[int], blocks: int, like: Any) -> Any:
    """Return bools [tiles, blocks]: whether a block is below its tile's limit."""
    return np.arange(blocks)[None, :] < np.asarray(limits, dtype=np.int64).reshape(-1, 1)


def to_host(x: Any) -> np.ndarray:
    """Return the values as NumPy's."""
    return np.asarray(x)


def from_host(x: np.ndarray, like: Any = None) -> Any:
    """Return host values as this library's."""
    return x


def words_of(bits: np.ndarray) -> Any:
    """Return host words as this library's."""
    return bits.view(np.uint64)


def expand_heads(bits: Any, heads: int) -> Any:
    """Repeat the one head of a mask."""
    return np.ascontiguousarray(np.broadcast_to(bits, (heads, *bits.shape[1:])))
