"""The layout of a batch: where its sequences lie in q and k, and their tiles and blocks.

A :class:`Layout` is what a call's shapes and index arrays say, checked as far as shapes can be; values inside
index arrays are the library's to check. It is written with nothing but shapes, integers and plain objects,
because torch.compile traces it. A mask keeps its layout, to find a sequence's bits again.
"""

from __future__ import annotations

from typing import Any

from . import _axes
from .errors import refuse, refuse_type, shown

TILE_ROWS = 128  # rows of a query tile, as in the library
_INDICES = ("cu_seqlens_q", "cu_seqlens_k", "seqused_k", "block_table")


def ceil_div(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


class Layout:
    """The sequences of one call."""

    def __init__(
        self,
        batch: int,
        total_q: int,
        max_seqlen_q: int,
        max_seqlen_k: int,
        causal: bool,
        cu_seqlens_q: Any = None,
        cu_seqlens_k: Any = None,
        seqused_k: Any = None,
        block_table: Any = None,
    ) -> None:
        self.batch = batch
        self.total_q = total_q
        self.max_seqlen_q = max_seqlen_q
        self.max_seqlen_k = max_seqlen_k
        self.causal = causal
        self.cu_seqlens_q = cu_seqlens_q
        self.cu_seqlens_k = cu_seqlens_k
        self.seqused_k = seqused_k
        self.block_table = block_table

    def mask_shape(self, heads: int, tile_tokens: int, block_size: int) -> tuple[int, int, int]:
        """Return the shape of a mask's words: heads, tile rows, words per row."""
        words = ceil_div(ceil_div(self.max_seqlen_k, block_size), 64)
        return heads, self.total_q // tile_tokens + self.batch, words

    def arguments(self) -> dict[str, Any]:
        """Return what the library's verbs take of it, by their names in _calls.py."""
        given = {
            "max_seqlen_q": self.max_seqlen_q,
            "max_seqlen_k": self.max_seqlen_k,
            "causal": self.causal,
        }
        for name in _INDICES:
            if (x := getattr(self, name)) is not None:
                given[name] = x
        return given

    def kept(self, ops: Any) -> Layout:
        """Return the layout for a mask to keep: its lengths are copies, and pages don't matter."""
        return Layout(
            self.batch,
            self.total_q,
            self.max_seqlen_q,
            self.max_seqlen_k,
            self.causal,
            None if self.cu_seqlens_q is None else ops.copy(self.cu_seqlens_q),
            None if self.cu_seqlens_k is None else ops.copy(self.cu_seqlens_k),
            None if self.seqused_k is None else ops.copy(self.seqused_k),
        )

    def to(self, device: Any) -> Layout:
        """Return the layout with its tensors on another device."""
        indices = (self.cu_seqlens_q, self.cu_seqlens_k, self.seqused_k, self.block_table)
        sizes = (self.batch, self.total_q, self.max_seqlen_q, self.max_seqlen_k, self.causal)
        return Layout(*sizes, *(None if x is None else x.to(device) for x in indices))

    def sequences(self, ops: Any) -> list[tuple[int, int, int]]:
        """Return (rows of q before it, rows, keys) of each sequence. Reads the index arrays."""
        cu_q, cu_k, used = (
            None if x is None else [int(n) for n in ops.to_host(x)]
            for x in (self.cu_seqlens_q, self.cu_seqlens_k, self.seqused_k)
        )
        result = []
        for b in range(self.batch):
            begin = cu_q[b] if cu_q else b * self.max_seqlen_q
            rows = cu_q[b + 1] - cu_q[b] if cu_q else self.max_seqlen_q
            keys = used[b] if used else cu_k[b + 1] - cu_k[b] if cu_k else self.max_seqlen_k
            result.append((begin, rows, keys))
        return result

    def visible(self, rows: int, keys: int, tile_tokens: int, block_size: int) -> list[int]:
        """Return for each tile of a sequence how many blocks some row of it may see."""
        blocks = ceil_div(keys, block_size)
        if not self.causal:
            return [blocks] * ceil_div(rows, tile_tokens)
        ends = [min(begin + tile_tokens, rows) for begin in range(0, rows, tile_tokens)]
        return [min(blocks, (keys - rows + end - 1) // block_size + 1) for end in ends]


def _length(name: str, value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value  # under torch.compile perhaps a symbol, which int() would fix to one number
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        refuse_type(name, shown(value), "an integer")
    return int(value)


def check_bool(name: str, value: Any) -> None:
    """Refuse what is not a bool, or 0 or 1."""
    if value is True or value is False:
        return
    if not isinstance(value, int) or value not in (0, 1):
        refuse_type(name, shown(value), "True or False")


def layout_of(
    ops: Any,
    tensors: tuple[Any, Any, Any],
    causal: bool,
    cu_seqlens: tuple[Any, Any],
    max_seqlens: tuple[Any, Any],
    seqused_k: Any,
    block_table: Any,
    doubt_axes: bool = False,
) -> Layout:
    """Check q, k and v (k again for select) against each other, and find the sequences.

    `doubt_axes`: warn where tokens and heads look swapped.
    """
    q, k, v = tensors
    max_seqlen_q, max_seqlen_k = max_seqlens
    for name, x in (("q", q), ("k", k), ("v", v)):
        ops.check(name, x, q)
    check_bool("causal", causal)

    (cu_q, cu_k), used, pages = cu_seqlens, seqused_k, block_table
    if cu_q is not None:
        cu_q = ops.index("cu_seqlens_q", cu_q, q, 1)
    if cu_k is not None:
        cu_k = ops.index("cu_seqlens_k", cu_k, q, 1)
    if used is not None:
        used = ops.index("seqused_k", used, q, 1)
    if pages is not None:
        pages = ops.index("block_table", pages, q, 2)

    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape  # torch makes an object each time

    # q
    if cu_q is not None:
        if len(q_shape) != 3:
            refuse("q.shape", tuple(q_shape), "[tokens, heads, head_dim] with cu_seqlens_q")
        if cu_q.shape[0] < 1:
            refuse("cu_seqlens_q", "empty", "of batch + 1 entries")
        batch, total_q = cu_q.shape[0] - 1, q_shape[0]
        longest_q = ops.longest(cu_q[1:] - cu_q[:-1], total_q)
        if max_seqlen_q is not None:
            longest_q = _length("max_seqlen_q", max_seqlen_q)
    else:
        if len(q_shape) not in (3, 4):
            refuse("q.shape", tuple(q_shape), "[tokens, heads, head_dim] or [batch, tokens, heads, head_dim]")
        batch, longest_q = (q_shape[0] if len(q_shape) == 4 else 1), q_shape[-3]
        total_q = batch * longest_q
        if max_seqlen_q is not None and _length("max_seqlen_q", max_seqlen_q) != longest_q:
            refuse("max_seqlen_q", max_seqlen_q, f"q's number of tokens ({longest_q}) without cu_seqlens_q")
    if cu_k is not None and cu_k.shape[0] != batch + 1:
        refuse("cu_seqlens_k.shape", tuple(cu_k.shape), f"({batch + 1},) for {batch} sequences")
    if used is not None and used.shape[0] != batch:
        refuse("seqused_k.shape", tuple(used.shape), f"({batch},) for {batch} sequences")

    # k and v
    if pages is not None:
        if len(k_shape) != 4:
            refuse("k.shape", tuple(k_shape), "[pages, page_size, kv_heads, head_dim] with block_table")
        if pages.shape[0] != batch:
            refuse("block_table.shape", tuple(pages.shape), f"({batch}, pages) for {batch} sequences")
        if used is None and cu_k is None:
            refuse(
                "seqused_k",
                None,
                "given with block_table, or cu_seqlens_k: nothing else says how many keys there are",
            )
        longest_k = pages.shape[1] * k_shape[1]
        if used is not None:
            longest_k = ops.longest(used, longest_k)
        elif cu_k is not None:
            longest_k = ops.longest(cu_k[1:] - cu_k[:-1], longest_k)
    elif cu_k is not None:
        if len(k_shape) != 3:
            refuse("k.shape", tuple(k_shape), "[tokens, kv_heads, head_dim] with cu_seqlens_k")
        longest_k = ops.longest(cu_k[1:] - cu_k[:-1], k_shape[0])
    else:
        axes = len(k_shape)
        if cu_q is not None and axes != 4:
            refuse("cu_seqlens_k", None, "given where q is packed, or k [batch, tokens, kv_heads, head_dim]")
        if cu_q is None and axes != len(q_shape):
            refuse("k.shape", tuple(k_shape), f"of as many axes as q ({len(q_shape)})")
        if axes == 4 and k_shape[0] != batch:
            refuse("k.shape[0]", k_shape[0], f"the number of sequences ({batch})")
        longest_k = k_shape[-3]
        if max_seqlen_k is not None and _length("max_seqlen_k", max_seqlen_k) != longest_k:
            refuse(
                "max_seqlen_k",
                max_seqlen_k,
                f"k's number of tokens ({longest_k}) where k is neither packed nor paged",
            )
    if max_seqlen_k is not None:
        longest_k = _length("max_seqlen_k", max_seqlen_k)
    if v_shape != k_shape:
        refuse("v.shape", tuple(v_shape), f"k's ({tuple(k_shape)})")
    if k_shape[-1] != q_shape[-1]:
        refuse("k.shape[-1]", k_shape[-1], f"q's head_dim ({q_shape[-1]})")
    if k_shape[-2] < 1 or q_shape[-2] < 1 or q_shape[-2] % k_shape[-2]:
        refuse(
            "q's number of heads",
            q_shape[-2],
            f"a positive multiple of k's ({k_shape[-2]}): {_axes.shapes(q_shape, k_shape)}",
        )
    if cu_q is None and cu_k is None and pages is None and not ops.tracing():
        if used is None:
            _axes.check_lengths(q_shape, k_shape, causal)
        if doubt_axes:
            _axes.warn_if_swapped(q_shape, k_shape)
    if longest_q < 0 or longest_k < 0:
        name, value = ("max_seqlen_q", longest_q) if longest_q < 0 else ("max_seqlen_k", longest_k)
        refuse(name, value, "at least 0")
    return Layout(batch, total_q, longest_q, longest_k, bool(causal), cu_q, cu_k, used, pages)


def tile_tokens_of(share_heads: bool, group: int) -> int:
    """Return the query tokens of a tile."""
    if share_heads and group > TILE_ROWS:
        refuse(
            "share_heads", True, f"False where more than {TILE_ROWS} query heads share a KV head ({group})"
        )
    return TILE_ROWS // group if share_heads else TILE_ROWS
