"""SampleAttention."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Policy
from .library import DEFAULT


@dataclass(frozen=True, repr=False)
class SampleAttention(Policy):
    """SampleAttention (arXiv 2406.15486): verticals and slashes of blocks by the softmax of sampled rows.

    A few query rows at the end of each segment of the prompt attend to all keys exactly. Their mass, summed
    by key block and by distance in blocks, decides which verticals and slashes all tiles of the head keep,
    besides a window. See docs/methods/sampleattention.md.

    Args:
        coverage: share of the sampled mass that verticals hold, and slashes, in (0, 1]; 0.95 in the paper.
        sample_ratio: share of the query rows that are sampled, in (0, 1]; 0.05 in the paper.
        window_ratio: tokens before a tile that are kept, as a share of the sequence's keys, in [0, 1]; 0.08
            in the paper.
        sample_rows: rows that are sampled at the end of each segment of about sample_rows / sample_ratio
            rows, 1 to 128.
        block_size: keys per block; 128 is the paper's.
        sink_blocks: blocks at the beginning that are always kept.
        window_blocks: blocks before and at the diagonal that are always kept, besides ``window_ratio``.
        dense_tail_blocks: the last query tiles of a prompt, in blocks, that keep everything.
        mean_correction: blocks left out count by their means; "summary": 16 of them by one key.
    """

    coverage: float = DEFAULT
    sample_ratio: float = DEFAULT
    window_ratio: float = DEFAULT
    sample_rows: int = DEFAULT
    block_size: int = DEFAULT
    sink_blocks: int = DEFAULT
    window_blocks: int = DEFAULT
    dense_tail_blocks: int = DEFAULT
    mean_correction: bool | str = DEFAULT

    kind = "sampleattention"
