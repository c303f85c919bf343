"""Sketch: FlashPrefill with outliers."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Policy
from .library import DEFAULT


@dataclass(frozen=True, repr=False)
class Sketch(Policy):
    """Our own: FlashPrefill whose blocks are described by their outliers beside the rest's mean and variance.

    The mean of 128 keys hides the few of them that matter. Here the ``outliers`` keys farthest from the mean
    stand for themselves, and the rest for its mean and diagonal variance (docs: selectors).

    Args:
        mass: keep the smallest set of blocks that holds this share of the tile's estimated softmax mass, in
            (0, 1]. 0.95 unless ``alpha`` or ``gain`` is given: one of the three decides.
        alpha: keep blocks from this share of the tile's best score on, in [0, inf).
        gain: keep blocks, the best first, while share * sqrt(rest) is at least this, in (0, 1). share is a
            block's share of the tile's estimated mass, rest that of all blocks from it on.
        query_metric: outliers are the keys farthest from the mean as queries see it: each dimension of the
            distance weighs by the squares of a sample of the queries (the last row of each tile).
        outliers: keys a block that stand for themselves, 0 to 16.
        query_pool: rows; scores are those of means of so many consecutive query rows of a head, 1 to 128.
        sink_blocks: blocks kept at the beginning.
        window_blocks: blocks kept before and at the diagonal.
        dense_tail_blocks: blocks' worth of last query tiles that keep everything.
        block_size: keys a block.
        share_heads: one list for the query heads of a KV head.
        mean_correction: blocks left out count by their means.
        min_blocks: blocks; at least the top so many by score are kept.
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
    mean_correction: bool = DEFAULT
    min_blocks: int = DEFAULT
    gain: float | None = DEFAULT
    query_metric: bool = DEFAULT

    kind = "sketch"
