"""MInference, and its authors' tables of heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import refuse, refuse_type, shown
from .base import Policy
from .checks import MAX_TOKENS, check_integer, check_list, check_number
from .library import DEFAULT, vertical_slash_room
from .tables import MAX_HEADS, read_table

_PATTERNS = ("vertical_and_slash", "stream_llm", "block_sparse")  # by fp_minference_pattern


def _pattern(name: str, entry: Any) -> tuple[str, int, int]:
    if not isinstance(entry, (list, tuple)) or len(entry) != 3:
        refuse_type(name, shown(entry), "(pattern, a, b)")
    pattern, a, b = entry
    if isinstance(pattern, int) and 0 <= pattern < len(_PATTERNS):  # as the library's text has it
        pattern = _PATTERNS[pattern]
    if pattern not in _PATTERNS:
        refuse(f"{name}'s pattern", shown(pattern), "one of " + ", ".join(_PATTERNS))
    return (
        pattern,
        check_integer(f"{name}'s a", a, 0, MAX_TOKENS),
        check_integer(f"{name}'s b", b, 0, MAX_TOKENS),
    )


def _head(layer: int, name: Any, heads: int) -> int:
    """Return a head's index, which JSON has as text."""
    text = str(name)
    if not (text.isascii() and text.isdecimal() and len(text) < 8 and int(text) < heads):
        refuse(f"config[{layer}]'s head", str(name)[:40], f"from 0 to {heads - 1}")
    return int(text)


@dataclass(frozen=True, repr=False)
class MInference(Policy):
    """MInference (arXiv 2407.02490): a pattern for each head, found once for a model.

    *Vertical and slash*: the softmax of the last 64 query rows over all keys is summed by key and by
    distance. The ``vertical`` keys and ``slash`` distances with the largest sums are kept; the first 30 keys
    and the nearest 100 distances are always among them. Without a table, all heads have this pattern, with
    the authors' default for models without a table. See docs/methods/minference.md.

    Args:
        vertical: tokens: verticals that a head keeps.
        slash: tokens: slashes that a head keeps.
        heads: a (pattern, a, b) for each query head, instead of vertical and slash: ("vertical_and_slash",
            verticals, slashes), ("stream_llm", first tokens, nearest tokens) or ("block_sparse", blocks, 0).
        rounding: "blocks" rounds verticals and slashes out to the blocks that hold some of them, which every
            backend can attend to; "tokens" keeps them as they are, as published: on the CPU, for on a GPU
            they become blocks all the same; and without mean_correction.
        block_size: keys per block; 64 are the authors' kernels'.
        sink_blocks: blocks at the beginning that are always kept.
        window_blocks: blocks before and at the diagonal that are always kept.
        dense_tail_blocks: the last query tiles of a prompt, in blocks, that keep everything.
        mean_correction: blocks left out count by their means; "summary": 16 of them by one key.
    """

    vertical: int = DEFAULT
    slash: int = DEFAULT
    heads: tuple[tuple[str, int, int], ...] | None = DEFAULT
    rounding: str = DEFAULT
    block_size: int = DEFAULT
    sink_blocks: int = DEFAULT
    window_blocks: int = DEFAULT
    dense_tail_blocks: int = DEFAULT
    mean_correction: bool | str = DEFAULT

    kind = "minference"
    _room: ClassVar[tuple[int, int]]  # verticals and slashes of single tokens, for any number of keys

    def _rules(self, values: dict[str, Any]) -> None:
        heads = values["heads"]
        if heads is not None:
            heads = check_list("heads", heads, "a pattern for each query head, or None")
            values["heads"] = tuple(_pattern(f"heads[{h}]", entry) for h, entry in enumerate(heads))
        if values["rounding"] == "tokens" and values["mean_correction"]:
            refuse(
                "mean_correction",
                values["mean_correction"],
                'False with rounding="tokens": parts of blocks have no mean',
            )

    def _at_heads(self, first: int, past: int, heads: int) -> MInference:
        return self if self.heads is None else dataclasses.replace(self, heads=self.heads[first:past])

    def __post_init__(self) -> None:
        super().__post_init__()
        room = (0, 0)
        if self.rounding == "tokens":
            room = vertical_slash_room(self.text, len(self.heads or (1,)))
        object.__setattr__(self, "_room", room)

    @classmethod
    def from_config(
        cls, config: Any, *, q_heads: int | None = None, ratio: float = 1.0, **fields: Any
    ) -> dict[Any, MInference]:
        """Read a table of heads as MInference ships them, into a policy for each layer.

        Args:
            config: the JSON file's path or content: a list with an object for each layer, from a head's
                index to [pattern, a, b, score]. Missing heads get the authors' default,
                ["vertical_and_slash", 1000, 6096].
            q_heads: query heads of the model; by default the table's largest index + 1.
            ratio: factor on every a and b of vertical and slash (the authors' minference_ratio).
            **fields: other fields of the policies.

        Returns:
            A mapping from layer to policy, for ``flashprefill.patch_model(model, mapping)``. Its "default" is
            for layers that are not in the table.

        Raises:
            OSError: the file cannot be opened.
            InvalidArgumentError, ArgumentTypeError: it is no such table; the message says where.
        """
        config = read_table(config, Mapping, "a list with one object per layer")
        ratio = check_number("ratio", ratio)
        if not 0.0 < ratio < float("inf"):
            refuse("ratio", ratio, "above 0")
        most = MAX_HEADS if q_heads is None else check_integer("q_heads", q_heads, 1, MAX_HEADS)
        table = [{_head(n, head, most): e for head, e in layer.items()} for n, layer in enumerate(config)]
        if q_heads is None:
            q_heads = 1 + max((head for layer in table for head in layer), default=-1)
        scaled: dict[Any, MInference] = {}
        for number, layer in enumerate(table):
            heads = [(_PATTERNS[0], 1000, 6096)] * q_heads
            for head, entry in layer.items():
                entry = entry[:3] if isinstance(entry, (list, tuple)) else entry
                heads[head] = _pattern(f"config[{number}][{head}]", entry)
            if ratio != 1.0:
                heads = [
                    (p, int(a * ratio), int(b * ratio)) if p == _PATTERNS[0] else (p, a, b)
                    for p, a, b in heads
                ]
            scaled[number] = cls(heads=tuple(heads), **fields)
        scaled["default"] = cls(**fields)
        return scaled

    def _vertical_slash_room(self, keys: int) -> tuple[int, int]:
        verticals, slashes = self._room
        return min(keys, verticals), min(keys, slashes)

    def _spell(self, name: str, value: Any) -> str:
        if value in _PATTERNS:
            return str(_PATTERNS.index(value))
        return super()._spell(name, value)
