"""The base of all policies, and the string of numbers that one is on its way to the library."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from ..errors import refuse, refuse_type
from .checks import MAX_BLOCKS, check_integer

# The parameters that decide what is kept: always shown in a text.
_DECIDES = ("alpha", "mass", "gain", "gamma", "threshold", "cdf", "topk", "coverage")


class Policy:
    """The base of all policies. Make one of its subclasses."""

    kind: ClassVar[str] = ""  # the policy's name in specs
    block_size: int
    share_heads: bool
    _spec: str

    def _seal(self, **checked: Any) -> None:
        """Check the fields that all policies share, store checked values, and write the spec.

        The spec is the policy as one string of numbers, which is what goes through a torch operator: a string
        shows in graphs what was asked for, and torch.compile guards on it with one comparison.
        """
        shared: dict[str, Any] = {}
        for field in ("sink_blocks", "window_blocks", "dense_tail_blocks", "min_blocks"):
            if hasattr(self, field):
                shared[field] = check_integer(field, getattr(self, field), 0, MAX_BLOCKS)
        for field in ("share_heads", "mean_correction", "query_metric"):
            if hasattr(self, field):
                value = getattr(self, field)
                if not isinstance(value, bool):
                    refuse_type(field, repr(value), "True or False")
        if hasattr(self, "query_pool"):
            shared["query_pool"] = check_integer("query_pool", self.query_pool, 1, 128)
        block_size = check_integer("block_size", self.block_size, 16, 1024)
        if block_size % 16:
            refuse("block_size", block_size, "a multiple of 16")
        shared["block_size"] = block_size
        for name, value in {**shared, **checked}.items():
            object.__setattr__(self, name, value)
        spec = self.kind
        for name in self._names():
            spec += self._spell(name, getattr(self, name))
        object.__setattr__(self, "_spec", spec)

    def _spell(self, name: str, value: Any) -> str:
        """Return a field as the spec has it: a number, or rows of integers, "1:2:3,4:5:6"."""
        return f" {name}={'nan' if value is None else int(value) if isinstance(value, bool) else value}"

    @classmethod
    def own_names(cls, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return options by the names of our fields, where the method's own code has others."""
        return options

    def at_layer(self, layer: int) -> Policy:
        """Return the policy for one layer of a model: itself, unless it depends on the layer."""
        return self

    @property
    def text(self) -> str:
        """The policy as text, which is read wherever a policy is taken: what differs from the defaults.

        The parameter that decides (alpha, mass, ...) is always shown: "FlashPrefill(alpha=0.12)".
        """
        default, shown = type(self)(), {}
        for name in self._names():
            value = getattr(self, name)
            if value != getattr(default, name) or (name in _DECIDES and value is not None):
                shown[name] = value
        if any(shown.get(name) is not None for name in ("alpha", "gain")):
            shown.pop("mass", None)  # one of them decides; the others are None by themselves
        if shown.get("topk") is not None:
            shown.pop("cdf", None)
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    def __repr__(self) -> str:
        return self.text

    @classmethod
    def _names(cls) -> list[str]:
        """Return the names of the fields."""
        return list(cls.__dataclass_fields__)  # type: ignore[attr-defined]

    def _vertical_slash_room(self, keys: int) -> tuple[int, int]:
        """Return how many columns and distances of single tokens a mask head needs room for."""
        return 0, 0

    @property
    def corrects(self) -> bool:
        """Whether blocks left out count by their means."""
        return bool(getattr(self, "mean_correction", False))

    def __reduce__(self) -> Any:
        return type(self), tuple(getattr(self, name) for name in self._names())


def numbers_of(spec: str) -> tuple[str, dict[str, float | list[list[float]]]]:
    """Read a policy's spec back: its kind and its fields, None as NaN, rows of integers as lists."""
    kind, *parts = spec.split()
    fields: dict[str, float | list[list[float]]] = {}
    for part in parts:
        name, value = part.split("=")
        if ":" in value:
            fields[name] = [[float(x) for x in row.split(":") if x] for row in value.split(",")]
        else:
            fields[name] = math.nan if value == "nan" else float(value)
    return kind, fields
