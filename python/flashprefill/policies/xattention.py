"""XAttention."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..errors import refuse
from .base import Policy
from .checks import check_list, check_stride
from .library import DEFAULT
from .tables import read_table


@dataclass(frozen=True, repr=False)
class XAttention(Policy):
    """XAttention (arXiv 2503.16428): blocks by the sums of strided antidiagonals.

    Queries and keys are divided into cells of ``stride`` tokens. The score of a pair of cells is the sum over
    its antidiagonal. Each row of cells becomes a softmax, and the masses of a tile's rows are summed by
    block. A tile keeps its forced blocks (as published the first one and the diagonal) and, by descending
    mass, as many others as it takes to hold ``threshold`` of its mass. See docs/methods/xattention.md.

    Args:
        threshold: share of the mass to keep, in [0, 1]; 0 keeps the forced blocks alone.
        stride: tokens per cell, 4, 8, 16, 32, 64 or 128, and a divisor of ``block_size``; 8 and 16 are the
            paper's.
        norm: divides the scores, above 0; 1 in the paper.
        head_thresholds: one threshold for each query head, instead of ``threshold``.
        block_size: keys per block; 128 is the paper.
        sink_blocks: blocks at the beginning that are always kept, counted before the others.
        window_blocks: blocks before and at the diagonal that are always kept, counted before the others.
        dense_tail_blocks: the last query tiles of a prompt, in blocks, that keep everything.
        mean_correction: blocks left out count by their means; "summary": 16 of them by one key.
    """

    threshold: float = DEFAULT
    stride: int = DEFAULT
    norm: float = DEFAULT
    head_thresholds: tuple[float, ...] | None = DEFAULT
    block_size: int = DEFAULT
    sink_blocks: int = DEFAULT
    window_blocks: int = DEFAULT
    dense_tail_blocks: int = DEFAULT
    mean_correction: bool | str = DEFAULT

    kind = "xattention"

    def _rules(self, values: dict[str, Any]) -> None:
        check_stride(values["stride"], values["block_size"])
        heads = values["head_thresholds"]
        if heads is not None:
            heads = check_list("head_thresholds", heads, "a threshold for each query head, or None")
            threshold = self._field("threshold")
            values["head_thresholds"] = tuple(
                threshold._replace(name=f"head_thresholds[{h}]").check(each) for h, each in enumerate(heads)
            )

    def _row_unit(self) -> int | None:
        return self.stride

    def _at_heads(self, first: int, past: int, heads: int) -> XAttention:
        table = self.head_thresholds
        return self if table is None else dataclasses.replace(self, head_thresholds=table[first:past])

    @classmethod
    def from_config(cls, config: Any, **fields: Any) -> dict[Any, XAttention]:
        """Read a table of thresholds by layer and head into a policy for each layer.

        Args:
            config: for each layer a list with a threshold per query head; or the path of a JSON file of it.
            **fields: other fields of the policies; ``threshold`` is for layers that are not in the table.

        Returns:
            A mapping from layer to policy, with a default for other layers, for
            ``flashprefill.patch_model(model, mapping)``.

        Raises:
            OSError: the file cannot be opened.
            InvalidArgumentError, ArgumentTypeError: it is no such table.
        """
        config = read_table(config, (list, tuple), "a list of thresholds for each layer")
        heads = {len(layer) for layer in config}
        if len(heads) > 1:
            refuse("config", f"of {min(heads)} to {max(heads)} heads a layer", "of as many in each layer")
        table: dict[Any, XAttention] = {
            number: cls(head_thresholds=tuple(layer), **fields) for number, layer in enumerate(config)
        }
        return {**table, "default": cls(**fields)}
