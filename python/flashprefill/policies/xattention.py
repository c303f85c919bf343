"""XAttention."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import refuse, refuse_type
from .base import Policy
from .checks import MAX_FLOAT32, check_number, check_share, check_stride


@dataclass(frozen=True, repr=False)
class XAttention(Policy):
    """XAttention (arXiv 2503.16428): blocks by the sums of the anti-diagonals of a strided grid.

    Queries and keys are cut into cells of ``stride`` tokens. A pair of cells is scored by the sum over its
    anti-diagonal, each row of the grid becomes a softmax, and the masses of a tile's rows are summed by
    block. A tile keeps its forced blocks (as published the first one and the diagonal) and, by descending
    mass, as many others as it takes to hold ``threshold`` of its mass. See docs/methods/xattention.md.

    Args:
        threshold: share of the mass to keep, in [0, 1]; 0 keeps the forced blocks alone.
        stride: tokens a cell, 4, 8, 16, 32, 64 or 128, and a divisor of ``block_size``; 8 and 16 are the
            paper's.
        norm: divides the scores, above 0; 1 in the paper.
        head_thresholds: one threshold for each query head, in place of ``threshold``.
        block_size: keys a block; 128 is the paper.
        sink_blocks: blocks kept at the beginning, counted before the others.
        window_blocks: blocks kept before and at the diagonal, counted before the others.
        dense_tail_blocks: blocks' worth of last query tiles that keep everything.
        mean_correction: blocks left out count by their means.
    """

    threshold: float = 0.9
    stride: int = 16
    norm: float = 1.0
    head_thresholds: tuple[float, ...] | None = None
    block_size: int = 128
    sink_blocks: int = 1
    window_blocks: int = 1
    dense_tail_blocks: int = 0
    mean_correction: bool = False

    kind = "xattention"
    share_heads = False

    def __post_init__(self) -> None:
        norm = check_number("norm", self.norm)
        if not 1e-37 <= norm <= MAX_FLOAT32:
            refuse("norm", norm, "finite and above 0")
        heads = self.head_thresholds
        if heads is not None:
            heads = tuple(
                check_share(f"head_thresholds[{h}]", each, zero=True) for h, each in enumerate(heads)
            )
            if not heads:
                refuse("head_thresholds", heads, "a threshold for each query head, or None")
        self._seal(
            threshold=check_share("threshold", self.threshold, zero=True),
            stride=check_stride(self.stride, self.block_size),
            norm=norm,
            head_thresholds=heads,
        )

    @classmethod
    def from_config(cls, config: Any, **fields: Any) -> dict[Any, XAttention]:
        """Read a table of thresholds by layer and head into a policy for each layer.

        Args:
            config: a list with a list of thresholds, one a query head, for each layer; or a path to a JSON
                file of it.
            **fields: other fields of the policies; ``threshold`` is for layers that the table has not.

        Returns:
            A mapping from layer to policy, with a default for other layers: what
            ``flashprefill.patch_model(model, mapping)`` takes.
        """
        if isinstance(config, (str, os.PathLike)):
            config = json.loads(Path(config).read_text())
        if not isinstance(config, list) or not all(isinstance(layer, (list, tuple)) for layer in config):
            refuse_type("config", repr(config)[:60], "a list of thresholds for each layer, or a path to it")
        heads = {len(layer) for layer in config}
        if len(heads) > 1:
            refuse("config", f"of {min(heads)} to {max(heads)} heads a layer", "of as many in each layer")
        table: dict[Any, XAttention] = {
            number: cls(head_thresholds=tuple(layer), **fields) for number, layer in enumerate(config)
        }
        return {**table, "default": cls(**fields)}

    def _spell(self, name: str, value: Any) -> str:
        if name != "head_thresholds":
            return super()._spell(name, value)
        return (
            "" if value is None else f" head_count={len(value)} head_thresholds=:{':'.join(map(str, value))}"
        )
