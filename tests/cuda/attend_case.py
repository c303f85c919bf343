"""One call of fp_attend on a GPU: torch tensors in, and a float64 reference for the result."""

from __future__ import annotations

import ctypes as c
import os
from dataclasses import dataclass, field

import torch

from flashprefill import _abi

DTYPES = {torch.bfloat16: _abi.BF16, torch.float16: _abi.F16, torch.float8_e4m3fn: _abi.E4M3}


def load(path: str) -> c.CDLL:
    """Load another build of the library, to compare with."""
    lib = c.CDLL(path)
    lib.fp_attend.argtypes = _abi.lib.fp_attend.argtypes
    return lib


def _tensor(t: torch.Tensor, packed: bool) -> _abi.Tensor:
    strides = ([0] + list(t.stride())) if packed else list(t.stride())
    return _abi.Tensor(t.data_ptr(), DTYPES[t.dtype], 0, (c.c_int64 * 4)(*strides))


@dataclass
class Case:
    """A call. q: [b, t, h, d], or [t, h, d] with cu_q; k and v the same, or paged [pages, slots, h, d]."""

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
    keep: list[torch.Tensor] | None = None  # by sequence: bool [mask heads, tiles, blocks]; None: everything
    lists: list[list[list[list[int]]]] | None = None  # key lists by sequence, mask head, segment; ascending
    segment_tiles: int = 1
    max_k: int = 0
    lse_wanted: bool = True
    target: str | None = None  # of the backend; else FLASHPREFILL_TEST_TARGET's
    math: int = 0  # fp_math: 1 permits 8-bit products
    k_scale: torch.Tensor | None = None  # of FP8 keys, [b, hk]; None: 1
    v_scale: torch.Tensor | None = None
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
        """Return the keys (or values) of a sequence."""
        n = self.k_len[b]
        if self.table is not None:
            pages = -(-n // t.shape[1])
            raw = t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t  # indexing knows no FP8
            return raw[self.table[b, :pages].long()].view(t.dtype).reshape(-1, *t.shape[2:])[:n]
        if self.cu_k:
            return t[self.cu_k[b] : self.cu_k[b] + n]
        return t[b, :n]

    def worth(self, t: torch.Tensor, b: int) -> torch.Tensor:
        """Return what the keys (or values) of a sequence stand for, in float64."""
        scale = self.k_scale if t is self.k else self.v_scale
        stored = self.keys(t, b).double()
        return stored if scale is None else stored * scale[b].double()[:, None]

    def queries(self, t: torch.Tensor, b: int) -> torch.Tensor:
        """Return the rows of a sequence in q or out."""
        return t[self.cu_q[b] : self.cu_q[b + 1]] if self.cu_q else t[b]

    def tiles(self, b: int) -> int:
        """Return the number of query tiles of a sequence."""
        return -(-self.q_len[b] // self.tile_tokens)

    def full_visible(self, b: int, m: int) -> tuple[int, int]:
        """Return how many blocks every row of a tile sees whole, and how many some row sees."""
        blocks = -(-self.k_len[b] // self.block_size)
        if not self.causal:
            return blocks, blocks
        prefix = self.k_len[b] - self.q_len[b]
        end = min((m + 1) * self.tile_tokens, self.q_len[b])
        visible = min(blocks, (prefix + end - 1) // self.block_size + 1)
        return min(visible, (prefix + m * self.tile_tokens) // self.block_size), visible

    def prepare(self) -> None:
        """Make the structs, the mask's bits, outputs full of NaN, and scratch memory."""
        device, packed = self.q.device, self.cu_q is not None
        p = _abi.sized(_abi.Problem)
        p.device, p.device_index = _abi.CUDA, device.index or 0
        p.batch, p.q_heads, p.kv_heads, p.head_dim = self.batch, self.hq, self.hk, self.d
        p.causal, p.final_chunk, p.softmax_scale = self.causal, 1, self.scale
        p.total_q, p.max_seqlen_q, p.max_seqlen_k = self.total_q, max(self.q_len), self.max_k
        kv_packed = self.cu_k is not None and self.table is None
        p.total_k = self.cu_k[-1] if self.cu_k else self.batch * self.max_k
        p.q, p.k, p.v = _tensor(self.q, packed), _tensor(self.k, kv_packed), _tensor(self.v, kv_packed)
        for name, scale in (("k_scale", self.k_scale), ("v_scale", self.v_scale)):
            if scale is not None:
                setattr(p, name, scale.data_ptr())
                setattr(p, f"{name}_stride", (c.c_int64 * 2)(*scale.stride()))
        lengths = {"cu_seqlens_q": self.cu_q, "cu_seqlens_k": self.cu_k, "seqused_k": self.used_k}
        for name, values in lengths.items():
            if values is not None:
                self._live.append(torch.tensor(values, dtype=torch.int32, device=device))
                setattr(p, name, self._live[-1].data_ptr())
        if self.table is not None:
            p.block_table, p.block_table_stride = self.table.data_ptr(), self.table.stride(0)
            p.pages_per_seq, p.page_size, p.page_count = self.table.shape[1], self.k.shape[1], self.k.shape[0]

        m = _abi.sized(_abi.BlockMask)
        m.heads, m.tile_tokens, m.block_size = self.mask_heads, self.tile_tokens, self.block_size
        m.share_heads, m.mean_correction = self.share, self.correct
        m.tile_rows, m.words = self.tile_rows, self.words
        self.bits = self._bits()
        m.bits = self.bits.data_ptr()
        if self.lists is not None:
            self.key_lists = self._key_lists()
            m.key_lists, m.segment_rows = self.key_lists.data_ptr(), self.key_lists.shape[1]
            m.segment_tiles, m.max_keys = self.segment_tiles, self.key_lists.shape[2] - 2

        o = _abi.sized(_abi.Output)
        self.out = torch.full_like(self.q, float("nan"), memory_format=torch.contiguous_format)
        o.out = _tensor(self.out, packed)
        shape = (self.hq, self.total_q) if packed else (self.batch, self.hq, self.q.shape[1])
        self.lse = torch.full(shape, float("nan"), device=device)
        o.lse = self.lse.data_ptr() if self.lse_wanted else None
        o.lse_stride = (c.c_int64 * 3)(*([0] if packed else []), *self.lse.stride())

        e = _abi.sized(_abi.Exec)
        target = self.target or os.environ.get("FLASHPREFILL_TEST_TARGET")
        e.target = target.encode() if target else None
        e.stream = torch.cuda.current_stream().cuda_stream
        e.math = self.math
        size = c.c_size_t()
        _abi.check(_abi.lib.fp_attend_workspace(c.byref(p), c.byref(m), c.byref(e), c.byref(size)))
        self.scratch = torch.empty(size.value, dtype=torch.uint8, device=device)
        self._structs = p, m, e, o

    def _bits(self) -> torch.Tensor:
        shape = (self.mask_heads, self.tile_rows, self.words * 64)
        if self.keep is None:
            return torch.full((*shape[:2], self.words * 8), 255, dtype=torch.uint8, device=self.q.device)
        bits = torch.zeros(shape, dtype=torch.bool, device=self.q.device)
        for b, keep in enumerate(self.keep):
            base = self.q_begin[b] // self.tile_tokens + b
            bits[:, base : base + keep.shape[1], : keep.shape[2]] = keep
        weights = (1 << torch.arange(8, device=self.q.device)).to(torch.uint8)
        return (bits.view(*shape[:2], -1, 8).to(torch.uint8) * weights).sum(-1).to(torch.uint8)

    def _key_lists(self) -> torch.Tensor:
        """Return the header's array, full of a number that is no key where no list is."""
        tokens = self.segment_tiles * self.tile_tokens
        longest = max((len(one) for part in self.lists for head in part for one in head), default=0)
        made = torch.full(
            (self.mask_heads, self.total_q // tokens + self.batch, 2 + max(1, longest)), -7, dtype=torch.int32
        )
        made[:, :, :2] = 0
        for b, part in enumerate(self.lists):
            base = self.q_begin[b] // tokens + b
            for h, head in enumerate(part):
                for i, one in enumerate(head):
                    row = made[h, base + i]
                    row[0] = row[1] = len(one)
                    row[2 : 2 + len(one)] = torch.tensor(one, dtype=torch.int32)
        return made.to(self.q.device)

    def _listed(self, b: int) -> torch.Tensor:
        """Return the keys that lists name in sequence b, bool [mask heads, query tokens, keys]."""
        named = torch.zeros(self.mask_heads, self.q_len[b], self.k_len[b], dtype=torch.bool)
        tokens = self.segment_tiles * self.tile_tokens
        for h, head in enumerate(self.lists[b]):
            for i, one in enumerate(head):
                named[h, i * tokens : (i + 1) * tokens, torch.tensor(one, dtype=torch.long)] = True
        return named.to(self.q.device)

    def launch(self, lib: c.CDLL = _abi.lib) -> None:
        """Attend, on the stream that was current in `prepare`."""
        p, m, e, o = (c.byref(struct) for struct in self._structs)
        _abi.check(lib.fp_attend(p, m, e, o, self.scratch.data_ptr(), self.scratch.numel()))

    def reference(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return out [t, h, d] and lse [h, t] of each sequence, in float64."""
        outs, lses = [], []
        for b in range(self.batch):
            lq, lk = self.q_len[b], self.k_len[b]
            q = self.queries(self.q, b).double().transpose(0, 1)
            k, v = (
                self.worth(t, b).transpose(0, 1).repeat_interleave(self.group, 0) for t in (self.k, self.v)
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
            if self.lists is not None:
                see = see | self._listed(b).repeat_interleave(self.hq // self.mask_heads, 0)
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

                km, vm = mean(k, self.q.dtype), mean(v, self.q.dtype)
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
        """Return the largest error of out (absolute below 1, relative above) and of lse; inf for NaN."""
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
