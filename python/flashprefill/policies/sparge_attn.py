"""SpargeAttn's first stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .base import Policy
from .library import DEFAULT

_WITH_TOPK = -0.1  # similarity, as the authors use it


@dataclass(frozen=True, repr=False)
class SpargeAttn(Policy):
    """SpargeAttn's first stage (arXiv 2502.18137): means stand for blocks whose tokens are alike.

    Where the mean cosine of a block's tokens is above ``similarity``, the softmax of mean query times mean
    key ranks the key blocks of a tile. Key blocks of other kinds are kept, and so is everything for a tile of
    queries that are not alike. See docs/methods/spargeattn.md.

    Args:
        cdf: keep the top blocks whose probabilities sum up to at most this, at least one, in [0, 1]. 0.98
            unless ``topk`` is given.
        topk: keep the top floor(topk * all key blocks of the sequence), in [0, 1]. One of cdf and topk
            decides.
        similarity: mean cosine, in [-1, 1]; below 0 all blocks are alike. The authors use 0.6 with cdf, -0.1
            with topk.
        block_size: keys a block; 64 is the paper's.
        sink_blocks: blocks kept at the beginning.
        window_blocks: blocks kept before and at the diagonal.
        dense_tail_blocks: blocks' worth of last query tiles that keep everything.
        mean_correction: blocks left out count by their means.
    """

    cdf: float | None = DEFAULT
    topk: float | None = DEFAULT
    similarity: float | None = None
    block_size: int = DEFAULT
    sink_blocks: int = DEFAULT
    window_blocks: int = DEFAULT
    dense_tail_blocks: int = DEFAULT
    mean_correction: bool = DEFAULT

    kind = "spargeattn"

    _always_in_text = ("similarity",)  # its default depends on topk here, not in the library

    def _alternatives(self) -> dict[str, Any]:
        values = super()._alternatives()
        if self.similarity is None:
            values["similarity"] = self._field("similarity").default if self.topk is None else _WITH_TOPK
        return values
