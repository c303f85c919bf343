"""Prism."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import refuse
from .base import Policy
from .library import DEFAULT


@dataclass(frozen=True, repr=False)
class Prism(Policy):
    """Prism (arXiv 2602.08426): pooled scores in two bands of rotary frequencies.

    The mean over a block averages out dimensions that rotate fast. So fast and slow dimensions are scored
    separately, each band with a temperature that follows from its pooled energy. A tile keeps the union of
    the smallest sets that hold ``mass`` of each band's softmax. See docs/methods/prism.md.

    Args:
        mass: share of a band's probability to keep, in (0, 1]; 0.95 in the paper.
        rotary_dim: dimensions that are rotated, the first ones; 0 is head_dim.
        high_pairs: rotary pairs in the high band, fastest first; 0 is half of them (the paper: 32 of 64).
        low_pairs: rotary pairs in the low band, slowest first; 0 is three quarters of them (the paper: 48 of
            64). Dimensions that are not rotated belong to the low band.
        interleaved: False: dimension i is paired with i + rotary_dim / 2 (Llama, Qwen in Transformers); True:
            2i with 2i + 1.
        block_size: keys per block; 128 is the paper's.
        sink_blocks: blocks at the beginning that are always kept.
        window_blocks: blocks before and at the diagonal that are always kept.
        dense_tail_blocks: the last query tiles of a prompt, in blocks, that keep everything.
        mean_correction: blocks left out count by their means; "summary": 16 of them by one key.
    """

    mass: float = DEFAULT
    rotary_dim: int = DEFAULT
    high_pairs: int = DEFAULT
    low_pairs: int = DEFAULT
    interleaved: bool = DEFAULT
    block_size: int = DEFAULT
    sink_blocks: int = DEFAULT
    window_blocks: int = DEFAULT
    dense_tail_blocks: int = DEFAULT
    mean_correction: bool | str = DEFAULT

    kind = "prism"

    def _rules(self, values: dict[str, Any]) -> None:
        if values["rotary_dim"] % 2:
            refuse("rotary_dim", values["rotary_dim"], "even")

    def _row_unit(self) -> int | None:
        return self.block_size  # a block's mean is scored by tiles that end inside of it, too
