"""Memory of NumPy arrays and torch tensors as the C ABI takes it: addresses, strides, scratch."""

from __future__ import annotations

import functools
import math
import sys
from typing import Any

import numpy as np

from . import _abi
from ._memory import in_large_pages
from .errors import refuse

_ALIGN = 64  # of workspaces
_DTYPES = {
    "float32": _abi.F32,
    "bfloat16": _abi.BF16,
    "float16": _abi.F16,
    "float8_e4m3fn": _abi.E4M3,
}


def is_numpy(x: Any) -> bool:
    """Return whether x is a NumPy array; all else here is a torch tensor."""
    return isinstance(x, np.ndarray)


def address_of(x: Any) -> int | None:
    """Return the address of the first element, or None for None."""
    if x is None:
        return None
    return int(x.__array_interface__["data"][0]) if is_numpy(x) else int(x.data_ptr())


def strides_of(x: Any) -> tuple[int, ...]:
    """Return the strides in elements; without elements those of a contiguous tensor, NumPy's being 0."""
    numpy = is_numpy(x)
    if (x.size if numpy else x.numel()) == 0:
        return tuple(math.prod(max(n, 1) for n in x.shape[axis + 1 :]) for axis in range(len(x.shape)))
    if not numpy:
        return x.stride()  # type: ignore[no-any-return]
    size = x.itemsize
    return tuple([stride // size for stride in x.strides])


@functools.cache
def dtype_of(dtype: Any) -> int:
    """Return fp_dtype's number."""
    return _DTYPES[dtype.name if isinstance(dtype, np.dtype) else str(dtype).removeprefix("torch.")]


def describe(tensor: _abi.Tensor, x: Any) -> None:
    """Fill in the zeroed description of a tensor of 3 or 4 axes; with 3 the first stride stays 0.

    In place, which takes a third of the time of making its parts and copying them (3.4 us on a Zen 3 core).
    """
    strides = strides_of(x)
    tensor.data, tensor.dtype = address_of(x), dtype_of(x.dtype)
    tensor.stride[4 - len(strides) :] = strides


def tensor_of(x: Any) -> _abi.Tensor:
    """Describe a tensor of 3 or 4 axes by itself."""
    tensor = _abi.Tensor()
    describe(tensor, x)
    return tensor


def range_of(x: Any) -> tuple[int, int]:
    """Return the first and the past-the-end address of what a torch tensor touches. No stride is negative."""
    begin = x.data_ptr()
    if x.is_contiguous():
        return begin, begin + x.nbytes
    if 0 in x.shape:
        return begin, begin
    last = sum([(n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)])
    return begin, begin + (last + 1) * x.element_size()


def refuse_overlap(out: Any, **inputs: Any) -> None:
    """Refuse an output in the memory of an input."""
    begin, end = (0, 0) if is_numpy(out) else range_of(out)
    for name, x in inputs.items():
        if is_numpy(x):
            overlap = np.may_share_memory(out, x)
        else:
            first, last = range_of(x)
            overlap = begin < last and first < end
        if overlap:
            refuse("out", f"in the same memory as {name}", "memory of its own")


def on_cuda(x: Any) -> bool:
    """Return whether an array is in a GPU's memory."""
    return not is_numpy(x) and x.device.type == "cuda"


def _cuda_reads(x: Any) -> Any:
    """Return x, or a contiguous copy if its rows are not, or not aligned to 8 values, as CUDA wants."""
    *others, column = x.stride()
    eight = 8 * x.element_size()
    if column == 1 and x.data_ptr() % eight == 0 and all(s >= 0 and s % 8 == 0 for s in others):
        return x
    return x.clone(memory_format=sys.modules["torch"].contiguous_format)


def all_cuda_reads(q: Any, *keys: Any, cached: bool) -> list[Any]:
    """Return q and the keys (or keys and values) as the CUDA kernels can read them.

    A cache is never copied: it may be all of the memory.
    """
    if not on_cuda(q):
        return [q, *keys]
    return [_cuda_reads(q), *(keys if cached else map(_cuda_reads, keys))]


def workspace_of(like: Any, size: int) -> tuple[Any, int | None]:
    """Return scratch memory on the device of `like`: what keeps it alive, and its aligned address."""
    if size == 0:
        return None, None
    if is_numpy(like):
        memory = np.empty(size + _ALIGN, np.uint8)
        return memory, -(-(address_of(memory) or 0) // _ALIGN) * _ALIGN
    torch = sys.modules["torch"]
    memory = in_large_pages(torch.empty(size, dtype=torch.uint8, device=like.device))
    address = int(memory.data_ptr())
    assert address % _ALIGN == 0, "torch's allocators align to at least 64 bytes"
    return memory, address
