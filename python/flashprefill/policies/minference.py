"""MInference, and its authors' tables of heads."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import refuse, refuse_type
from .base import Policy
from .checks import MAX_TOKENS, check_integer

_PAIRS = {"llama-3.1-8b": (512, 2048)}  # MInference's second table for it has one pair
_ROUNDINGS = ("blocks", "tokens")  # by fp_rounding
_PATTERNS = ("vertical_and_slash", "stream_llm", "block_sparse")  # by fp_minference_pattern


def _pattern(name: str, entry: Any) -> tuple[str, int, int]:
    if not isinstance(entry, (list, tuple)) or len(entry) != 3:
        refuse_type(name, repr(entry), "(pattern, a, b)")
    pattern, a, b = entry
    if pattern not in _PATTERNS:
        refuse(f"{name}'s pattern", repr(pattern), "one of " + ", ".join(_PATTERNS))
    return (
        pattern,
        check_integer(f"{name}'s a", a, 0, MAX_TOKENS),
        check_integer(f"{name}'s b", b, 0, MAX_TOKENS),
    )


@dataclass(frozen=True, repr=False)
class MInference(Policy):
    """MInference (arXiv 2407.02490): a pattern for each head, found once for a model.

    *Vertical and slash*: the softmax of the last 64 query rows over all keys, summed by key and by distance;
    the ``vertical`` keys and ``slash`` distances with the largest sums are kept, the first 30 keys and the
    nearest 100 distances always among them. Without a table of heads all of them use it, with the authors'
    default for models that they have no table for. See docs/methods/minference.md.

    Args:
        vertical: tokens; columns that a head keeps.
        slash: tokens; diagonals that a head keeps.
        heads: a (pattern, a, b) for each query head, in place of vertical and slash: ("vertical_and_slash",
            columns, diagonals), ("stream_llm", first tokens, nearest tokens) or ("block_sparse", blocks, 0).
        rounding: "blocks" rounds columns and diagonals out to the blocks that hold some of them, which every
            backend can attend to; "tokens" keeps them as they are, as published: on the CPU, and without
            mean_correction.
        block_size: keys a block; 64 are the authors' kernels'.
        sink_blocks: blocks kept at the beginning, beside what the policy keeps.
        window_blocks: blocks kept before and at the diagonal.
        dense_tail_blocks: blocks' worth of last query tiles that keep everything.
        mean_correction: blocks left out count by their means.
    """

    vertical: int = 1000
    slash: int = 6096
    heads: tuple[tuple[str, int, int], ...] | None = None
    rounding: str = "blocks"
    block_size: int = 64
    sink_blocks: int = 0
    window_blocks: int = 0
    dense_tail_blocks: int = 0
    mean_correction: bool = False

    kind = "minference"
    share_heads = False

    def __post_init__(self) -> None:
        heads = self.heads
        if heads is not None:
            heads = tuple(_pattern(f"heads[{h}]", entry) for h, entry in enumerate(heads))
            if not heads:
                refuse("heads", heads, "a pattern for each query head, or None")
        if self.rounding not in _ROUNDINGS:
            refuse("rounding", repr(self.rounding), "one of " + ", ".join(map(repr, _ROUNDINGS)))
        if self.rounding == "tokens" and self.mean_correction is True:
            refuse("mean_correction", True, 'False with rounding="tokens": parts of blocks have no mean')
        self._seal(
            vertical=check_integer("vertical", self.vertical, 0, MAX_TOKENS),
            slash=check_integer("slash", self.slash, 0, MAX_TOKENS),
            heads=heads,
        )

    @classmethod
    def from_config(
        cls, config: Any, *, q_heads: int | None = None, ratio: float = 1.0, **fields: Any
    ) -> dict[Any, MInference]:
        """Read a table of heads as MInference ships them, into a policy for each layer.

        Args:
            config: a path to the JSON file, or what is in it: a list with an object a layer, from a head's
                index to [pattern, a, b, score]. A head that is missing gets the authors' default,
                ["vertical_and_slash", 1000, 6096].
            q_heads: query heads of the model; the default is what the table's largest index says.
            ratio: factor on every a and b of vertical and slash (the authors' minference_ratio).
            **fields: other fields of the policies.

        Returns:
            A mapping from layer to policy, with the default for layers that the table has not: what
            ``flashprefill.patch_model(model, mapping)`` takes.
        """
        if isinstance(config, (str, os.PathLike)):
            config = json.loads(Path(config).read_text())
        if not isinstance(config, list) or not all(isinstance(layer, Mapping) for layer in config):
            refuse_type("config", repr(config)[:60], "a list with one object a layer, or a path to it")
        if not ratio > 0.0:
            refuse("ratio", ratio, "above 0")
        if q_heads is None:
            q_heads = 1 + max((int(head) for layer in config for head in layer), default=-1)
        scaled: dict[Any, MInference] = {}
        for number, layer in enumerate(config):
            heads = [(_PATTERNS[0], 1000, 6096)] * q_heads
            for head, entry in layer.items():
                if not 0 <= int(head) < q_heads:
                    refuse(f"config[{number}]'s head", head, f"from 0 to {q_heads - 1}")
                pattern, a, b = _pattern(f"config[{number}][{head}]", tuple(entry)[:3])
                heads[int(head)] = pattern, a, b
            if ratio != 1.0:
                heads = [
                    (p, int(a * ratio), int(b * ratio)) if p == _PATTERNS[0] else (p, a, b)
                    for p, a, b in heads
                ]
            scaled[number] = cls(heads=tuple(heads), **fields)
        scaled["default"] = cls(**fields)
        return scaled

    @classmethod
    def for_model(cls, name: str, **changes: Any) -> MInference:
        """Return the policy of a model for which the authors publish one pair of numbers for all heads.

        Args:
            name: "llama-3.1-8b". Other models have tables of heads, which :meth:`from_config` reads, or the
                default, ``MInference()``.
            **changes: other fields of the policy.

        Raises:
            ValueError: the name is not known; the message lists those that are.
        """
        pair = _PAIRS.get(str(name).lower())
        if pair is None:
            refuse("name", repr(name), "one of " + ", ".join(sorted(_PAIRS)))
        return cls(**{"vertical": pair[0], "slash": pair[1], **changes})

    def _vertical_slash_room(self, keys: int) -> tuple[int, int]:
        if self.rounding != "tokens":
            return 0, 0
        heads = self.heads or ((_PATTERNS[0], self.vertical, self.slash),)
        pairs = [(max(a, 30), max(b, 50)) for pattern, a, b in heads if pattern == _PATTERNS[0]]
        if not pairs:
            return 0, 0
        return min(keys, max(a for a, _ in pairs)), min(keys, max(b for _, b in pairs))

    def _spell(self, name: str, value: Any) -> str:
        if name == "rounding":
            return f" rounding={_ROUNDINGS.index(value)}"
        if name != "heads":
            return super()._spell(name, value)
        if value is None:
            return ""
        rows = ",".join(f"{_PATTERNS.index(pattern)}:{a}:{b}" for pattern, a, b in value)
        return f" head_count={len(value)} heads={rows}"
