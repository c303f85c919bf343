"""A prefill that the layers of a model share: checked once, its descriptors filled in once.

The layers of a step ask for the same batch, with tensors of the same shapes, strides and dtypes. Where these
tensors lie is all that differs, so all but their addresses is settled when a `PreparedPrefill` is made. On a
GPU the host's time per call matters: an H200 computes a chunk of 512 rows in less time than the host took to
check the arguments again for each layer.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import byref
from typing import Any

from . import _abi, _engine, _timings
from ._arguments import final_chunk_of, results_of, scale_of, shared_of
from ._arrays import address_of, all_cuda_reads, range_of, refuse_overlap, tensor_of, workspace_of
from ._calls import PREFILL
from ._layout import layout_of
from ._ops import ops_of
from .guard import Guard
from .policies import MaskPolicy, Policy
from .policies.library import struct_of


def signature(q: Any, k: Any, v: Any, out: Any) -> tuple[Any, ...]:
    """Return what has to be equal for tensors to be run by the same `PreparedPrefill`."""
    return (
        q.shape,
        q.stride(),
        k.shape,
        k.stride(),
        v.stride(),
        out.stride(),
        q.dtype,
        k.dtype,
        v.dtype,
        q.device,
    )


class PreparedPrefill:
    """`prefill_attention` over packed queries and a paged cache, for tensors of one `signature`.

    Not for two threads at once. It runs on the stream that it is made on.

    Attributes:
        counts_shape: of the counts that `run` writes, [mask heads, tile rows].
        causal_blocks: blocks that all heads together could keep, by the lengths that the host knows.
    """

    def __init__(
        self,
        q: Any,
        k: Any,
        v: Any,
        out: Any,
        policy: Policy,
        *,
        softmax_scale: float,
        cu_seqlens_q: Any,
        seqused_k: Any,
        block_table: Any,
        rows_and_keys: Sequence[tuple[int, int]],
        final_chunk: Sequence[bool],
        k_scale: Any = None,
        v_scale: Any = None,
        guard: Guard | None = None,
    ) -> None:
        """Check everything, as `prefill_attention` does, whose arguments these are.

        Args:
            q: queries, packed [tokens, heads, head_dim]; like k, v and out a tensor of the signature.
            k: pages of keys, [pages, page_size, kv_heads, head_dim].
            v: pages of values, likewise.
            out: where results go, of q's shape.
            policy: what to keep; a policy of the library, not a `MaskPolicy`.
            softmax_scale: factor of the scores.
            cu_seqlens_q: int32 [batch + 1].
            seqused_k: int32 [batch].
            block_table: int32 [batch, pages].
            rows_and_keys: numbers of queries and keys of each sequence, as the host knows them.
            final_chunk: whether each sequence's rows end its prompt.
            k_scale: of FP8 keys, fp32 [1], [kv_heads] or [batch, kv_heads].
            v_scale: of FP8 values, likewise.
            guard: what to measure, and what to do about it; `run` says where the results go.
        """
        ops = ops_of("q", q)
        most_rows, most_keys = (max(lengths) for lengths in zip(*rows_and_keys, strict=True))
        places = (cu_seqlens_q, None), (most_rows, most_keys), seqused_k, block_table
        layout = layout_of(ops, (q, k, v), True, *places)
        results_of(ops, q, out, False)
        refuse_overlap(out, q=q, k=k, v=v)
        scales = {
            name: scale_of(ops, name[0], x, {name: scale}, layout.batch, k.shape[-2])
            for name, x, scale in (("k_scale", k, k_scale), ("v_scale", v, v_scale))
        }
        shared = shared_of(q, layout, softmax_scale, None, None, None, **scales)
        chunks = final_chunk_of(final_chunk, layout.batch)
        values = {
            "q": q,
            "k": k,
            "v": v,
            "out": out,
            "final_chunk": chunks,
            "policy": policy.text,
        }
        call = PREFILL.unpack(PREFILL.pack(**values, **shared))
        (readable,) = all_cuda_reads(q, cached=True)
        self._keep = call.cu_seqlens_q, call.seqused_k, call.block_table, *scales.values()
        self._problem, self._output = _engine.problem_of(call, readable, k, v), _engine.output_of(call)
        self._q = tensor_of(q)
        _engine.set_final_chunk(self._problem, chunks)
        self._policy, self._mask = struct_of(policy.text), _abi.sized(_abi.BlockMask)
        _abi.check(_abi.lib.fp_mask_describe(byref(self._problem), byref(self._policy), byref(self._mask)))
        self.counts_shape = self._mask.heads, self._mask.tile_rows
        visible = (
            layout.visible(*each, self._mask.tile_tokens, self._mask.block_size) for each in rows_and_keys
        )
        self.causal_blocks = self._mask.heads * sum(map(sum, visible))
        self._guard = None if guard is None else _engine.guard_settings(guard.text)
        self._execution = self._execution_on(q)
        size = ctypes.c_size_t()
        _abi.check(
            _abi.lib.fp_prefill_workspace(
                byref(self._problem), byref(self._policy), byref(self._execution), byref(size)
            )
        )
        self._size = size.value
        self._memory, self._workspace = workspace_of(q, self._size)
        self._extents = [_extent(x) for x in (q, k, v, out)]

    def _execution_on(self, q: Any) -> _abi.Exec:
        execution = _engine.exec_of(q, -1, None, None)
        if self._guard is not None:
            execution.guard = ctypes.pointer(self._guard)
        return execution

    def run(
        self,
        q: Any,
        k: Any,
        v: Any,
        out: Any,
        counts: int | None = None,
        k_scale: Any = None,
        v_scale: Any = None,
        findings: tuple[Any, Any, Any] | None = None,
        layer: int = 0,
    ) -> None:
        """Write attention of q over the cache into out.

        Args:
            q: queries, a tensor of the signature, like the next three.
            k: pages of keys.
            v: pages of values.
            out: where results go.
            counts: the address of int32 of `counts_shape`, where the number of blocks goes that each tile
                keeps; entries that no tile has are left alone. None: nothing is counted.
            k_scale: of FP8 keys, where there was one: of the same shape and strides, and fp32.
            v_scale: of FP8 values, likewise.
            findings: where a guard's results go, contiguous: float32 and int32 [3, batch, heads], float64
                [batch, 3]. Needed where there is a guard.
            layer: the layer's number, on which a guard's draws depend.

        Raises:
            FlashPrefillError: the library refuses, or out lies in the memory of an input.
        """
        addresses = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()
        *inputs, (begin, end) = [
            (at + low, at + high) for at, (low, high) in zip(addresses, self._extents, strict=True)
        ]
        for first, last in inputs:
            if begin < last and first < end:
                refuse_overlap(out, q=q, k=k, v=v)
        (readable,) = all_cuda_reads(q, cached=True)
        problem, output, mask = self._problem, self._output, self._mask
        self._q.data = addresses[0]
        problem.q = self._q if readable is q else tensor_of(readable)
        problem.k.data, problem.v.data, output.out.data = addresses[1:]
        problem.k_scale, problem.v_scale = address_of(k_scale), address_of(v_scale)
        mask.counts = counts
        if self._guard is not None:
            assert findings is not None
            _engine.set_findings(self._guard, *findings)
            self._guard.layer = layer
        execution = self._execution if _timings.active() is None else self._execution_on(q)
        _abi.check(
            _abi.lib.fp_prefill(
                byref(problem),
                byref(self._policy),
                byref(execution),
                byref(mask),
                byref(output),
                self._workspace,
                self._size,
            )
        )
        _engine.add_timings(execution)


def dense_keys(policy: Policy, device: str) -> int:
    """Return the number of keys up to which a prefill keeps everything, as a selection would not pay.

    Args:
        policy: any policy; of a selection in Python there is no such number.
        device: "cpu" or "cuda".

    Raises:
        UnsupportedError: no backend of this machine works on that device, or knows the policy there.
    """
    if isinstance(policy, MaskPolicy):
        return 0
    keys, struct = ctypes.c_int64(), struct_of(policy.text)
    kind = _abi.CUDA if device == "cuda" else _abi.CPU
    _abi.check(_abi.lib.fp_prefill_dense_keys(byref(struct), kind, None, byref(keys)))
    return keys.value


def _extent(x: Any) -> tuple[int, int]:
    """Return where a tensor's memory begins and ends, in bytes from its first element."""
    begin, end = range_of(x)
    return begin - x.data_ptr(), end - x.data_ptr()
