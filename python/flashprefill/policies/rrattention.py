"""RRAttention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import UnsupportedError
from .base import Policy
from .checks import check_stride
from .library import DEFAULT


@dataclass(frozen=True, repr=False)
class RRAttention(Policy):
    """RRAttention (arXiv 2602.05853): strided scores of single queries, in round robin over the heads.

    As :class:`XAttention`, but one query represents its cell, a different one in each head, and a key cell is
    the mean of its keys. A tile keeps the smallest set of blocks that holds ``threshold`` of its mass, and
    its forced blocks. See docs/methods/rrattention.md.

    Args:
        threshold: share of the mass to keep, in (0, 1]; the paper uses 0.95 and 0.9.
        stride: tokens per cell, 4, 8, 16, 32, 64 or 128, and a divisor of ``block_size``; 8 is the paper's.
        block_size: keys per block; 128 is the paper.
        sink_blocks: blocks at the beginning that are always kept.
        window_blocks: blocks before and at the diagonal that are always kept.
        dense_tail_blocks: the last query tiles of a prompt, in blocks, that keep everything.
        mean_correction: blocks left out count by their means; "summary": 16 of them by one key.
    """

    threshold: float = DEFAULT
    stride: int = DEFAULT
    block_size: int = DEFAULT
    sink_blocks: int = DEFAULT
    window_blocks: int = DEFAULT
    dense_tail_blocks: int = DEFAULT
    mean_correction: bool | str = DEFAULT

    kind = "rrattention"

    def _rules(self, values: dict[str, Any]) -> None:
        check_stride(values["stride"], values["block_size"])

    def _row_unit(self) -> int | None:
        return self.stride

    def _at_heads(self, first: int, past: int, heads: int) -> RRAttention:
        if first % self.stride:  # head h takes another row of each cell than head h + 1
            raise UnsupportedError(
                f"{self.kind} goes by heads' numbers: heads {first} to {past - 1} can't be taken alone where "
                f"{first} is no multiple of its stride ({self.stride})"
            )
        return self
