"""What a selection kept, computed on demand from the counts that `select` wrote."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._abi import FALLBACK_NAMES
from ._key_lists import place_of
from ._layout import Layout
from ._ops import ops_of
from .guard import GuardReport

__all__ = ["Stats"]


class Stats:
    """How many blocks of keys each sequence and head kept, and of how many.

    Nothing is computed, and no GPU is synchronised with, before an attribute is read. All arrays are of
    the library that the call's tensors came from, in host memory. A *mask head* is a query head, or with
    ``share_heads`` a KV head.
    """

    def __init__(
        self,
        layout: Layout,
        counts: Any,
        fallback: Any,
        tile_tokens: int,
        block_size: int,
        segment_tokens: int = 1,
        key_lists: Any = None,
        skipped: Any = None,
    ) -> None:
        self._layout = layout
        self._counts = counts
        self._fallback = fallback
        self._tile_tokens = tile_tokens
        self._block_size = block_size
        self._segment_tokens = segment_tokens
        self._key_lists = key_lists
        self._skipped_blocks = skipped
        self._read: dict[str, np.ndarray] | None = None
        self._guard: GuardReport | None = None

    def _with(self, guard: GuardReport | None) -> Stats:
        """Return the same, with what a guard found."""
        self._guard = guard
        return self

    @property
    def guard(self) -> GuardReport | None:
        """What the call's guard found: recall by head, its bounds, what was repaired. None without one."""
        return self._guard

    @property
    def _ops(self) -> Any:
        return ops_of("counts", self._counts)

    def _values(self) -> dict[str, np.ndarray]:
        if self._read is None:
            counts = self._ops.to_host(self._counts)
            batch, heads = self._layout.batch, counts.shape[0]
            kept, total = np.zeros((batch, heads), np.int64), np.zeros(batch, np.int64)
            fallback = np.array(self._ops.to_host(self._fallback), np.int32)
            for b, (begin, rows, keys) in enumerate(self._layout.sequences(self._ops)):
                if fallback[b] < 0:
                    continue  # left out: nothing was written for it
                visible = self._layout.visible(rows, keys, self._tile_tokens, self._block_size)
                first = begin // self._tile_tokens + b
                total[b] = sum(visible)
                kept[b] = counts[:, first : first + len(visible)].sum(axis=1, dtype=np.int64)
            share = np.ones((batch, heads), np.float64)
            np.divide(kept, total[:, None], out=share, where=total[:, None] > 0)
            self._read = {"kept": kept, "total": total, "density": share, "fallback": fallback}
        return self._read

    @property
    def kept(self) -> Any:
        """Kept blocks summed over tiles, int64 [batch, mask heads]."""
        return self._ops.from_host(self._values()["kept"])

    @property
    def total(self) -> Any:
        """Blocks that some row of their tile may see, summed over the tiles of one head, int64 [batch]."""
        return self._ops.from_host(self._values()["total"])

    @property
    def density(self) -> Any:
        """Kept / total, float64 [batch, mask heads]; 1 where there is nothing to keep."""
        return self._ops.from_host(self._values()["density"])

    @property
    def overflowed(self) -> Any:
        """Key lists for which the policy wanted more keys than they have room for, int64 [batch, mask heads].

        They hold the best of them. 0 for masks without key lists.
        """
        return self._ops.from_host(self._overflowed())

    def _overflowed(self) -> np.ndarray:
        full = np.zeros(self._values()["kept"].shape, np.int64)
        if self._key_lists is not None:
            numbers = np.asarray(self._ops.to_host(self._key_lists))[:, :, :2]
            for b, (begin, rows, _) in enumerate(self._layout.sequences(self._ops)):
                own = numbers[:, place_of(b, begin, rows, self._segment_tokens)]
                full[b] = (own[..., 1] > own[..., 0]).sum(axis=1)
        return full

    @property
    def skipped(self) -> Any:
        """Blocks among the kept ones that attention skipped (``Dense(skip=...)``), int64 [batch, mask heads].

        On average of a tile's rows, summed over tiles. 0 for masks that skip nothing, and before attention.
        """
        return self._ops.from_host(self._skipped())

    def _skipped(self) -> np.ndarray:
        skipped = np.zeros(self._values()["kept"].shape, np.int64)
        if self._skipped_blocks is not None:
            blocks = np.asarray(self._ops.to_host(self._skipped_blocks))
            for b, (begin, rows, _) in enumerate(self._layout.sequences(self._ops)):
                first = begin // self._tile_tokens + b
                tiles = -(-rows // self._tile_tokens)
                skipped[b] = blocks[:, first : first + tiles].sum(axis=1, dtype=np.int64)
        return skipped

    @property
    def fallback(self) -> Any:
        """Why a sequence was not selected for, int32 [batch]: 0 it was, 1 short, 2 the policy is Dense.

        3: of :class:`TokenSparse`, the sequence has a prefix or is a chunk; its inner policy saw it whole.
        -1: its lengths, which only the device could read, are impossible, and it was left out.
        """
        return self._ops.from_host(self._values()["fallback"])

    @property
    def reasons(self) -> list[str]:
        """:attr:`fallback` in words: selected, short, dense, prefix or chunk, or impossible lengths."""
        return [FALLBACK_NAMES[int(code)] for code in self._values()["fallback"]]

    @property
    def mean_density(self) -> float:
        """Kept blocks of all sequences and heads over all that could have been kept."""
        values = self._values()
        possible = int(values["total"].sum()) * values["kept"].shape[1]
        return float(values["kept"].sum() / possible) if possible else 1.0

    def __repr__(self) -> str:
        values = self._values()
        batch, heads = values["kept"].shape
        possible = int(values["total"].sum()) * heads
        reasons = self.reasons
        words = [
            f"{reasons.count(why)} {why}" for code, why in FALLBACK_NAMES.items() if code and why in reasons
        ]
        full, skipped = int(self._overflowed().sum()), int(self._skipped().sum())
        return (
            f"Stats(density {self.mean_density:.3f}: {int(values['kept'].sum())} of {possible} blocks kept, "
            f"{batch} sequence{'s' * (batch != 1)}, {heads} mask head{'s' * (heads != 1)}"
            + (f"; attention skipped {skipped} of them" if skipped else "")
            + (f"; {full} key list{'s' * (full != 1)} too short for what was wanted" if full else "")
            + (f"; not selected for: {', '.join(words)}" if words else "")
            + ("" if self._guard is None else f"; {self._guard}")
            + ")"
        )
