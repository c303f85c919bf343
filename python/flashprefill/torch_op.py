"""The torch operators, and what the verbs need from an array library, for torch (NumPy: _numpy_ops.py).

The operators write into tensors that Python has allocated, and return nothing. So torch.compile plans their
memory, CUDA graphs replay them, and their fake kernel is empty. Everything that calls C is inside them, since
torch.compile traces the rest. They have no backward pass; tensors that require grad are refused before.

They are defined without torch.library.custom_op. PyTorch 2.13's looks every argument up in the schema to
count versions of the outputs, which took more than half of the host time per call (430 us instead of 190 us
on a Zen 3 core).

Importing this module imports torch. The package does so only when a torch tensor comes in.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from . import _engine
from ._calls import ATTEND, AUDIT, PREFILL, SELECT
from ._memory import in_large_pages
from .errors import UnsupportedError, refuse, refuse_type

NAME = "a torch tensor"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_FP8 = torch.float8_e4m3fn
_INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)

_make: Any = torch.library.Library
_disable: Any = torch.compiler.disable
_is_tracing: Any = torch.jit.is_tracing  # type: ignore[attr-defined]
_library = _make("flashprefill", "FRAGMENT")  # lives as long as this module
for _verb in (SELECT, ATTEND, PREFILL, AUDIT):
    _library.define(_verb.schema, tags=(torch.Tag.pt2_compliant_tag,))
    for _key in ("CPU", "CUDA"):  # disabled: outside of graphs torch.compile would trace the call into C
        _library.impl(_verb.name, _disable(getattr(_engine, _verb.name)), _key)
    torch.library.register_fake(f"flashprefill::{_verb.name}", lambda *_, **__: None, lib=_library)

select = torch.ops.flashprefill.select.default
attend = torch.ops.flashprefill.attend.default
prefill = torch.ops.flashprefill.prefill.default
audit = torch.ops.flashprefill.audit.default


def _in_python(function: Any, *arguments: Any) -> Any:
    return function(*arguments)


in_python = _disable(_in_python)  # calls a function that no graph can hold


def tracing() -> bool:
    """Return whether sizes may be symbols, which comparing would bind."""
    return torch.compiler.is_compiling()


def is_fp8(x: Any) -> bool:
    """Return whether x is of the FP8 that keys and values may be stored in."""
    return isinstance(x, torch.Tensor) and x.dtype == _FP8


def widened(q: Any) -> Any:
    """Return FP8 queries in bf16, which holds them exactly."""
    return q.to(torch.bfloat16)


def scaled_queries(q: Any, scale: Any, cu_seqlens_q: Any) -> Any:
    """Return q times the scale [batch, heads] of its sequence and head, in q's dtype."""
    if cu_seqlens_q is not None:
        lengths = (cu_seqlens_q[1:] - cu_seqlens_q[:-1]).long()
        factor = scale.repeat_interleave(lengths, dim=0, output_size=q.shape[0])[:, :, None]
    else:
        factor = scale[:, None, :, None] if q.ndim == 4 else scale[0][:, None]
    return (q.float() * factor).to(q.dtype)


def scales(name: str, x: Any, like: Any) -> Any:
    """Return scales as fp32 on the device of `like`."""
    try:
        return torch.as_tensor(x, dtype=torch.float32, device=like.device)
    except (TypeError, ValueError, RuntimeError):
        return refuse_type(name, f"a {type(x).__name__}", "a number or a tensor of numbers")


def spread(x: Any, shape: tuple[int, ...]) -> Any:
    """Return a view of x in a shape that it can be repeated to."""
    return x.expand(shape)


def repeated(x: Any, count: int) -> Any:
    """Repeat each column."""
    return x.repeat_interleave(count, dim=1)


def check(name: str, x: Any, like: Any) -> None:
    """Refuse what is not a tensor that the library can read."""
    if not isinstance(x, torch.Tensor):
        refuse_type(name, f"a {type(x).__name__}", f"{NAME}, as q is")
    if x.dtype not in _DTYPES and not (name in ("k", "v") and x.dtype == _FP8):
        more = f", or {_FP8} for keys and values" if "float8" in str(x.dtype) else ""
        refuse_type(f"{name}.dtype", x.dtype, f"torch.float32, torch.float16 or torch.bfloat16{more}")
    if x.layout != torch.strided:
        refuse_type(f"{name}.layout", x.layout, "torch.strided")
    device = x.device
    if x is like or device != like.device:
        if device.type not in ("cpu", "cuda"):
            refuse(f"{name}.device", device, "a CPU or a CUDA device")
        if x is not like:
            refuse(f"{name}.device", device, f"q's ({like.device})")
        if _is_tracing():
            raise UnsupportedError(
                "torch.jit.trace, and ONNX export by it, would fix this call to one length; torch.compile "
                "and torch.export take it, and models that patch_model has patched are traced as dense"
            )
    if x.requires_grad and torch.is_grad_enabled():
        refuse(f"{name}.requires_grad", True, "False where grad mode is enabled: there is no backward pass")


def check_out(name: str, x: Any) -> None:
    """Refuse an output that can't be written. Every tensor can be."""


def index(name: str, x: Any, like: Any, ndim: int) -> Any:
    """Return lengths or pages as an int32 tensor on the device of `like`."""
    if isinstance(x, torch.Tensor):
        if like is not None and x.device != like.device:
            refuse(f"{name}.device", x.device, f"q's ({like.device})")
        values = x
    else:
        try:
            values = torch.as_tensor(x if isinstance(x, np.ndarray) else list(x), device=_device(like))
        except (TypeError, ValueError, RuntimeError):
            refuse_type(name, f"a {type(x).__name__}", "an array of integers")
    if values.numel() and values.dtype not in _INTEGERS:
        refuse_type(name, f"an array of {values.dtype}", "an array of integers")
    if values.ndim != ndim:
        refuse(f"{name}.ndim", values.ndim, str(ndim))
    if values.dtype == torch.int64 and _readable(values) and values.numel():
        low, high = int(values.min()), int(values.max())
        if low < -(2**31) or high >= 2**31:
            refuse(name, f"an array with values from {low} to {high}", "inside int32")
    return values.to(torch.int32).contiguous()


def copy(x: Any) -> Any:
    """Return a copy that its owner can't change."""
    return x.clone()


def _readable(x: Any) -> bool:
    """Return whether values can be read without waiting for a device or breaking a graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def longest(lengths: Any, bound: int) -> int:
    """Return the largest length, or `bound`, an upper bound, where reading it would synchronise."""
    if not _readable(lengths):
        return bound
    return int(lengths.max()) if lengths.numel() else 0


def _device(like: Any) -> Any:
    return "cpu" if like is None else like.device


def empty_like(q: Any) -> Any:
    """Return a contiguous tensor of q's shape and dtype."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return in_large_pages(out) if type(out) is torch.Tensor and not torch.compiler.is_compiling() else out


def empty_float(like: Any, shape: tuple[int, ...]) -> Any:
    """Return an fp32 tensor."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def zero_words(like: Any, shape: tuple[int, ...]) -> Any:
    """Return 64-bit words."""
    return torch.zeros(shape, dtype=torch.int64, device=_device(like))


def zero_counts(like: Any, shape: tuple[int, ...]) -> Any:
    """Return 32-bit counts."""
    return torch.zeros(shape, dtype=torch.int32, device=_device(like))


def zeros(like: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """Return zeros on the device of `like`."""
    return torch.zeros(shape, dtype=getattr(torch, dtype), device=like.device)


def on_gpu(x: Any) -> bool:
    """Return whether a tensor lies in a GPU's memory."""
    return bool(x.device.type == "cuda")


def same_device(x: Any, like: Any) -> bool:
    """Return whether two tensors lie in the same memory."""
    return bool(x.device == like.device)


def as_bool(name: str, x: Any) -> Any:
    """Return a dense mask as bool, or refuse it."""
    if not isinstance(x, torch.Tensor):
        refuse_type(name, f"a {type(x).__name__}", "torch tensors all")
    if x.dtype != torch.bool:
        refuse_type(f"{name}.dtype", x.dtype, "torch.bool")
    return x


def pack(keep: Any, words: int) -> Any:
    """Pack bools [..., blocks] into words [..., words], bit j of word w being block 64 w + j."""
    padded = torch.zeros((*keep.shape[:-1], words * 64), dtype=torch.int64, device=keep.device)
    padded[..., : keep.shape[-1]] = keep
    # Bits are distinct, so a sum is an or; bit 63 is int64's sign.
    return (padded.view(*keep.shape[:-1], words, 64) << torch.arange(64, device=keep.device)).sum(-1)


def unpack(bits: Any, blocks: int) -> Any:
    """Undo `pack`."""
    single = (bits.unsqueeze(-1) >> torch.arange(64, device=bits.device)) & 1
    return single.flatten(-2)[..., :blocks].bool()


def visible_before(limits: list[int], blocks: int, like: Any) -> Any:
    """Return bools [tiles, blocks]: whether a block is below its tile's limit."""
    bounds = torch.tensor(limits, dtype=torch.int64, device=like.device)
    return torch.arange(blocks, device=like.device)[None, :] < bounds[:, None]


def to_host(x: Any) -> np.ndarray:
    """Return the values as NumPy's."""
    return x.numpy(force=True)  # type: ignore[no-any-return]


def from_host(x: np.ndarray, like: Any = None) -> Any:
    """Return host values as this library's, on the device of `like` if it is given."""
    return torch.from_numpy(x) if like is None else torch.from_numpy(x).to(like.device)


def words_of(bits: np.ndarray) -> Any:
    """Return host words as this library's."""
    return torch.from_numpy(bits.view(np.int64))


def expand_heads(bits: Any, heads: int) -> Any:
    """Repeat the one head of a mask."""
    return bits.expand(heads, -1, -1).contiguous()
