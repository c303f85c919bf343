"""FlashPrefill, versions 1 and 2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .base import Policy
from .library import DEFAULT


@dataclass(frozen=True, repr=False)
class FlashPrefill(Policy):
    """FlashPrefill (arXiv 2603.06199), and its second version (arXiv 2608.19758).

    The score of a block of keys is the sum over the tile's rows of exp(scale * q . mean key). Blocks are kept
    from ``alpha`` times the tile's best score on. V2 is ``share_heads=True, mean_correction=True``. See
    docs/methods/flashprefill.md.

    Args:
        alpha: threshold as a share of the tile's best score, in [0, inf). 0 keeps every block, 1 only the
            best. 0.12 is what the paper sets for Qwen3-30B; see :meth:`for_model`.
        sink_blocks: blocks at the beginning that are always kept.
        window_blocks: blocks before and at the diagonal that are always kept.
        dense_tail_blocks: the last query tiles of a prompt, in blocks, that keep everything.
        block_size: keys per block; the paper tunes for 128.
        query_pool: rows; means of ``query_pool`` consecutive query rows of a head are scored instead of
            rows, 1 to 128. 1 is the paper, 16 costs 16 times less arithmetic at the same quality.
        share_heads: one list for the query heads of a KV head (V2).
        mean_correction: blocks left out count by their means (V2); "summary": 16 of them by one key.
        min_blocks: blocks; the top ``min_blocks`` by score are always kept.
    """

    alpha: float = DEFAULT
    sink_blocks: int = DEFAULT
    window_blocks: int = DEFAULT
    dense_tail_blocks: int = DEFAULT
    block_size: int = DEFAULT
    query_pool: int = DEFAULT
    share_heads: bool = DEFAULT
    mean_correction: bool | str = DEFAULT
    min_blocks: int = DEFAULT

    kind = "flashprefill"

    def _rules(self, values: dict[str, Any]) -> None:
        self._doubt_alpha(values)

    def _row_unit(self) -> int | None:
        return 1
