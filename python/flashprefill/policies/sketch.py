"""Sketch: FlashPrefill with outliers."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import refuse
from .base import Policy
from .checks import check_alpha, check_integer, check_number


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

    mass: float | None = None
    alpha: float | None = None
    outliers: int = 4
    query_pool: int = 16
    sink_blocks: int = 2
    window_blocks: int = 4
    dense_tail_blocks: int = 2
    block_size: int = 128
    share_heads: bool = False
    mean_correction: bool = False
    min_blocks: int = 0
    gain: float | None = None
    query_metric: bool = False

    kind = "sketch"

    def __post_init__(self) -> None:
        mass, alpha, gain = self.mass, self.alpha, self.gain
        if mass is not None and alpha is not None:
            refuse("alpha", alpha, f"None where mass is given ({mass}): one of them decides")
        for name, other in (("mass", mass), ("alpha", alpha)):
            if gain is not None and other is not None:
                refuse("gain", gain, f"None where {name} is given ({other}): one of them decides")
        if gain is not None:
            gain = check_number("gain", gain)
            if not 1e-37 <= gain < 1.0:  # would be 0 or subnormal in fp32 below; false for NaN too
                refuse("gain", gain, "at least 1e-37 and below 1")
        elif alpha is not None:
            alpha = check_alpha(alpha)
        else:
            mass = check_number("mass", 0.95 if mass is None else mass)
            if not 0.0 < mass <= 1.0:
                refuse("mass", mass, "above 0 and at most 1")
            if mass < 1e-37:  # would be 0 or subnormal in fp32
                refuse("mass", mass, "at least 1e-37")
        self._seal(
            mass=mass, alpha=alpha, gain=gain, outliers=check_integer("outliers", self.outliers, 0, 16)
        )
