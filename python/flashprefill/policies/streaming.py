"""Streaming: blocks at fixed places, A-shape and Tri-shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .base import Policy
from .checks import MAX_TOKENS, check_integer
from .library import DEFAULT


@dataclass(frozen=True, repr=False)
class Streaming(Policy):
    """Sink and window blocks only; nothing is scored.

    StreamingLLM's pattern (arXiv 2309.17453), also called A-shape; with a dense tail, Tri-shape.

    Args:
        sink_blocks: blocks at the beginning that are always kept.
        window_blocks: blocks before and at the diagonal that are always kept.
        dense_tail_blocks: the last query tiles of a prompt, in blocks, that keep everything.
        block_size: keys per block.
        share_heads: one list for the query heads of a KV head.
        mean_correction: blocks left out count by their means; "summary": 16 of them by one key.
    """

    sink_blocks: int = DEFAULT
    window_blocks: int = DEFAULT
    dense_tail_blocks: int = DEFAULT
    block_size: int = DEFAULT
    share_heads: bool = DEFAULT
    mean_correction: bool | str = DEFAULT

    kind = "streaming"

    def _row_unit(self) -> int | None:
        return 1

    @classmethod
    def a_shape(
        cls, n_init: int = 128, n_local: int = 3968, *, block_size: int = 128, **fields: Any
    ) -> Streaming:
        """Return A-shape, in tokens rounded out to blocks: the first n_init keys and each row's nearest.

        The defaults are MInference's (arXiv 2407.02490).
        """
        first, nearest = (
            check_integer("n_init", n_init, 0, MAX_TOKENS),
            check_integer("n_local", n_local, 1, MAX_TOKENS),
        )
        size = check_integer("block_size", block_size, 16, 1024)
        # A row at the beginning of a block sees n_local - 1 keys before itself.
        window = -(-(nearest - 1) // size) + 1
        forced = {"sink_blocks": -(-first // size), "window_blocks": window, "dense_tail_blocks": 0}
        return cls(**{**forced, "block_size": size, **fields})

    @classmethod
    def tri_shape(
        cls,
        n_init: int = 128,
        n_local: int = 3968,
        n_last: int = 100,
        *,
        block_size: int = 128,
        **fields: Any,
    ) -> Streaming:
        """Return A-shape whose last n_last rows see everything, rounded out to tiles.

        The defaults are MInference's; its second benchmark is where Tri-shape comes from (SCBench, arXiv
        2412.10319). Rows that end a prompt may begin in the middle of a tile, so that there is one tile more
        than they fill.
        """
        rows = check_integer("n_last", n_last, 0, MAX_TOKENS)
        size = check_integer("block_size", block_size, 16, 1024)
        tiles = -(-(rows - 1) // 128) + 1 if rows else 0
        tail = {"dense_tail_blocks": -(-tiles * 128 // size)}
        return cls.a_shape(n_init, n_local, block_size=size, **{**tail, **fields})
