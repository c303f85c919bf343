"""Gather: single keys in place of blocks."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Policy
from .library import DEFAULT


@dataclass(frozen=True, repr=False)
class Gather(Policy):
    """Single keys in place of blocks: our own method.

    For each segment of query tokens the keys before it are ranked by the softmax of the segment's mean query
    (the root mean square over the query heads that share a list), and the best are gathered. The segment's
    own keys, the window before it and the sink are kept as blocks. See docs/methods/gather.md.

    Args:
        gain: keep keys, the best first, while 128 * share * sqrt(rest) is at least this, in (0, 1). ``share``
            is the key's share of the softmax over all keys that the segment sees, ``rest`` that of all keys
            that are ranked from it on. The default unless ``budget`` is given: one of the two decides.
        budget: keep this share of the keys that are ranked, the best, in (0, 1].
        segment: query tokens per list of keys; rounded down to whole tiles, one at least.
        max_keys: keys that a list has room for; where more are wanted it holds the best, and
            ``Stats.overflowed`` counts it.
        sink_blocks: blocks at the beginning that are always kept.
        window_blocks: blocks before and at the segment's first token that are always kept.
        dense_tail_blocks: the last query tiles of a prompt, in blocks, that keep everything.
        block_size: keys per block.
        share_heads: one list for the query heads of a KV head. False: each query head has its own, which
            selects better and gathers as many lists more.
        mean_correction: the keys of a block that are left out count by their means; "summary": those of 16
            blocks by one key.
    """

    gain: float | None = DEFAULT
    budget: float | None = DEFAULT
    segment: int = DEFAULT
    max_keys: int = DEFAULT
    sink_blocks: int = DEFAULT
    window_blocks: int = DEFAULT
    dense_tail_blocks: int = DEFAULT
    block_size: int = DEFAULT
    share_heads: bool = DEFAULT
    mean_correction: bool | str = DEFAULT

    kind = "gather"

    def _key_list_room(self, keys: int, tile_tokens: int) -> tuple[int, int]:
        return min(keys, self.max_keys), max(1, self.segment // tile_tokens)
