"""Sketch: FlashPrefill with outliers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .base import Policy
from .library import DEFAULT


@dataclass(frozen=True, repr=False)
class Sketch(Policy):
    """FlashPrefill with outliers: our own method.

    The mean of 128 keys hides the few that matter. Here the ``outliers`` keys farthest from a block's mean
    are scored one by one, and the rest by its mean and diagonal variance. See docs/methods/sketch.md.

    Args:
        mass: keep the smallest set of blocks that holds this share of the tile's estimated softmax mass, in
            (0, 1]. 0.95 unless ``alpha`` or ``gain`` is given: one of the three decides.
        alpha: keep blocks from this share of the tile's best score on, in [0, inf).
        gain: keep blocks, the best first, while share * sqrt(rest) is at least this, in (0, 1). ``share`` is
            the block's share of the tile's estimated mass, ``rest`` the share of all blocks from it on.
        query_metric: measure the distance from the mean as queries see it: dimensions are weighted by the
            mean squares of a sample of the queries (the last row of each tile).
        outliers: keys per block that are scored one by one, 0 to 16.
        query_pool: rows; means of ``query_pool`` consecutive query rows of a head are scored, 1 to 128.
        sink_blocks: blocks at the beginning that are always kept.
        window_blocks: blocks before and at the diagonal that are always kept.
        dense_tail_blocks: the last query tiles of a prompt, in blocks, that keep everything.
        block_size: keys per block.
        share_heads: one list for the query heads of a KV head.
        mean_correction: blocks left out count by their means; "summary": 16 of them by one key.
        min_blocks: blocks; the top ``min_blocks`` by score are always kept.
    """

    mass: float | None = DEFAULT
    alpha: float | None = DEFAULT
    outliers: int = DEFAULT
    query_pool: int = DEFAULT
    sink_blocks: int = DEFAULT
    window_blocks: int = DEFAULT
    dense_tail_blocks: int = DEFAULT
    block_size: int = DEFAULT
    share_heads: bool = DEFAULT
    mean_correction: bool | str = DEFAULT
    min_blocks: int = DEFAULT
    gain: float | None = DEFAULT
    query_metric: bool = DEFAULT

    kind = "sketch"

    def _rules(self, values: dict[str, Any]) -> None:
        self._doubt_alpha(values)

    def _row_unit(self) -> int | None:
        return None if self.query_metric else 1  # the metric is made of rows of the whole prompt
