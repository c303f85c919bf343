"""The attend kernel from Python: ctypes over libattend_harness.so, torch tensors, a float64 reference."""

from __future__ import annotations

import ctypes as c
import os
from dataclasses import dataclass, field

import torch


class Tensor(c.Structure):
    _fields_ = [
        ("data", c.c_void_p),
        ("dtype", c.c_int32),
        ("reserved", c.c_int32),
        ("stride", c.c_int64 * 4),
    ]


class Problem(c.Structure):
    _fields_ = [
        ("struct_size", c.c_uint32),
        ("device", c.c_int32),
        ("device_index", c.c_int32),
        ("batch", c.c_int32),
        ("q_heads", c.c_int32),
        ("kv_heads", c.c_int32),
        ("head_dim", c.c_int32),
        ("causal", c.c_int32),
        ("final_chunk", c.c_int32),
        ("softmax_scale", c.c_float),
        ("total_q", c.c_int64),
        ("total_k", c.c_int64),
        ("max_seqlen_q", c.c_int64),
        ("max_seqlen_k", c.c_int64),
        ("q", Tensor),
        ("k", Tensor),
        ("v", Tensor),
        ("cu_seqlens_q", c.c_void_p),
        ("cu_seqlens_k", c.c_void_p),
        ("seqused_k", c.c_void_p),
        ("block_table", c.c_void_p),
        ("block_table_stride", c.c_int64),
        ("pages_per_seq", c.c_int32),
        ("page_size", c.c_int32),
        ("page_count", c.c_int64),
        ("final_chunks", c.c_void_p),
    ]


class BlockMask(c.Structure):
    _fields_ = [
        ("struct_size", c.c_uint32),
        ("heads", c.c_int32),
        ("tile_tokens", c.c_int32),
        ("block_size", c.c_int32),
        ("share_heads", c.c_int32),
        ("mean_correction", c.c_int32),
        ("tile_rows", c.c_int64),
        ("words", c.c_int64),
        ("bits", c.c_void_p),
        ("counts", c.c_void_p),
        ("fallback", c.c_void_p),
        ("lines", c.c_void_p),
        ("max_verticals", c.c_int32),
        ("max_slashes", c.c_int32),
    ]


class Output(c.Structure):
    _fields_ = [
        ("struct_size", c.c_uint32),
        ("reserved", c.c_int32),
        ("out", Tensor),
        ("lse", c.c_void_p),
        ("lse_stride", c.c_int64 * 3),
    ]


DTYPES = {torch.bfloat16: 1, torch.float16: 2}


def load(folder: str) -> c.CDLL:
    """The kernel built into this folder."""
    lib = c.CDLL(os.path.join(folder, "libattend_harness.so"))
    lib.attend_unsupported.restype = c.c_char_p
    return lib


_lib = load(os.environ.get("ATTEND_LIB", os.path.dirname(os.path.abspath(__file__))))


def _tensor(t: torch.Tensor, packed: bool) -> Tensor:
    strides = ([0] + list(t.stride())) if packed else list(t.stride())
    return Tensor(t.data_ptr(), DTYPES[t.dtype], 0, (c.c_int64 * 4)(*strides))


@dataclass
class Case:
    """One call. q: [b, t, h, d], or [t, h, d] with cu_q; k, v alike, or paged [pages, slots, h, d]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    causal: bool = True
    scale: float | None = None
    cu_q: list[int] | None = None
    cu_k: list[int] | None = None
    used_k: list[int] | None = None
    table: torch.Tensor | None = None  # int32 [b, pages]
    block_size: int = 128
    share: bool = False
    correct: bool = False
    keep: list[torch.Tensor] | None = (
        None  # a sequence each: bool [mask heads, tiles, blocks]; None: everything
    )
    max_k: int = 0
    lse_wanted: bool = True
    _live: list = field(default_factory=list)

    def __post_init__(self) -> None:
        self.d, self.hq = self.q.shape[-1], self.q.shape[-2]
        self.hk = self.k.shape[-2]
        self.scale = self.scale or self.d**-0.5
        self.batch = len(self.cu_q) - 1 if self.cu_q else self.q.shape[0]
        self.group = self.hq // self.hk
        self.tile_tokens = 128 // self.group if self.share else 128
        self.mask_heads = self.hk if self.share else self.hq
        qb = self.cu_q or [i * self.q.shape[1] for i in range(self.batch + 1)]
        self.q_begin, self.q_len = qb[:-1], [qb[i + 1] - qb[i] for i in range(self.batch)]
        if self.used_k:
            self.k_len = self.used_k
        elif self.cu_k:
            self.k_len = [self.cu_k[i + 1] - self.cu_k[i] for i in range(self.batch)]
        else:
            self.k_len = [self.k.shape[1]] * self.batch
        self.max_k = self.max_k or (
            max(self.k_len) if (self.table is not None or self.cu_k) else self.k.shape[1]
        )
        self.total_q = qb[-1]
        self.tile_rows = self.total_q // self.tile_tokens + self.batch
        self.words = -(-self.max_k // (64 * self.block_size))

    def keys(self, t: torch.Tensor, b: int) -> torch.Tensor:
        n = self.k_len[b]
        if self.table is not None:
            pages = -(-n // t.shape[1])
            return t[self.table[b, :pages].long()].reshape(-1, *t.shape[2:])[:n]
        if self.cu_k:
            return t[self.cu_k[b] : self.cu_k[b] + n]
        return t[b, :n]

    def queries(self, t: torch.Tensor, b: int) -> torch.Tensor:
        return t[self.cu_q[b] : self.cu_q[b + 1]] if self.cu_q else t[b]

    def tiles(self, b: int) -> int:
        return -(-self.q_len[b] // self.tile_tokens)

    def full_visible(self, b: int, m: int) -> tuple[int, int]:
        blocks = -(-self.k_len[b] // self.block_size)
        if not self.causal:
            return blocks, blocks
        prefix = self.k_len[b] - self.q_len[b]
        end = min((m + 1) * self.tile_tokens, self.q_len[b])
        visible = min(blocks, (prefix + end - 1) // self.block_size + 1)
        return min(visible, (prefix + m * self.tile_tokens) // self.block_size), visible

    def prepare(self) -> None:
        dev, packed = self.q.device, self.cu_q is not None
        i32 = lambda x: torch.tensor(x, dtype=torch.int32, device=dev)  # noqa: E731
        live = self._live
        p = Problem(
            c.sizeof(Problem),
            1,
            0,
            self.batch,
            self.hq,
            self.hk,
            self.d,
            self.causal,
            1,
            self.scale,
            self.total_q,
            self.cu_k[-1] if self.cu_k else 0,
            max(self.q_len),
            self.max_k,
        )
        p.q = _tensor(self.q, packed)
        kv_packed = self.cu_k is not None and self.table is None
        p.k, p.v = _tensor(self.k, kv_packed), _tensor(self.v, kv_packed)
        for name, value in (
            ("cu_seqlens_q", self.cu_q),
            ("cu_seqlens_k", self.cu_k),
            ("seqused_k", self.used_k),
        ):
            if value is not None:
                t = i32(value)
                live.append(t)
                setattr(p, name, t.data_ptr())
        if self.table is not None:
            live.append(self.table)
            p.block_table, p.block_table_stride = self.table.data_ptr(), self.table.stride(0)
            p.pages_per_seq, p.page_size, p.page_count = self.table.shape[1], self.k.shape[1], self.k.shape[0]
        m = BlockMask(
            c.sizeof(BlockMask),
            self.mask_heads,
            self.tile_tokens,
            self.block_size,
            self.share,
            self.correct,
            self.tile_rows,
            self.words,
        )
        if self.keep is not None:
            bits = torch.zeros(self.mask_heads, self.tile_rows, self.words * 64, dtype=torch.bool, device=dev)
            for b in range(self.batch):
                base = self.q_begin[b] // self.tile_tokens + b
                keep = self.keep[b]
                bits[:, base : base + keep.shape[1], : keep.shape[2]] = keep
            weights = (1 << torch.arange(8, device=dev)).to(torch.uint8)
            self.bits = (bits.view(*bits.shape[:2], -1, 8).to(torch.uint8) * weights).sum(-1).to(torch.uint8)
            m.bits = self.bits.data_ptr()
        self.k_means = self.v_means = None
        if self.correct:
            per = -(-self.max_k // self.block_size)
            rows = p.total_k // self.block_size + self.batch if kv_packed else self.batch * per
            means = []
            for t in (self.k, self.v):
                out = torch.full((self.hk, rows, self.d), float("nan"), dtype=t.dtype, device=dev)
                for b in range(self.batch):
                    x = self.keys(t, b)
                    base = self.cu_k[b] // self.block_size + b if kv_packed else b * per
                    for j in range(-(-self.k_len[b] // self.block_size)):
                        block = x[j * self.block_size : (j + 1) * self.block_size].float()
                        out[:, base + j] = block.mean(0).to(t.dtype)
                means.append(out)
            self.k_means, self.v_means = means
        self.out = torch.full_like(self.q, float("nan"), memory_format=torch.contiguous_format)
        if packed:
            self.lse = torch.full((self.hq, self.total_q), float("nan"), device=dev)
            lse_stride = (0, self.total_q, 1)
        else:
            self.lse = torch.full((self.batch, self.hq, self.q.shape[1]), float("nan"), device=dev)
            lse_stride = tuple(self.lse.stride())
        o = Output(
            c.sizeof(Output),
            0,
            _tensor(self.out, packed),
            self.lse.data_ptr() if self.lse_wanted else None,
            (c.c_int64 * 3)(*lse_stride),
        )
        self.scratch = torch.empty(256, dtype=torch.uint8, device=dev)
        self.c_problem, self.c_mask, self.c_output = p, m, o
        why = _lib.attend_unsupported(c.byref(p), c.byref(m), c.byref(o))
        if why:
            raise RuntimeError(why.decode())

    def launch(self, lib: c.CDLL = _lib) -> None:
        data = lambda t: c.c_void_p(t.data_ptr() if t is not None else None)  # noqa: E731
        status = lib.attend_launch(
            c.byref(self.c_problem),
            c.byref(self.c_mask),
            c.byref(self.c_output),
            data(self.k_means),
            data(self.v_means),
            data(self.scratch),
            c.c_void_p(torch.cuda.current_stream().cuda_stream),
        )
        if status != 0:
            raise RuntimeError(f"cudaError {status}")

    def reference(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """out [t, h, d] and lse [h, t] of each sequence, in float64."""
        outs, lses = [], []
        for b in range(self.batch):
            lq, lk = self.q_len[b], self.k_len[b]
            q = self.queries(self.q, b).double().transpose(0, 1)
            k, v = (
                self.keys(t, b).double().transpose(0, 1).repeat_interleave(self.group, 0)
                for t in (self.k, self.v)
            )
            if lq == 0:
                outs.append(q.transpose(0, 1)), lses.append(q.sum(-1))
                continue
            blocks = -(-lk // self.block_size)
            keep = torch.zeros(self.mask_heads, self.tiles(b), blocks, dtype=torch.bool, device=q.device)
            full = torch.zeros(self.tiles(b), blocks, dtype=torch.bool, device=q.device)
            for m in range(self.tiles(b)):
                f, vis = self.full_visible(b, m)
                full[m, :f] = True
                keep[:, m, :vis] = self.keep[b][:, m, :vis] if self.keep is not None else True
            rows = torch.arange(lq, device=q.device) // self.tile_tokens
            keep = keep.repeat_interleave(self.hq // self.mask_heads, 0)[:, rows]
            see = keep.repeat_interleave(self.block_size, -1)[..., :lk]
            if self.causal:
                pos = lk - lq + torch.arange(lq, device=q.device)
                see = see & (torch.arange(lk, device=q.device)[None] <= pos[:, None])
            s = (q @ k.transpose(1, 2) * self.scale).masked_fill(~see, float("-inf"))
            if self.correct:

                def mean(t, dtype, blocks=blocks):
                    return (
                        torch.stack(
                            [
                                t[:, j * self.block_size : (j + 1) * self.block_size].float().mean(1)
                                for j in range(blocks)
                            ],
                            1,
                        )
                        .to(dtype)
                        .double()
                    )

                km, vm = mean(k, self.k.dtype), mean(v, self.v.dtype)
                n = torch.full((blocks,), self.block_size, device=q.device)
                n[-1] = lk - (blocks - 1) * self.block_size
                sm = q @ km.transpose(1, 2) * self.scale + n.double().log()
                sm = sm.masked_fill(keep | ~full[rows][None], float("-inf"))
                s, v = torch.cat([s, sm], -1), torch.cat([v, vm], 1)
            lse = s.logsumexp(-1)
            w = (s - lse.clamp_min(-1e300)[..., None]).exp()
            outs.append((w @ torch.nan_to_num(v, nan=0.0)).transpose(0, 1))
            lses.append(lse)
        return outs, lses

    def errors(self) -> tuple[float, float]:
        """Largest error of out (absolute below 1, relative above) and of lse; inf for NaN or not written."""
        outs, lses = self.reference()
        worst, worst_lse = 0.0, 0.0
        for b in range(self.batch):
            if self.q_len[b] == 0:
                continue
            got = self.queries(self.out, b).double()
            e = ((got - outs[b]).abs() / outs[b].abs().clamp_min(1)).nan_to_num(nan=float("inf"))
            worst = max(worst, e.max().item())
            if self.lse_wanted:
                gl = (self.lse[:, self.cu_q[b] : self.cu_q[b + 1]] if self.cu_q else self.lse[b]).double()
                same = gl == lses[b]
                e = torch.where(same, torch.zeros_like(gl), (gl - lses[b]).abs()).nan_to_num(nan=float("inf"))
                worst_lse = max(worst_lse, e.max().item())
        return worst, worst_lse
