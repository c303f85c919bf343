"""VSPrefill: verticals and slashes that a trained indexer predicts."""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import UnsupportedError, refuse, refuse_type
from .base import Policy
from .checks import check_integer
from .dense import Dense
from .indexer import Indexer
from .library import DEFAULT
from .mask_policy import FORCED
from .streaming import Streaming
from .weights import UNBOUND, number_of

_MAX_LAYER = 1 << 20


@dataclass(frozen=True, repr=False)
class VSPrefill(Policy):
    """VSPrefill (arXiv 2603.04460): verticals and slashes that a small trained network predicts.

    For each KV head an *indexer* reads every key and its value and predicts how much attention the key gets
    from all rows, and how much the distance that is its number gets. The fewest verticals and the fewest
    slashes that hold a share of these predictions are kept. Queries are not looked at, and a key's prediction
    does not depend on the others', so prompts may be read in chunks: predictions of a prefix are kept between
    calls. See docs/methods/vsprefill.md.

    ``flashprefill train-indexer`` trains the weights for a model. A policy for all layers becomes one for a
    layer by :meth:`at_layer`, which :func:`flashprefill.patch_model` calls; layers without weights attend
    densely.

    Args:
        weights: an :class:`flashprefill.policies.indexer.Indexer`, or the path of its file. None keeps the
            forced blocks alone, with a warning.
        vertical_mass: share of the predicted mass of verticals to keep, in (0, 1].
        slash_mass: share of the predicted mass of slashes to keep, in (0, 1].
        rounding: "tokens" keeps verticals and slashes as they are, as published: without ``share_heads`` and
            ``mean_correction``. "blocks" rounds them out to the blocks that hold some of them.
        block_size: keys per block.
        sink_blocks: blocks at the beginning that are always kept.
        window_blocks: blocks before and at the diagonal that are always kept.
        dense_tail_blocks: the last query tiles of a prompt, in blocks, that keep everything.
        share_heads: one list for the query heads of a KV head, whose choice is the same anyway.
        mean_correction: blocks left out count by their means.
        layer: the layer whose weights are used; not needed where there is one.
    """

    weights: Any = None
    vertical_mass: float = DEFAULT
    slash_mass: float = DEFAULT
    rounding: str = DEFAULT
    block_size: int = DEFAULT
    sink_blocks: int = DEFAULT
    window_blocks: int = DEFAULT
    dense_tail_blocks: int = DEFAULT
    share_heads: bool = DEFAULT
    mean_correction: bool = DEFAULT
    layer: int | None = None

    kind = "vsprefill"
    reads_values = True
    _extra_names: ClassVar[tuple[str, ...]] = ("weights", "layer")

    def __post_init__(self) -> None:
        weights: Any = self.weights
        if isinstance(weights, (str, os.PathLike)):
            weights = Indexer.load(weights)
        if weights is not None and not isinstance(weights, Indexer):
            refuse_type("weights", f"a {type(weights).__name__}", "an Indexer, the path of its file, or None")
        object.__setattr__(self, "weights", weights)
        if weights is None:
            warnings.warn(
                "VSPrefill without weights keeps its forced blocks alone; "
                "`flashprefill train-indexer` makes some",
                stacklevel=4,
            )
        elif self.layer is not None:
            check_integer("layer", self.layer, 0, _MAX_LAYER)
            if self.layer not in weights.layers:
                refuse(
                    "layer", self.layer, "one of the weights': " + ", ".join(map(str, sorted(weights.layers)))
                )
        elif len(weights.layers) == 1:
            object.__setattr__(self, "layer", next(iter(weights.layers)))
        super().__post_init__()

    def _rules(self, values: dict[str, Any]) -> None:
        if values["rounding"] != "tokens":
            return
        if values["mean_correction"]:
            refuse("mean_correction", True, 'False with rounding="tokens": parts of blocks have no mean')
        if values["share_heads"]:
            refuse(
                "share_heads", True, 'False with rounding="tokens": lists of tokens are those of query heads'
            )

    def _spelled(self, values: dict[str, Any]) -> str:
        text = super()._spelled(values)
        if self.weights is None:
            return text
        number = UNBOUND if self.layer is None else number_of(self.weights, self.layer)
        return f"{text.removesuffix(')')}, indexer={number})"

    @functools.cached_property
    def forced(self) -> Streaming:
        """The policy that keeps the forced blocks alone."""
        return Streaming(**{name: getattr(self, name) for name in FORCED})

    def at_layer(self, layer: int) -> Policy:
        """Return the policy for one layer of a model: dense attention for a layer without weights."""
        if self.weights is None or self.layer == layer:
            return self
        if layer not in self.weights.layers:
            return Dense()
        return dataclasses.replace(self, layer=layer)

    def check_model(self, config: Any) -> None:
        """Refuse a model that the weights are not for, and name what differs."""
        if self.weights is not None:
            self.weights.check_model(config)

    def _at_heads(self, first: int, past: int, heads: int) -> VSPrefill:
        if (first, past) != (0, heads):
            raise UnsupportedError(
                f"VSPrefill's weights are for all KV heads: heads {first} to {past - 1} of {heads} can't be "
                "taken alone"
            )
        return self

    def _vertical_slash_room(self, keys: int) -> tuple[int, int]:
        return (keys, keys) if self.rounding == "tokens" else (0, 0)
