"""The C ABI as ctypes sees it: its structs, its functions, and the library itself.

No other module defines a C type. The structs must stay field for field what the header says
(include/flashprefill/flashprefill.h); the library reads ``struct_size`` first, so an older package keeps
working with a newer library. ``ctypes.CDLL`` releases the GIL during each call, so other Python threads run
while attention does.

Where the library is looked for: if the environment variable ``FLASHPREFILL_LIBRARY`` names a path, there and
nowhere else; otherwise in ``flashprefill/lib/`` next to this file (where the wheel puts it), or ``build/`` of
a source checkout. It is read once, at import.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import (
    POINTER,
    Structure,
    byref,
    c_char_p,
    c_double,
    c_float,
    c_int32,
    c_int64,
    c_size_t,
    c_uint32,
    c_uint64,
    c_void_p,
)
from pathlib import Path
from typing import Any, TypeVar

from . import errors

F32, BF16, F16, E4M3 = range(4)
CPU, CUDA = 0, 1
VSPREFILL = 16  # fp_policy_kind
INT, FLOAT, BOOL, CHOICE, INT_TABLE, FLOAT_TABLE = range(6)  # fp_field_type
ALTERNATIVE, DECIDES, ZERO_IS_NONE, ABOVE_LEAST, BELOW_MOST, OPTIONAL = 1, 2, 4, 8, 16, 32  # fp_field_flags
# fp_fallback, and 3, which TokenSparse alone has.
FALLBACK_NAMES = {0: "selected", 1: "short", 2: "dense", 3: "prefix or chunk", -1: "impossible lengths"}


_Struct = TypeVar("_Struct", bound=Structure)


class Tensor(Structure):
    """fp_tensor."""

    _fields_ = [("data", c_void_p), ("dtype", c_int32), ("reserved", c_int32), ("stride", c_int64 * 4)]


class Problem(Structure):
    """fp_problem."""

    _fields_ = [
        ("struct_size", c_uint32),
        ("device", c_int32),
        ("device_index", c_int32),
        ("batch", c_int32),
        ("q_heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("causal", c_int32),
        ("final_chunk", c_int32),
        ("softmax_scale", c_float),
        ("total_q", c_int64),
        ("total_k", c_int64),
        ("max_seqlen_q", c_int64),
        ("max_seqlen_k", c_int64),
        ("q", Tensor),
        ("k", Tensor),
        ("v", Tensor),
        ("cu_seqlens_q", c_void_p),
        ("cu_seqlens_k", c_void_p),
        ("seqused_k", c_void_p),
        ("block_table", c_void_p),
        ("block_table_stride", c_int64),
        ("pages_per_seq", c_int32),
        ("page_size", c_int32),
        ("page_count", c_int64),
        ("final_chunks", c_void_p),
        ("k_scale", c_void_p),
        ("v_scale", c_void_p),
        ("k_scale_stride", c_int64 * 2),
        ("v_scale_stride", c_int64 * 2),
    ]


class Timings(Structure):
    """fp_timings."""

    _fields_ = [("select_seconds", c_double), ("attend_seconds", c_double), ("guard_seconds", c_double)]


class Guard(Structure):
    """fp_guard."""

    _fields_ = [
        ("struct_size", c_uint32),
        ("mode", c_int32),
        ("rows", c_int32),
        ("layer", c_int32),
        ("seed", c_uint64),
        ("target", c_float),
        ("risk", c_float),
        ("levels", c_void_p),
        ("recall", c_void_p),
        ("recall_low", c_void_p),
        ("recall_p05", c_void_p),
        ("rows_audited", c_void_p),
        ("missed_block", c_void_p),
        ("outcome", c_void_p),
        ("certificate", c_void_p),
        ("moments", c_void_p),
    ]


class Exec(Structure):
    """fp_exec."""

    _fields_ = [
        ("struct_size", c_uint32),
        ("threads", c_int32),
        ("backend", c_char_p),
        ("target", c_char_p),
        ("stream", c_void_p),
        ("timings", POINTER(Timings)),
        ("guard", POINTER(Guard)),
        ("math", c_int32),
        ("reserved", c_int32),
    ]


class Policy(Structure):
    """fp_policy, the head of every policy."""

    _fields_ = [
        ("struct_size", c_uint32),
        ("kind", c_int32),
        ("block_size", c_int32),
        ("sink_blocks", c_int32),
        ("window_blocks", c_int32),
        ("dense_tail_blocks", c_int32),
        ("share_heads", c_int32),
        ("mean_correction", c_int32),
    ]


class VSPrefillLogits(Structure):
    """fp_vsprefill_logits."""

    _fields_ = [("of", c_uint64), ("vertical", c_float), ("slash", c_float)]


class VSPrefill(Structure):
    """fp_vsprefill."""

    _fields_ = [
        ("common", Policy),
        ("vertical_mass", c_float),
        ("slash_mass", c_float),
        ("rounding", c_int32),
        ("indexer", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("hidden", c_int32),
        ("reserved", c_int32),
        ("up", c_void_p),
        ("bias", c_void_p),
        ("vertical", c_void_p),
        ("slash", c_void_p),
        ("logits", c_void_p),
        ("logit_tokens", c_int64),
    ]


class PolicyField(Structure):
    """fp_policy_field."""

    _fields_ = [
        ("name", c_char_p),
        ("about", c_char_p),
        ("choices", c_char_p),
        ("initial", c_double),
        ("least", c_double),
        ("most", c_double),
        ("offset", c_size_t),
        ("count_offset", c_size_t),
        ("type", c_int32),
        ("flags", c_int32),
        ("columns", c_int32),
        ("reserved", c_int32),
    ]


class BlockMask(Structure):
    """fp_block_mask."""

    _fields_ = [
        ("struct_size", c_uint32),
        ("heads", c_int32),
        ("tile_tokens", c_int32),
        ("block_size", c_int32),
        ("share_heads", c_int32),
        ("mean_correction", c_int32),
        ("tile_rows", c_int64),
        ("words", c_int64),
        ("bits", c_void_p),
        ("counts", c_void_p),
        ("fallback", c_void_p),
        ("vertical_slash", c_void_p),
        ("max_verticals", c_int32),
        ("max_slashes", c_int32),
        ("key_lists", c_void_p),
        ("segment_rows", c_int64),
        ("segment_tiles", c_int32),
        ("max_keys", c_int32),
        ("skip", c_float),
        ("reserved", c_int32),
        ("skipped", c_void_p),
    ]


class Stats(Structure):
    """fp_stats."""

    _fields_ = [
        ("struct_size", c_uint32),
        ("reserved", c_int32),
        ("kept", c_void_p),
        ("total", c_void_p),
        ("fallback", c_void_p),
        ("overflowed", c_void_p),
        ("skipped", c_void_p),
    ]


class Output(Structure):
    """fp_output."""

    _fields_ = [
        ("struct_size", c_uint32),
        ("reserved", c_int32),
        ("out", Tensor),
        ("lse", c_void_p),
        ("lse_stride", c_int64 * 3),
    ]


def _candidates() -> list[Path]:
    named = os.environ.get("FLASHPREFILL_LIBRARY")
    if named:
        return [Path(named)]
    package = Path(__file__).resolve().parent
    found = sorted((package / "lib").glob("libflashprefill.so*"))
    checkout = package.parents[1]
    if (checkout / "include" / "flashprefill" / "flashprefill.h").is_file():
        found += [
            checkout / "build" / "release" / "libflashprefill.so",
            checkout / "build" / "libflashprefill.so",
        ]
    return found


def _load() -> tuple[ctypes.CDLL, Path]:
    tried = []
    for path in _candidates():
        if not path.exists():
            tried.append(f"{path} (no such file)")
            continue
        try:
            return ctypes.CDLL(str(path)), path
        except OSError as error:
            tried.append(f"{path} ({error})")
    raise ImportError(
        "flashprefill cannot load its library libflashprefill.so; reinstall the package (pip install .), or "
        "build it with CMake and set FLASHPREFILL_LIBRARY to the path of libflashprefill.so. Tried: "
        + ("; ".join(tried) or f"{Path(__file__).resolve().parent / 'lib'} (empty)")
    )


lib, library_path = _load()


def _declare(name: str, result: Any, *arguments: Any) -> None:
    function = getattr(lib, name)
    function.restype = result
    function.argtypes = arguments


_PROBLEM, _EXEC, _MASK, _OUTPUT = POINTER(Problem), POINTER(Exec), POINTER(BlockMask), POINTER(Output)
_POLICY = c_void_p  # a pointer to any policy's struct
_SIZE = POINTER(c_size_t)
_declare("fp_last_error", c_char_p)
_declare("fp_version", c_char_p)
_declare("fp_policy_init", c_int32, c_int32, c_void_p, c_size_t)
_declare("fp_policy_name", c_char_p, c_int32, POINTER(c_int32))
_declare("fp_policy_field_at", c_int32, c_int32, c_int32, POINTER(PolicyField))
_declare("fp_policy_parse", c_int32, c_char_p, c_void_p, c_size_t, _SIZE)
_declare("fp_policy_print", c_size_t, _POLICY, c_char_p, c_size_t)
_declare("fp_mask_describe", c_int32, _PROBLEM, _POLICY, _MASK)
_declare("fp_mask_stats", c_int32, _PROBLEM, _MASK, POINTER(Stats))
_declare("fp_select_workspace", c_int32, _PROBLEM, _POLICY, _EXEC, _SIZE)
_declare("fp_attend_workspace", c_int32, _PROBLEM, _MASK, _EXEC, _SIZE)
_declare("fp_prefill_workspace", c_int32, _PROBLEM, _POLICY, _EXEC, _SIZE)
_declare("fp_select", c_int32, _PROBLEM, _POLICY, _EXEC, _MASK, c_void_p, c_size_t)
_declare("fp_attend", c_int32, _PROBLEM, _MASK, _EXEC, _OUTPUT, c_void_p, c_size_t)
_declare("fp_prefill", c_int32, _PROBLEM, _POLICY, _EXEC, _MASK, _OUTPUT, c_void_p, c_size_t)
_declare("fp_audit_workspace", c_int32, _PROBLEM, _MASK, _EXEC, _SIZE)
_declare("fp_audit", c_int32, _PROBLEM, _MASK, _EXEC, c_void_p, c_size_t)
_declare("fp_prefill_dense_keys", c_int32, _POLICY, c_int32, _EXEC, POINTER(c_int64))
_declare("fp_backend_name", c_char_p, c_int32)
_declare("fp_backend_available", c_int32, c_char_p)
_declare("fp_backend_describe", c_size_t, c_char_p, c_char_p, c_size_t)
_declare("fp_backend_targets", c_size_t, c_char_p, c_char_p, c_size_t)
_declare("fp_thread_runtime", c_size_t, c_char_p, c_size_t)

_RAISES: dict[int, type[errors.FlashPrefillError]] = {
    1: errors.InvalidArgumentError,
    2: errors.UnsupportedError,
    3: errors.OutOfMemoryError,
    4: errors.DeviceError,
    5: errors.InternalError,
}


def check(status: int) -> None:
    """Raise what a status other than FP_OK means, with the library's message."""
    if status != 0:
        message = lib.fp_last_error().decode("utf-8", "replace").removeprefix("exec.")  # here keywords
        raise _RAISES.get(status, errors.InternalError)(message or f"the library failed with status {status}")


def text_of(function: Any, *arguments: Any) -> str:
    """Call a function that writes text of a length it returns."""
    size = function(*arguments, None, 0)
    buffer = ctypes.create_string_buffer(size + 1)
    function(*arguments, buffer, size + 1)
    return buffer.value.decode("utf-8", "replace")


def sized(kind: type[_Struct]) -> _Struct:
    """Return a zeroed struct whose size field is set."""
    return kind(struct_size=ctypes.sizeof(kind))


def pointer(struct: Structure | None) -> Any:
    """Return a struct by reference, or NULL."""
    return None if struct is None else byref(struct)
