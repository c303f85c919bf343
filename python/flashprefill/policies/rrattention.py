"""RRAttention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .base import Policy
from .checks import check_stride
from .library import DEFAULT


@dataclass(frozen=True, repr=False)
class RRAttention(Policy):
    """RRAttention (arXiv 2602.05853): a strided grid of single queries, another one of a cell in each head.

    As :class:`XAttention`, but a row of the grid is one query of its cell, another one in each head, and a
    key cell is the mean of its keys. A tile keeps the smallest set of blocks that holds ``threshold`` of its
    mass, and its forced blocks. See docs/methods/rrattention.md.

    Args:
        threshold: share of the mass to keep, in (0, 1]; the paper uses 0.95 and 0.9.
        stride: tokens a cell, 4, 8, 16, 32, 64 or 128, and a divisor of ``block_size``; 8 is the paper's.
        block_size: keys a block; 128 is the paper.
        sink_blocks: blocks kept at the beginning.
        window_blocks: blocks kept before and at the diagonal.
        dense_tail_blocks: blocks' worth of last query tiles that keep everything.
        mean_correction: blocks left out count by their means.
    """

    threshold: float = DEFAULT
    stride: int = DEFAULT
    block_size: int = DEFAULT
    sink_blocks: int = DEFAULT
    window_blocks: int = DEFAULT
    dense_tail_blocks: int = DEFAULT
    mean_correction: bool = DEFAULT

    kind = "rrattention"

    def _rules(self, values: dict[str, Any]) -> None:
        check_stride(values["stride"], values["block_size"])
