"""Dense: everything."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Policy


@dataclass(frozen=True, repr=False)
class Dense(Policy):
    """Everything is kept: exact attention.

    Args:
        block_size: keys a block of the mask that says so.
        share_heads: whether that mask has one head for each KV head.
    """

    block_size: int = 128
    share_heads: bool = False

    kind = "dense"

    def __post_init__(self) -> None:
        self._seal()
