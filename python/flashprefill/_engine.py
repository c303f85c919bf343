"""Calls into the library: arrays in, status out. The one place where descriptors are filled in.

The three functions take NumPy arrays or torch tensors, whose shapes and kinds api.py has checked, and write
to outputs that exist already. Their arguments are described in _calls.py. torch_op.py registers them as the
bodies of torch operators, so they see real memory even under torch.compile. What depends on values, not on
shapes, is checked by the library itself before it writes anything.
"""

from __future__ import annotations

import ctypes
import json
import sys
from ctypes import byref
from typing import Any

from . import _abi, _timings
from ._arrays import address_of, all_cuda_reads, describe, is_numpy, refuse_overlap, strides_of, workspace_of
from ._calls import ATTEND, AUDIT, PREFILL, SELECT
from .errors import refuse
from .policies.library import struct_of
from .policies.weights import bound

# -------------------------------------------------------------- descriptors

_TwoStrides = ctypes.c_int64 * 2


def problem_of(call: Any, q: Any, k: Any, v: Any) -> _abi.Problem:
    p = _abi.sized(_abi.Problem)
    if not is_numpy(q) and q.device.type == "cuda":
        p.device, p.device_index = _abi.CUDA, q.device.index or 0
    shape, packed = (
        q.shape,
        call.cu_seqlens_q is not None,
    )  # torch makes an object for each shape that is read
    batch = call.cu_seqlens_q.shape[0] - 1 if packed else shape[0] if len(shape) == 4 else 1
    p.batch, p.q_heads, p.kv_heads, p.head_dim = batch, shape[-2], k.shape[-2], shape[-1]
    p.causal, p.softmax_scale = call.causal, call.softmax_scale
    p.total_q = shape[0] if packed else batch * call.max_seqlen_q
    p.max_seqlen_q, p.max_seqlen_k = call.max_seqlen_q, call.max_seqlen_k
    describe(p.q, q)
    describe(p.k, k)
    describe(p.v, v)
    if packed:
        p.cu_seqlens_q = address_of(call.cu_seqlens_q)
    if call.cu_seqlens_k is not None:
        p.cu_seqlens_k = address_of(call.cu_seqlens_k)
    if call.seqused_k is not None:
        p.seqused_k = address_of(call.seqused_k)
    if call.block_table is not None:
        p.block_table = address_of(call.block_table)
        p.block_table_stride = strides_of(call.block_table)[0]
        p.pages_per_seq = call.block_table.shape[1]
        p.page_count, p.page_size = k.shape[0], k.shape[1]
    elif call.cu_seqlens_k is not None:
        p.total_k = k.shape[0]
    if call.k_scale is not None:
        p.k_scale, p.k_scale_stride = address_of(call.k_scale), _TwoStrides(*strides_of(call.k_scale))
    if call.v_scale is not None:
        p.v_scale, p.v_scale_stride = address_of(call.v_scale), _TwoStrides(*strides_of(call.v_scale))
    p.final_chunk = 1
    return p


def set_final_chunk(p: _abi.Problem, final_chunk: list[bool]) -> None:
    """Say which sequences end their prompts: one bool for all, or one each."""
    if len(final_chunk) == 1:
        p.final_chunk = final_chunk[0]
    elif len(final_chunk) > 1:
        p.keep = (ctypes.c_uint8 * len(final_chunk))(*final_chunk)  # lives as long as the descriptor
        p.final_chunks = ctypes.addressof(p.keep)


def exec_of(q: Any, threads: int, backend: str | None, target: str | None, math: int = 0) -> _abi.Exec:
    e = _abi.sized(_abi.Exec)
    if is_numpy(q):
        e.threads = max(threads, 0)
    else:
        torch = sys.modules["torch"]
        e.threads = torch.get_num_threads() if threads < 0 else threads
        if q.device.type == "cuda":
            e.stream = torch.cuda.current_stream(q.device).cuda_stream
    e.backend = backend.encode() if backend is not None else None
    e.target = target.encode() if target is not None else None
    e.math = math
    if _timings.active() is not None:
        e.timings = ctypes.pointer(_abi.Timings())
    return e


def guard_settings(text: str) -> _abi.Guard:
    """Describe a guard by the JSON text of its settings, without anywhere for results."""
    g = _abi.sized(_abi.Guard)
    for name, value in json.loads(text).items():
        setattr(g, name, value)
    return g


def set_guard(e: _abi.Exec, call: Any) -> None:
    """Hand over the guard of a call, if it has one."""
    if call.guard is None:
        return
    g = guard_settings(call.guard)
    set_findings(g, call.guard_shares, call.guard_numbers, call.guard_moments)
    g.levels = address_of(call.guard_levels)
    e.guard = ctypes.pointer(g)


def set_findings(g: _abi.Guard, shares: Any, numbers: Any, moments: Any) -> None:
    """Say where a guard's results go: [3, batch, query heads] each, and [batch, 3]."""
    _, batch, heads = shares.shape
    row = batch * heads * ctypes.sizeof(ctypes.c_float)
    begin, numbers_begin = address_of(shares), address_of(numbers)
    g.recall, g.recall_low, g.recall_p05 = (begin + i * row if begin else None for i in range(3))
    g.rows_audited, g.missed_block, g.outcome = (
        numbers_begin + i * row if numbers_begin else None for i in range(3)
    )
    g.moments = address_of(moments)


def add_timings(e: _abi.Exec) -> None:
    timings = _timings.active()
    if timings is not None and e.timings:
        timings.select_seconds += e.timings.contents.select_seconds
        timings.attend_seconds += e.timings.contents.attend_seconds
        timings.guard_seconds += e.timings.contents.guard_seconds
        timings.calls += 1


def output_of(call: Any) -> _abi.Output:
    o = _abi.sized(_abi.Output)
    describe(o.out, call.out)
    if call.lse is not None:
        o.lse = address_of(call.lse)
        strides = strides_of(call.lse)
        o.lse_stride = (ctypes.c_int64 * 3)(*((0, *strides) if len(strides) == 2 else strides))
    return o


def _mask_given(call: Any) -> _abi.BlockMask:
    """Describe the mask that attend obeys."""
    m = _abi.sized(_abi.BlockMask)
    m.heads, m.tile_rows, m.words = call.bits.shape
    m.tile_tokens, m.block_size = call.tile_tokens, call.block_size
    m.share_heads, m.mean_correction = call.share_heads, call.mean_correction
    m.bits = address_of(call.bits)
    if call.vertical_slash is not None:
        m.vertical_slash, m.max_verticals = address_of(call.vertical_slash), call.max_verticals
        m.max_slashes = call.vertical_slash.shape[2] - 2 - call.max_verticals
    if call.key_lists is not None:
        m.key_lists, m.segment_tiles = address_of(call.key_lists), call.segment_tiles
        m.segment_rows, m.max_keys = call.key_lists.shape[1], call.key_lists.shape[2] - 2
    m.skip = call.skip
    return m


def _mask_written(problem: _abi.Problem, policy: Any, call: Any) -> _abi.BlockMask:
    """Describe the mask that the policy is to write; api.py must have come to the same shape."""
    m = _abi.sized(_abi.BlockMask)
    _abi.check(_abi.lib.fp_mask_describe(byref(problem), byref(policy), byref(m)))
    if tuple(call.bits.shape) != (m.heads, m.tile_rows, m.words):
        refuse("the shape of the mask", tuple(call.bits.shape), str((m.heads, m.tile_rows, m.words)))
    m.bits, m.counts, m.fallback = map(address_of, (call.bits, call.counts, call.fallback))
    room, lists = m.max_verticals + m.max_slashes, call.vertical_slash
    if (0 if lists is None else lists.shape[2]) != (room and 2 + room):
        shape = lists if lists is None else tuple(lists.shape)
        refuse("the shape of the mask's vertical_slash", shape, f"for {room}")
    m.vertical_slash = address_of(lists)
    wanted = (m.heads, m.segment_rows, 2 + m.max_keys) if m.max_keys else ()
    shape = () if call.key_lists is None else tuple(call.key_lists.shape)
    if shape != wanted:
        refuse("the shape of the mask's key_lists", shape, str(wanted))
    m.key_lists = address_of(call.key_lists)
    return m


# -------------------------------------------------------------------- verbs


def select(*arguments: Any) -> None:
    """fp_select, with the arguments of _calls.SELECT."""
    call = SELECT.unpack(arguments)
    values = call.k if call.v is None else call.v
    q, k, v = all_cuda_reads(call.q, call.k, values, cached=call.block_table is not None)
    p = problem_of(call if call.v is not None else call._replace(v_scale=call.k_scale), q, k, v)
    set_final_chunk(p, call.final_chunk)
    e, size = exec_of(q, call.threads, call.backend, call.target), ctypes.c_size_t()
    with bound(struct_of(call.policy), p, all(call.final_chunk)) as policy:
        m = _mask_written(p, policy, call)
        _abi.check(_abi.lib.fp_select_workspace(byref(p), byref(policy), byref(e), byref(size)))
        _memory, address = workspace_of(q, size.value)
        _abi.check(_abi.lib.fp_select(byref(p), byref(policy), byref(e), byref(m), address, size.value))
    add_timings(e)


def attend(*arguments: Any) -> None:
    """fp_attend, with the arguments of _calls.ATTEND."""
    call = ATTEND.unpack(arguments)
    refuse_overlap(call.out, q=call.q, k=call.k, v=call.v)
    q, k, v = all_cuda_reads(call.q, call.k, call.v, cached=call.block_table is not None)
    p, m, o = problem_of(call, q, k, v), _mask_given(call), output_of(call)
    m.skipped = address_of(call.skipped)
    e, size = exec_of(q, call.threads, call.backend, call.target, call.math), ctypes.c_size_t()
    _abi.check(_abi.lib.fp_attend_workspace(byref(p), byref(m), byref(e), byref(size)))
    _memory, address = workspace_of(q, size.value)
    _abi.check(_abi.lib.fp_attend(byref(p), byref(m), byref(e), byref(o), address, size.value))
    add_timings(e)


def prefill(*arguments: Any) -> None:
    """fp_prefill, with the arguments of _calls.PREFILL. Without bits the mask lives in the workspace."""
    call = PREFILL.unpack(arguments)
    refuse_overlap(call.out, q=call.q, k=call.k, v=call.v)
    q, k, v = all_cuda_reads(call.q, call.k, call.v, cached=call.block_table is not None)
    p, o = problem_of(call, q, k, v), output_of(call)
    set_final_chunk(p, call.final_chunk)
    e, size = exec_of(q, call.threads, call.backend, call.target, call.math), ctypes.c_size_t()
    set_guard(e, call)
    with bound(struct_of(call.policy), p, all(call.final_chunk)) as policy:
        written = None if call.bits is None else _mask_written(p, policy, call)
        if written is not None:
            written.skipped = address_of(call.skipped)
        m = _abi.pointer(written)
        _abi.check(_abi.lib.fp_prefill_workspace(byref(p), byref(policy), byref(e), byref(size)))
        _memory, address = workspace_of(q, size.value)
        _abi.check(_abi.lib.fp_prefill(byref(p), byref(policy), byref(e), m, byref(o), address, size.value))
    add_timings(e)


def audit(*arguments: Any) -> None:
    """fp_audit, with the arguments of _calls.AUDIT."""
    call = AUDIT.unpack(arguments)
    q, k = all_cuda_reads(call.q, call.k, cached=call.block_table is not None)
    p, m = problem_of(call._replace(v_scale=call.k_scale), q, k, k), _mask_given(call)
    m.counts = address_of(call.counts)
    e, size = exec_of(q, call.threads, call.backend, call.target), ctypes.c_size_t()
    set_guard(e, call)
    _abi.check(_abi.lib.fp_audit_workspace(byref(p), byref(m), byref(e), byref(size)))
    _memory, address = workspace_of(q, size.value)
    _abi.check(_abi.lib.fp_audit(byref(p), byref(m), byref(e), address, size.value))
    add_timings(e)
