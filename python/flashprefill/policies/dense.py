"""Dense: everything."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Policy
from .library import DEFAULT


@dataclass(frozen=True, repr=False)
class Dense(Policy):
    """Everything is kept: exact attention.

    Args:
        block_size: keys a block of the mask that says so.
        share_heads: whether that mask has one head for each KV head.
    """

    block_size: int = DEFAULT
    share_heads: bool = DEFAULT

    kind = "dense"
