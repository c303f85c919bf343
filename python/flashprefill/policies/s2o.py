"""S2O: single keys in the order of a segment's mean query, until they add too little."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Policy
from .library import DEFAULT


@dataclass(frozen=True, repr=False)
class S2O(Policy):
    """S2O (arXiv 2602.22575): ranked keys, with an early stop.

    For each segment of query tokens the keys before it are put in the order of the segment's mean query, and
    taken 128 at a time until they add too little to what the segment's rows have summed up. The segment's own
    keys are kept as blocks. See docs/methods/s2o.md.

    Args:
        tau: stop where the exponentials of 128 keys are below this share of those that a row has already, on
            average of ``stop_rows`` rows, twice in a row; in [0, 1). 0: it never stops, and everything is
            kept.
        segment: query tokens per list of keys; rounded down to whole tiles, one at least.
        max_keys: keys that a list has room for; where more are wanted it holds the best, and
            ``Stats.overflowed`` counts it.
        stop_rows: rows of a segment and head that decide when to stop, evenly spaced.
        sink_blocks: blocks at the beginning that are always kept.
        window_blocks: blocks before and at the segment's first token that are always kept.
        dense_tail_blocks: the last query tiles of a prompt, in blocks, that keep everything.
        block_size: keys per block.
        share_heads: one order for the query heads of a KV head, by the root mean square of their softmaxes.
            False, as published: each query head has its own.
        mean_correction: the keys of a block that are left out count by their means.
    """

    tau: float = DEFAULT
    segment: int = DEFAULT
    max_keys: int = DEFAULT
    stop_rows: int = DEFAULT
    sink_blocks: int = DEFAULT
    window_blocks: int = DEFAULT
    dense_tail_blocks: int = DEFAULT
    block_size: int = DEFAULT
    share_heads: bool = DEFAULT
    mean_correction: bool = DEFAULT

    kind = "s2o"

    def _key_list_room(self, keys: int, tile_tokens: int) -> tuple[int, int]:
        return min(keys, self.max_keys), max(1, self.segment // tile_tokens)
