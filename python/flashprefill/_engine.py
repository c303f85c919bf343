"""Calls into the library: arrays in, status out. The one place where descriptors are filled in.

The three functions take NumPy arrays or torch tensors, whose shapes and kinds api.py has checked, and write
to outputs that are there already. torch_op.py registers them as the bodies of torch operators, so they see
real memory even under torch.compile. What depends on values, not on shapes, is checked by the library itself
before it writes anything.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import functools
import sys
from collections.abc import Iterator, Sequence
from ctypes import byref
from typing import Any

import numpy as np

from . import _abi
from ._memory import in_large_pages
from .errors import refuse
from .policies.base import numbers_of

_ALIGN = 64  # of workspaces
_FourStrides = ctypes.c_int64 * 4
_DTYPES = {"float32": _abi.F32, "bfloat16": _abi.BF16, "float16": _abi.F16}
_STRUCTS: dict[str, tuple[int, Any]] = {
    "dense": (_abi.DENSE, _abi.Policy),
    "streaming": (_abi.STREAMING, _abi.Policy),
    "flashprefill": (_abi.FLASHPREFILL, _abi.FlashPrefill),
    "sketch": (_abi.SKETCH, _abi.Sketch),
    "flexprefill": (_abi.FLEXPREFILL, _abi.FlexPrefill),
    "minference": (_abi.MINFERENCE, _abi.MInference),
    "xattention": (_abi.XATTENTION, _abi.XAttention),
    "rrattention": (_abi.RRATTENTION, _abi.RRAttention),
    "spargeattn": (_abi.SPARGE_ATTN, _abi.SpargeAttn),
    "prism": (_abi.PRISM, _abi.Prism),
    "sampleattention": (_abi.SAMPLE_ATTENTION, _abi.SampleAttention),
}


class Timings:
    """Seconds that calls on the CPU spent, summed over the calls inside a :func:`collect_timings` block."""

    def __init__(self) -> None:
        self.select_seconds = 0.0
        self.attend_seconds = 0.0
        self.calls = 0

    def __repr__(self) -> str:
        return (
            f"Timings(select_seconds={self.select_seconds:.6f}, attend_seconds={self.attend_seconds:.6f}, "
            f"calls={self.calls})"
        )


_timings: contextvars.ContextVar[Timings | None] = contextvars.ContextVar(
    "flashprefill_timings", default=None
)


@contextlib.contextmanager
def collect_timings() -> Iterator[Timings]:
    """Sum up where the seconds of the calls inside the block go: selection or attention. CPU only."""
    timings = Timings()
    token = _timings.set(timings)
    try:
        yield timings
    finally:
        _timings.reset(token)


@functools.lru_cache(maxsize=256)
def _policy(spec: str) -> Any:
    kind, numbers = numbers_of(spec)
    number, struct = _STRUCTS[kind]
    policy = struct()
    common = policy if struct is _abi.Policy else policy.common
    _abi.check(_abi.lib.fp_policy_init(number, byref(policy), ctypes.sizeof(policy)))
    shared = {field[0] for field in _abi.Policy._fields_}
    floats = {field[0] for field in struct._fields_ if field[1] is ctypes.c_float}
    for name, value in numbers.items():
        if isinstance(
            value, list
        ):  # rows of integers: a list of structs, which ctypes keeps alive with the policy
            row = dict(struct._fields_)[name]._type_
            if row is ctypes.c_float:  # one row of thresholds
                setattr(policy, name, (row * len(value[0]))(*value[0]))
            else:
                setattr(policy, name, (row * len(value))(*(row(*map(int, entry)) for entry in value)))
        else:
            setattr(common if name in shared else policy, name, value if name in floats else int(value))
    return policy


# ------------------------------------------------------------------- arrays


def _is_numpy(x: Any) -> bool:
    return isinstance(x, np.ndarray)


def _address(x: Any) -> int | None:
    if x is None:
        return None
    return int(x.__array_interface__["data"][0]) if _is_numpy(x) else int(x.data_ptr())


def _strides(x: Any) -> tuple[int, ...]:
    return tuple(s // x.itemsize for s in x.strides) if _is_numpy(x) else tuple(x.stride())


@functools.cache
def _dtype(dtype: Any) -> int:
    return _DTYPES[dtype.name if isinstance(dtype, np.dtype) else str(dtype).removeprefix("torch.")]


def _tensor(x: Any) -> _abi.Tensor:
    """Describe a tensor of 3 or 4 axes; with 3 the first stride is not read, or steps over one sequence."""
    strides = _strides(x)
    if len(strides) == 3:
        strides = (0, *strides)
    return _abi.Tensor(_address(x), _dtype(x.dtype), 0, _FourStrides(*strides))


def _range(x: Any) -> tuple[int, int]:
    """Return the first and the past-the-end address of what a tensor touches."""
    begin = _address(x) or 0
    if 0 in x.shape:
        return begin, begin
    size = x.itemsize if _is_numpy(x) else x.element_size()
    low = high = 0
    for n, s in zip(x.shape, _strides(x), strict=True):
        if s < 0:
            low += (n - 1) * s
        else:
            high += (n - 1) * s
    return begin + low * size, begin + (high + 1) * size


def _refuse_overlap(out: Any, **inputs: Any) -> None:
    begin, end = _range(out)
    for name, x in inputs.items():
        first, last = _range(x)
        if begin < last and first < end:
            refuse("out", f"in the same memory as {name}", "memory of its own")


def _cuda_reads(x: Any) -> Any:
    """Return x, or a contiguous copy if the CUDA kernels can't read it: they want rows of 16-byte pieces."""
    if _is_numpy(x) or x.device.type != "cuda":
        return x
    *others, column = x.stride()
    size = x.element_size()
    if column == 1 and x.data_ptr() % 16 == 0 and all(s >= 0 and s * size % 16 == 0 for s in others):
        return x
    return x.clone(memory_format=sys.modules["torch"].contiguous_format)


def _all_cuda_reads(q: Any, *keys: Any, cached: bool) -> list[Any]:
    """Return q and the keys (or keys and values) as the CUDA kernels can read them.

    A cache is never copied: it may be all of the memory.
    """
    return [_cuda_reads(q), *(keys if cached else map(_cuda_reads, keys))]


def _workspace(like: Any, size: int) -> tuple[Any, int | None]:
    """Return scratch memory on the device of `like`: what keeps it alive, and its aligned address."""
    if size == 0:
        return None, None
    if _is_numpy(like):
        memory = np.empty(size + _ALIGN, np.uint8)
        return memory, -(-(_address(memory) or 0) // _ALIGN) * _ALIGN
    torch = sys.modules["torch"]
    memory = in_large_pages(torch.empty(size, dtype=torch.uint8, device=like.device))
    address = int(memory.data_ptr())
    assert address % _ALIGN == 0, "torch's allocators align to at least 64 bytes"
    return memory, address


# -------------------------------------------------------------- descriptors


def _problem(
    tensors: tuple[Any, Any, Any],
    indices: tuple[Any, Any, Any, Any],
    max_seqlens: tuple[int, int],
    softmax_scale: float,
    causal: bool,
    final_chunk: Sequence[bool],
) -> _abi.Problem:
    q, k, v = tensors
    cu_seqlens_q, cu_seqlens_k, seqused_k, block_table = indices
    p = _abi.sized(_abi.Problem)
    if not _is_numpy(q) and q.device.type == "cuda":
        p.device, p.device_index = _abi.CUDA, q.device.index or 0
    packed = cu_seqlens_q is not None
    p.batch = cu_seqlens_q.shape[0] - 1 if packed else q.shape[0] if len(q.shape) == 4 else 1
    p.q_heads, p.kv_heads, p.head_dim = q.shape[-2], k.shape[-2], q.shape[-1]
    p.causal, p.softmax_scale = causal, softmax_scale
    p.final_chunk = 1
    if len(final_chunk) == 1:
        p.final_chunk = final_chunk[0]
    elif len(final_chunk) > 1:
        p.keep = (ctypes.c_uint8 * len(final_chunk))(*final_chunk)  # lives as long as the descriptor
        p.final_chunks = ctypes.addressof(p.keep)
    p.total_q = q.shape[0] if packed else p.batch * max_seqlens[0]
    p.max_seqlen_q, p.max_seqlen_k = max_seqlens
    p.q, p.k, p.v = _tensor(q), _tensor(k), _tensor(v)
    p.cu_seqlens_q, p.cu_seqlens_k = _address(cu_seqlens_q), _address(cu_seqlens_k)
    p.seqused_k = _address(seqused_k)
    if block_table is not None:
        p.block_table = _address(block_table)
        p.block_table_stride = _strides(block_table)[0]
        p.pages_per_seq = block_table.shape[1]
        p.page_count, p.page_size = k.shape[0], k.shape[1]
    elif cu_seqlens_k is not None:
        p.total_k = k.shape[0]
    return p


def _exec(q: Any, threads: int, backend: str | None, target: str | None) -> _abi.Exec:
    e = _abi.sized(_abi.Exec)
    if _is_numpy(q):
        e.threads = max(threads, 0)
    else:
        torch = sys.modules["torch"]
        e.threads = torch.get_num_threads() if threads < 0 else threads
        if q.device.type == "cuda":
            e.stream = torch.cuda.current_stream(q.device).cuda_stream
    e.backend = backend.encode() if backend is not None else None
    e.target = target.encode() if target is not None else None
    if _timings.get() is not None:
        e.timings = ctypes.pointer(_abi.Timings())
    return e


def _add_timings(e: _abi.Exec) -> None:
    timings = _timings.get()
    if timings is not None and e.timings:
        timings.select_seconds += e.timings.contents.select_seconds
        timings.attend_seconds += e.timings.contents.attend_seconds
        timings.calls += 1


def _output(q: Any, out: Any, lse: Any) -> _abi.Output:
    o = _abi.sized(_abi.Output)
    o.out = _tensor(out)
    if lse is not None:
        o.lse = _address(lse)
        strides = _strides(lse)
        o.lse_stride = (ctypes.c_int64 * 3)(*((0, *strides) if len(strides) == 2 else strides))
    return o


def _mask(
    heads: int,
    tile_tokens: int,
    block_size: int,
    share_heads: bool,
    correct: bool,
    bits: Any,
    counts: Any,
    fallback: Any,
) -> _abi.BlockMask:
    m = _abi.sized(_abi.BlockMask)
    m.heads, m.tile_tokens, m.block_size = heads, tile_tokens, block_size
    m.share_heads, m.mean_correction = share_heads, correct
    m.tile_rows, m.words = bits.shape[1], bits.shape[2]
    m.bits, m.counts, m.fallback = _address(bits), _address(counts), _address(fallback)
    return m


def _mask_of(
    problem: _abi.Problem, policy: Any, bits: Any, counts: Any, fallback: Any, vertical_slash: Any
) -> _abi.BlockMask:
    """Describe the policy's mask; api.py's own arithmetic must have come to the same shape."""
    m = _abi.sized(_abi.BlockMask)
    _abi.check(_abi.lib.fp_mask_describe(byref(problem), byref(policy), byref(m)))
    if tuple(bits.shape) != (m.heads, m.tile_rows, m.words):
        refuse("the shape of the mask", tuple(bits.shape), str((m.heads, m.tile_rows, m.words)))
    m.bits, m.counts, m.fallback = _address(bits), _address(counts), _address(fallback)
    room = m.max_verticals + m.max_slashes
    if (0 if vertical_slash is None else vertical_slash.shape[2]) != (room and 2 + room):
        refuse(
            "the shape of the mask's vertical_slash",
            vertical_slash if vertical_slash is None else tuple(vertical_slash.shape),
            f"for {room}",
        )
    m.vertical_slash = _address(vertical_slash)
    return m


# -------------------------------------------------------------------- verbs


def select(
    q: Any,
    k: Any,
    bits: Any,
    counts: Any,
    fallback: Any,
    vertical_slash: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    seqused_k: Any,
    block_table: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    final_chunk: Sequence[bool],
    policy: str,
    threads: int,
    backend: str | None,
    target: str | None,
) -> None:
    """fp_select."""
    q, k = _all_cuda_reads(q, k, cached=block_table is not None)
    p = _problem(
        (q, k, k),
        (cu_seqlens_q, cu_seqlens_k, seqused_k, block_table),
        (max_seqlen_q, max_seqlen_k),
        softmax_scale,
        causal,
        final_chunk,
    )
    e, rule, size = _exec(q, threads, backend, target), _policy(policy), ctypes.c_size_t()
    m = _mask_of(p, rule, bits, counts, fallback, vertical_slash)
    _abi.check(_abi.lib.fp_select_workspace(byref(p), byref(rule), byref(e), byref(size)))
    _memory, address = _workspace(q, size.value)
    _abi.check(_abi.lib.fp_select(byref(p), byref(rule), byref(e), byref(m), address, size.value))
    _add_timings(e)


def attend(
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    bits: Any,
    tile_tokens: int,
    block_size: int,
    share_heads: bool,
    mean_correction: bool,
    vertical_slash: Any,
    max_verticals: int,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    seqused_k: Any,
    block_table: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    threads: int,
    backend: str | None,
    target: str | None,
) -> None:
    """fp_attend."""
    _refuse_overlap(out, q=q, k=k, v=v)
    q, k, v = _all_cuda_reads(q, k, v, cached=block_table is not None)
    p = _problem(
        (q, k, v),
        (cu_seqlens_q, cu_seqlens_k, seqused_k, block_table),
        (max_seqlen_q, max_seqlen_k),
        softmax_scale,
        causal,
        (True,),
    )
    e, o, size = _exec(q, threads, backend, target), _output(q, out, lse), ctypes.c_size_t()
    m = _mask(bits.shape[0], tile_tokens, block_size, share_heads, mean_correction, bits, None, None)
    if vertical_slash is not None:
        m.vertical_slash, m.max_verticals = _address(vertical_slash), max_verticals
        m.max_slashes = vertical_slash.shape[2] - 2 - max_verticals
    _abi.check(_abi.lib.fp_attend_workspace(byref(p), byref(m), byref(e), byref(size)))
    _memory, address = _workspace(q, size.value)
    _abi.check(_abi.lib.fp_attend(byref(p), byref(m), byref(e), byref(o), address, size.value))
    _add_timings(e)


def prefill(
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    bits: Any,
    counts: Any,
    fallback: Any,
    vertical_slash: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    seqused_k: Any,
    block_table: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    final_chunk: Sequence[bool],
    policy: str,
    threads: int,
    backend: str | None,
    target: str | None,
) -> None:
    """fp_prefill. Without bits the mask lives in the workspace."""
    _refuse_overlap(out, q=q, k=k, v=v)
    q, k, v = _all_cuda_reads(q, k, v, cached=block_table is not None)
    p = _problem(
        (q, k, v),
        (cu_seqlens_q, cu_seqlens_k, seqused_k, block_table),
        (max_seqlen_q, max_seqlen_k),
        softmax_scale,
        causal,
        final_chunk,
    )
    e, o, size = _exec(q, threads, backend, target), _output(q, out, lse), ctypes.c_size_t()
    rule = _policy(policy)
    m = None if bits is None else _mask_of(p, rule, bits, counts, fallback, vertical_slash)
    _abi.check(_abi.lib.fp_prefill_workspace(byref(p), byref(rule), byref(e), byref(size)))
    _memory, address = _workspace(q, size.value)
    _abi.check(
        _abi.lib.fp_prefill(byref(p), byref(rule), byref(e), _abi.pointer(m), byref(o), address, size.value)
    )
    _add_timings(e)
