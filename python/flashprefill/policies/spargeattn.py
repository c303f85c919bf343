"""SpargeAttn's first stage."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import refuse
from .base import Policy
from .checks import check_number, check_share


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

    cdf: float | None = None
    topk: float | None = None
    similarity: float | None = None
    block_size: int = 64
    sink_blocks: int = 0
    window_blocks: int = 0
    dense_tail_blocks: int = 0
    mean_correction: bool = False

    kind = "spargeattn"
    share_heads = False

    def __post_init__(self) -> None:
        cdf, topk = self.cdf, self.topk
        if cdf is not None and topk is not None:
            refuse("topk", topk, f"None where cdf is given ({cdf}): one of the two decides")
        if topk is not None:
            topk = check_share("topk", topk, zero=True)
        else:
            cdf = check_share("cdf", 0.98 if cdf is None else cdf, zero=True)
        similarity = self.similarity
        similarity = check_number(
            "similarity", (0.6 if topk is None else -0.1) if similarity is None else similarity
        )
        if not -1.0 <= similarity <= 1.0:
            refuse("similarity", similarity, "at least -1 and at most 1")
        self._seal(cdf=cdf, topk=topk, similarity=similarity)
