"""Dense: everything."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Policy
from .library import DEFAULT


@dataclass(frozen=True, repr=False)
class Dense(Policy):
    """Everything is kept: exact attention, or with ``skip`` nearly so.

    Args:
        block_size: keys per block of its masks.
        share_heads: whether its masks have one head for each KV head.
        skip: in [0, 1); 0: attention is exact. Else attention itself leaves out keys, 128 at a time, of which
            none weighs this share of the heaviest key that a row has met before (BLASST, arXiv 2512.12087).
            Of the weights of a row that sees n keys it loses at most n skip / (1 + n skip). See
            docs/methods/dense.md.
    """

    block_size: int = DEFAULT
    share_heads: bool = DEFAULT
    skip: float = DEFAULT

    kind = "dense"

    @property
    def exact(self) -> bool:
        """Whether nothing is left out."""
        return not self.skip

    def _row_unit(self) -> int | None:
        return 128 if self.skip else 1  # which keys are skipped together goes by the tile's diagonal
