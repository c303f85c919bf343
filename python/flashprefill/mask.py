"""Block masks: which blocks of keys each tile of queries keeps, one bit each.

`select` makes them and `attend` obeys them. :meth:`BlockMask.from_dense` packs any selection that can be
expressed as bools.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _key_lists, _numpy_ops
from ._arrays import on_cuda
from ._layout import TILE_ROWS, Layout, ceil_div, check_bool, tile_tokens_of
from ._ops import ops_of
from .errors import refuse, refuse_type, shown
from .policies.checks import CORRECTIONS, MAX_TOKENS, check_choice, check_integer
from .stats import Stats

if TYPE_CHECKING:
    from .policies import Policy

__all__ = ["BlockMask"]


# Attributes of a mask by the names in _calls.py: what a selection writes, and what attention reads.
_LISTS = ("bits", "counts", "fallback", "vertical_slash", "key_lists", "skipped")
_SHAPE = ("tile_tokens", "block_size", "share_heads")
_CORRECTED = {False: "", True: ", mean-corrected", "summary": ", corrected by summary keys"}
_GIVEN = ("bits", *_SHAPE, "vertical_slash", "max_verticals", "key_lists", "segment_tiles", "skip", "skipped")


class BlockMask:
    """One bit for each (mask head, query tile, key block).

    A mask head is a query head, or with ``share_heads`` a KV head; a mask of one head fits any number of
    them. Make one with :func:`flashprefill.select` or :meth:`from_dense`.

    Attributes:
        bits: 64-bit words [mask heads, tile rows, words], as the C header describes them.
        tile_tokens: query tokens per tile.
        block_size: keys per block.
        share_heads: whether mask heads are KV heads.
        mean_correction: whether `attend` lets blocks left out count by their means; or ``"summary"``: 16 of
            them by one key, on the CPU.
        vertical_slash: keys finer than blocks (``MInference(rounding="tokens")``), int32
            [batch, mask heads, ...] as the C header describes them, or None.
        max_verticals: how many verticals they have room for.
        key_lists: single keys gathered for segments of tiles (:class:`flashprefill.Gather`), int32
            [mask heads, segment rows, 2 + room] as the C header describes them, or None. :meth:`keys` reads
            them.
        segment_tiles: tiles that share one of these lists.
        skip: below which share of the heaviest weight so far `attend` skips keys (``Dense(skip=...)``); 0:
            it skips none.
        skipped: blocks that each tile's rows skipped on average, int32 [mask heads, tile rows], written by
            `attend`; or None.
    """

    def __init__(
        self,
        layout: Layout,
        bits: Any,
        counts: Any,
        fallback: Any,
        tile_tokens: int,
        block_size: int,
        share_heads: bool,
        mean_correction: bool | str,
        vertical_slash: Any = None,
        max_verticals: int = 0,
        key_lists: Any = None,
        segment_tiles: int = 1,
        skip: float = 0.0,
        skipped: Any = None,
    ) -> None:
        self._layout = layout
        self.bits = bits
        self.counts = counts
        self.fallback = fallback
        self.tile_tokens = tile_tokens
        self.block_size = block_size
        self.share_heads = share_heads
        self.mean_correction = mean_correction
        self.vertical_slash = vertical_slash
        self.max_verticals = max_verticals
        self.key_lists = key_lists
        self.segment_tiles = segment_tiles
        self.skip = skip
        self.skipped = skipped

    @classmethod
    def _for_policy(cls, ops: Any, q: Any, k: Any, layout: Layout, policy: Policy) -> BlockMask:
        """Return an empty mask for the policy to fill."""
        tile_tokens = tile_tokens_of(policy.share_heads, q.shape[-2] // k.shape[-2])
        heads = k.shape[-2] if policy.share_heads else q.shape[-2]
        shape = layout.mask_shape(heads, tile_tokens, policy.block_size)
        room = (0, 0) if on_cuda(q) else policy._vertical_slash_room(layout.max_seqlen_k)
        list_room, segment_tiles = policy._key_list_room(layout.max_seqlen_k, tile_tokens)
        segment_rows = _key_lists.rows_of(layout, segment_tiles * tile_tokens)
        return cls(
            layout.kept(ops),
            ops.zero_words(q, shape),
            ops.zero_counts(q, shape[:2]),
            ops.zero_counts(q, (layout.batch,)),
            tile_tokens,
            policy.block_size,
            policy.share_heads,
            policy.corrects,
            ops.zero_counts(q, (layout.batch, heads, 2 + sum(room))) if sum(room) else None,
            room[0],
            ops.zero_counts(q, (heads, segment_rows, 2 + list_room)) if list_room else None,
            segment_tiles,
            policy.skips,
            ops.zero_counts(q, shape[:2]) if policy.skips else None,
        )

    @classmethod
    def from_dense(
        cls,
        keep: Any,
        *,
        q_len: int | None = None,
        k_len: int | None = None,
        block_size: int = 128,
        share_heads: bool = False,
        group: int = 1,
        causal: bool = True,
        mean_correction: bool | str = False,
        cu_seqlens_q: Any = None,
        cu_seqlens_k: Any = None,
        keys: Any = None,
        segment_tiles: int = 1,
    ) -> BlockMask:
        """Pack a mask from bools. Bits in the future are ignored.

        Args:
            keep: bool [mask heads or 1, tiles, blocks], a NumPy array or a torch tensor; a list of them (or
                one array of 4 axes) for a batch.
            q_len: query tokens of each sequence.
            k_len: keys of each sequence.
            block_size: keys per block, a multiple of 16 from 16 to 1024.
            share_heads: mask heads are KV heads, and tiles have 128 // group tokens instead of 128.
            group: query heads per KV head; only read with share_heads.
            causal: whether queries see only keys up to their own position (the last query sees the last key).
            mean_correction: blocks left out count by their means; ``"summary"``: 16 of them by one key.
            cu_seqlens_q: cumulative query lengths of packed sequences; keep is a list then.
            cu_seqlens_k: cumulative key lengths; without them the keys are as many as the queries.
            keys: single keys beside the blocks, as :meth:`keys` returns them: for each mask head and each
                segment, ascending; a list of such where keep is one.
            segment_tiles: tiles that share a list of these.
        """
        check_bool("share_heads", share_heads)
        check_bool("causal", causal)
        mean_correction = check_choice("mean_correction", mean_correction, CORRECTIONS)
        if isinstance(block_size, bool) or not isinstance(block_size, (int, np.integer)):
            refuse_type("block_size", shown(block_size), "an integer")
        if not 16 <= block_size <= 1024 or block_size % 16:
            refuse("block_size", block_size, "a multiple of 16 from 16 to 1024")
        if share_heads and not 1 <= group <= TILE_ROWS:
            refuse("group", group, f"from 1 to {TILE_ROWS}")
        batched = isinstance(keep, (list, tuple)) or getattr(keep, "ndim", 0) == 4
        parts = list(keep) if batched else [keep]
        tile_tokens = tile_tokens_of(share_heads, group)
        ops = (
            ops_of("keep", parts[0], "a NumPy array or a torch tensor of bools, or a list of them")
            if parts
            else _numpy_ops
        )
        parts = [ops.as_bool("keep", part) for part in parts]
        layout = _dense_layout(ops, parts, q_len, k_len, cu_seqlens_q, cu_seqlens_k, causal)
        heads = parts[0].shape[0] if parts and parts[0].ndim == 3 else 1

        shape = layout.mask_shape(heads, tile_tokens, block_size)
        like = parts[0] if parts else None
        mask = cls(
            layout,
            ops.zero_words(like, shape),
            ops.zero_counts(like, shape[:2]),
            ops.zero_counts(like, (layout.batch,)),
            tile_tokens,
            int(block_size),
            bool(share_heads),
            mean_correction,
        )
        for b, (place, part) in enumerate(zip(layout.sequences(ops), parts, strict=True)):
            name = f"keep[{b}].shape" if len(parts) > 1 else "keep.shape"
            wanted = (heads, ceil_div(place[1], tile_tokens), ceil_div(place[2], block_size))
            if tuple(part.shape) != wanted:
                refuse(
                    name,
                    tuple(part.shape),
                    f"{wanted}: heads, tiles of {tile_tokens} tokens, blocks of {block_size} keys",
                )
            mask._write(b, place, part)
        if keys is not None:
            check_integer("segment_tiles", segment_tiles, 1, MAX_TOKENS)
            mask.segment_tiles = segment_tiles
            mask._write_keys(list(keys) if batched else [keys], like)
        return mask

    def _write_keys(self, parts: Sequence[Any], like: Any) -> None:
        """Write the key lists of all sequences, and count what they add."""
        ops, places = self._ops, self._layout.sequences(self._ops)
        if len(parts) != len(places):
            refuse("keys", f"for {len(parts)} sequences", f"for {len(places)}")
        lists = _key_lists.packed(parts, self.heads, self._layout, places, self._segment_tokens)
        self.key_lists = ops.zero_counts(like, lists.shape)
        self.key_lists[:] = ops.from_host(lists)
        for b, (begin, rows, keys) in enumerate(places):
            first = begin // self.tile_tokens + b
            dense = np.asarray(ops.to_host(self._blocks(b)))
            for h, head in enumerate(self.keys(b)):
                for m in range(ceil_div(rows, self.tile_tokens)):
                    one = head[m // self.segment_tiles]
                    end = keys - rows + min((m + 1) * self.tile_tokens, rows)
                    added = int((~dense[h, m, one[one < end] // self.block_size]).sum())
                    self.counts[h, first + m] += (added + self.block_size // 2) // self.block_size

    @property
    def _segment_tokens(self) -> int:
        return self.segment_tiles * self.tile_tokens

    @property
    def _ops(self) -> Any:
        return ops_of("bits", self.bits)

    @property
    def _lists(self) -> dict[str, Any]:
        """What a selection writes, by the names in _calls.py."""
        return {name: getattr(self, name) for name in _LISTS}

    @property
    def _given(self) -> dict[str, Any]:
        """What attention reads, by the names in _calls.py."""
        given = {name: getattr(self, name) for name in _GIVEN}
        return {**given, "mean_correction": CORRECTIONS.index(self.mean_correction)}

    def _write(self, seq: int, place: tuple[int, int, int], keep: Any) -> None:
        """Write the bits and counts of one sequence, without bits in the future.

        Args:
            seq: the sequence.
            place: its first query token, its query tokens and its keys.
            keep: bool [mask heads, tiles, blocks], of the mask's array library and device.
        """
        ops, (begin, rows, keys) = self._ops, place
        limits = self._layout.visible(rows, keys, self.tile_tokens, self.block_size)
        keep = keep & ops.visible_before(limits, keep.shape[2], keep)
        first = begin // self.tile_tokens + seq
        self.bits[:, first : first + keep.shape[1]] = ops.pack(keep, self.bits.shape[2])
        self.counts[:, first : first + keep.shape[1]] = keep.sum(-1)

    @property
    def heads(self) -> int:
        """Mask heads."""
        return int(self.bits.shape[0])

    @property
    def batch(self) -> int:
        """Sequences."""
        return self._layout.batch

    @property
    def causal(self) -> bool:
        """Whether the mask was made for causal attention."""
        return self._layout.causal

    def _sequence(self, seq: int) -> tuple[int, int, int]:
        if not -self.batch <= seq < self.batch:
            refuse("seq", seq, f"a sequence of the batch, from 0 to {self.batch - 1}")
        return self._layout.sequences(self._ops)[seq]

    def dense(self, seq: int = 0) -> Any:
        """Return the mask of one sequence as bool [mask heads, tiles, blocks].

        Where the mask has verticals, slashes or key lists, blocks that hold a key of one are True too, though
        not all of their keys may be kept.
        """
        _, rows, keys = self._sequence(seq)
        keep = self._blocks(seq % self.batch)
        if self.vertical_slash is not None:
            keep = keep | self._ops.from_host(self._on_vertical_slash(seq % self.batch, rows, keys), keep)
        if self.key_lists is not None:
            visible = self._layout.visible(rows, keys, self.tile_tokens, self.block_size)
            blocks = ceil_div(keys, self.block_size)
            listed = _key_lists.blocks_of(
                self.keys(seq), visible, blocks, self.block_size, self.segment_tiles
            )
            keep = keep | self._ops.from_host(listed, keep)
        return keep

    def _blocks(self, seq: int) -> Any:
        """Return the bits of one sequence as bool [mask heads, tiles, blocks]."""
        begin, rows, keys = self._sequence(seq)
        first = begin // self.tile_tokens + seq
        bits = self.bits[:, first : first + ceil_div(rows, self.tile_tokens)]
        return self._ops.unpack(bits, ceil_div(keys, self.block_size))

    def keys(self, seq: int = 0) -> list[list[np.ndarray]]:
        """Return the key lists of one sequence: for each mask head and segment, ascending key indices.

        A segment is :attr:`segment_tiles` tiles. Masks without lists have empty ones.
        """
        begin, rows, _ = self._sequence(seq)
        place = _key_lists.place_of(seq % self.batch, begin, rows, self._segment_tokens)
        if self.key_lists is None:
            return [[np.empty(0, np.int32)] * (place.stop - place.start) for _ in range(self.heads)]
        return _key_lists.unpacked(np.asarray(self._ops.to_host(self.key_lists))[:, place])

    def _on_vertical_slash(self, seq: int, rows: int, keys: int) -> np.ndarray:
        """Return the visible blocks that hold a key of a vertical or slash, bool [heads, tiles, blocks]."""
        tiles, blocks = ceil_div(rows, self.tile_tokens), ceil_div(keys, self.block_size)
        touched = np.zeros((self.heads, tiles, blocks), np.bool_)
        visible = self._layout.visible(rows, keys, self.tile_tokens, self.block_size)
        for h, extra in enumerate(np.asarray(self._ops.to_host(self.vertical_slash))[seq]):
            verticals, slashes = extra[2 : 2 + extra[0]], extra[2 + self.max_verticals :][: extra[1]]
            touched[h][:, verticals // self.block_size] = True
            for m in range(tiles):
                begin = m * self.tile_tokens + keys - rows
                last = min(begin + self.tile_tokens, keys) - 1 - slashes
                blocks_of = (np.maximum(begin - slashes, 0)[last >= 0], last[last >= 0])
                crossed = np.zeros(blocks + 1, np.int64)
                np.add.at(crossed, blocks_of[0] // self.block_size, 1)
                np.add.at(crossed, blocks_of[1] // self.block_size + 1, -1)
                touched[h, m] |= np.cumsum(crossed)[:blocks] > 0
                touched[h, m, visible[m] :] = False
        return touched

    def to(self, device: Any) -> BlockMask:
        """Return the mask in the memory of another device, such as "cuda". For masks of torch tensors."""
        moved = {name: None if x is None else x.to(device) for name, x in self._lists.items()}
        return BlockMask(
            self._layout.to(device),
            moved["bits"],
            moved["counts"],
            moved["fallback"],
            self.tile_tokens,
            self.block_size,
            self.share_heads,
            self.mean_correction,
            moved["vertical_slash"],
            self.max_verticals,
            moved["key_lists"],
            self.segment_tiles,
            self.skip,
            moved["skipped"],
        )

    @property
    def stats(self) -> Stats:
        """Kept blocks by sequence and head."""
        shape = (self.tile_tokens, self.block_size, self._segment_tokens)
        return Stats(self._layout, self.counts, self.fallback, *shape, self.key_lists, self.skipped)

    @property
    def density(self) -> float:
        """Kept blocks over those that are visible to their tile, over all sequences and heads."""
        return self.stats.mean_density

    def plot(
        self, target: Any = None, *, seq: int = 0, head: int | None = None, title: str | None = None
    ) -> Any:
        """Draw the mask of one sequence: query tiles down, key blocks to the right. Needs matplotlib.

        Args:
            target: a path to save the picture to, matplotlib axes to draw into, or None for a new figure.
            seq: the sequence.
            head: the mask head; None draws the share of heads that keep each block.
            title: the title; the default says density and head.

        Returns:
            The axes.
        """
        keep = np.asarray(self._ops.to_host(self.dense(seq)))
        if head is not None and not -keep.shape[0] <= head < keep.shape[0]:
            refuse("head", head, f"a mask head, from 0 to {keep.shape[0] - 1}")
        _, rows, keys = self._sequence(seq)
        visible = np.asarray(self._layout.visible(rows, keys, self.tile_tokens, self.block_size))
        unseen = np.arange(keep.shape[2])[None, :] >= visible[:, None]
        picture: Any = np.ma.array(
            keep.mean(axis=0) if head is None else keep[head], mask=unseen, dtype=float
        )

        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "plot needs matplotlib: pip install matplotlib", name=error.name
            ) from None

        saved = isinstance(target, (str, os.PathLike))
        axes = (
            Figure(figsize=(5, 5), layout="constrained").add_subplot() if saved or target is None else target
        )
        axes.imshow(picture, cmap="Blues", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
        axes.set_facecolor("#e8e8e8")
        axes.set_xlabel(f"key blocks of {self.block_size}")
        axes.set_ylabel(f"query tiles of {self.tile_tokens}")
        if title is None:
            share = float(picture.mean()) if picture.count() else 1.0
            title = f"{'all heads' if head is None else f'head {head}'}, density {share:.3f}"
        axes.set_title(title)
        if saved:
            figure: Any = axes.figure
            figure.savefig(target, dpi=150)
        return axes

    def __repr__(self) -> str:
        return (
            f"BlockMask({self.batch} sequence{'s' * (self.batch != 1)}, {self.heads} "
            f"{'KV ' * self.share_heads}head{'s' * (self.heads != 1)}, tiles of {self.tile_tokens} tokens, "
            f"blocks of {self.block_size} keys{_CORRECTED[self.mean_correction]}"
            + (f", skipping below {self.skip:g})" if self.skip else ")")
        )


def _dense_layout(
    ops: Any, parts: Sequence[Any], q_len: Any, k_len: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, causal: bool
) -> Layout:
    for index, part in enumerate(parts):
        if part.ndim != 3:
            refuse(
                f"keep[{index}].ndim" if len(parts) > 1 else "keep.ndim", part.ndim, "3: heads, tiles, blocks"
            )
    like = parts[0] if parts else None
    batch = len(parts)
    if cu_seqlens_q is not None:
        if q_len is not None or k_len is not None:
            refuse(
                "q_len" if q_len is not None else "k_len",
                q_len if q_len is not None else k_len,
                "None with cu_seqlens_q",
            )
        cu_q = ops.index("cu_seqlens_q", cu_seqlens_q, like, 1)
        cu_k = cu_q if cu_seqlens_k is None else ops.index("cu_seqlens_k", cu_seqlens_k, like, 1)
        for name, cu in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
            if cu.shape[0] != batch + 1:
                refuse(f"{name}.shape", tuple(cu.shape), f"({batch + 1},) for {batch} masks in keep")
            steps = np.diff(np.asarray(ops.to_host(cu)))
            if (steps < 0).any() or int(cu[0]) != 0:
                refuse(name, [int(n) for n in ops.to_host(cu)], "cumulative, from 0 on")
        lengths = [np.diff(np.asarray(ops.to_host(cu))) for cu in (cu_q, cu_k)]
        longest = [int(x.max()) if x.size else 0 for x in lengths]
        layout = Layout(batch, int(cu_q[-1]), longest[0], longest[1], bool(causal), cu_q, cu_k).kept(ops)
        short = [b for b in range(batch) if causal and lengths[1][b] < lengths[0][b]]
        if short:
            refuse(
                f"cu_seqlens_k's length of sequence {short[0]}",
                int(lengths[1][short[0]]),
                "at least its query length",
            )
        return layout
    if cu_seqlens_k is not None:
        refuse("cu_seqlens_q", None, "given with cu_seqlens_k")
    for name, value in (("q_len", q_len), ("k_len", k_len)):
        if value is None:
            refuse_type(name, "None", "given, an integer, where cu_seqlens_q is not")
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            refuse_type(name, shown(value), "an integer")
        if value < 0:
            refuse(name, value, "at least 0")
    assert q_len is not None and k_len is not None
    if causal and k_len < q_len:
        refuse("k_len", k_len, f"at least q_len ({q_len}) with causal=True")
    return Layout(batch, batch * int(q_len), int(q_len), int(k_len), bool(causal))
