"""SampleAttention."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Policy
from .checks import check_integer, check_share


@dataclass(frozen=True, repr=False)
class SampleAttention(Policy):
    """SampleAttention (arXiv 2406.15486): columns and diagonals of blocks by the softmax of sampled rows.

    Some query rows at the end of each segment of the prompt attend to all keys exactly. Their mass, summed by
    key block and by distance in blocks, decides which columns and diagonals all tiles of the head keep,
    beside a window. See docs/methods/sampleattention.md.

    Args:
        coverage: share of the sampled mass that columns, and diagonals, hold each, in (0, 1]; 0.95 in the
            paper.
        sample_ratio: share of the query rows that are sampled, in (0, 1]; 0.05 in the paper.
        window_ratio: tokens before a tile that are kept, as a share of the sequence's keys, in [0, 1]; 0.08
            in the paper.
        sample_rows: rows sampled at the end of each segment of about sample_rows / sample_ratio rows, 1 to
            128.
        block_size: keys a block; 128 is the paper's.
        sink_blocks: blocks kept at the beginning.
        window_blocks: blocks kept before and at the diagonal, beside ``window_ratio``.
        dense_tail_blocks: blocks' worth of last query tiles that keep everything.
        mean_correction: blocks left out count by their means.
    """

    coverage: float = 0.95
    sample_ratio: float = 0.05
    window_ratio: float = 0.08
    sample_rows: int = 32
    block_size: int = 128
    sink_blocks: int = 1
    window_blocks: int = 1
    dense_tail_blocks: int = 0
    mean_correction: bool = False

    kind = "sampleattention"
    share_heads = False

    def __post_init__(self) -> None:
        self._seal(
            coverage=check_share("coverage", self.coverage),
            sample_ratio=check_share("sample_ratio", self.sample_ratio),
            window_ratio=check_share("window_ratio", self.window_ratio, zero=True),
            sample_rows=check_integer("sample_rows", self.sample_rows, 1, 128),
        )
