"""Dense: everything."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Policy
from .library import DEFAULT


@dataclass(frozen=True, repr=False)
class Dense(Policy):
    """Everything is kept: exact attention.

    Args:
        block_size: keys per block of its masks.
        share_heads: whether its masks have one head for each KV head.
    """

    block_size: int = DEFAULT
    share_heads: bool = DEFAULT

    kind = "dense"

    def _row_unit(self) -> int | None:
        return 1
