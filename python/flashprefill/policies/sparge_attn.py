"""SpargeAttn."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Policy
from .library import DEFAULT


@dataclass(frozen=True, repr=False)
class SpargeAttn(Policy):
    """SpargeAttn (arXiv 2502.18137): means represent blocks that are self-similar.

    A block is self-similar if the mean cosine of its tokens is above ``similarity``. The softmax of mean
    query times mean key ranks a tile's self-similar key blocks. All other key blocks are kept, and a tile of
    queries that is not self-similar keeps everything. See docs/methods/spargeattn.md.

    Args:
        cdf: keep the top blocks whose probabilities sum up to at most this, at least one, in [0, 1]. 0.98
            unless ``topk`` is given.
        topk: keep the top floor(topk * all key blocks of the sequence), in [0, 1]. One of cdf and topk
            decides.
        similarity: mean cosine, in [-1, 1]. None, the default, is what the authors use: 0.6 with cdf, -0.1
            with topk.
        block_size: keys per block; 64 is the paper's.
        sink_blocks: blocks at the beginning that are always kept.
        window_blocks: blocks before and at the diagonal that are always kept.
        dense_tail_blocks: the last query tiles of a prompt, in blocks, that keep everything.
        mean_correction: blocks left out count by their means; "summary": 16 of them by one key.
        skip: the second stage, in [0, 1): among what is kept, attention leaves out keys, 128 at a time, of
            which none weighs this share of the heaviest key that a row has met before. 0, the default: none.
            The authors' ``pvthreshd`` is -log2 of it.
    """

    cdf: float | None = DEFAULT
    topk: float | None = DEFAULT
    similarity: float | None = DEFAULT
    block_size: int = DEFAULT
    sink_blocks: int = DEFAULT
    window_blocks: int = DEFAULT
    dense_tail_blocks: int = DEFAULT
    mean_correction: bool | str = DEFAULT
    skip: float = DEFAULT

    kind = "spargeattn"
