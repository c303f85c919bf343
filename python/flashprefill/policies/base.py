"""The base of all policies: their fields are the library's, and so are the checks of their values."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from .. import _abi
from ..errors import ArgumentTypeError, refuse
from .library import DEFAULT, FIELDS, Field
from .presets import preset_of

if TYPE_CHECKING:
    from typing_extensions import Self


class _Named(type):
    """Policies' type: a field that does not exist is refused with those that do."""

    def __call__(cls, *args: Any, **fields: Any) -> Any:
        known = [name for name in getattr(cls, "__dataclass_fields__", ()) if not name.startswith("_")]
        for name in fields:
            if known and name not in known:
                raise ArgumentTypeError(f"{name} is unknown; {cls.__name__} takes {', '.join(known)}")
        return super().__call__(*args, **fields)


class Policy(metaclass=_Named):
    """The base of all policies. Make one of its subclasses, or write one as text.

    A subclass is a frozen dataclass whose fields have the library's names. It gives their order, types and
    meaning; :meth:`_rules` holds what concerns more than one field.

    Attributes:
        kind: the policy's name in the library.
        block_size: keys per block.
        share_heads: whether a mask has one head for each KV head.
        text: the policy as text, "sketch(mass=0.9)": what decides, and what is not a default. It is read
            wherever a policy is taken, and is how policies reach the library.
        source: where the values come from, if :meth:`for_model` made it.
        reads_values: whether it selects by values too, which :func:`flashprefill.select` then needs.
    """

    kind: ClassVar[str] = ""
    reads_values: ClassVar[bool] = False  # select needs v
    block_size: int
    share_heads: bool
    text: str
    source: str
    _row: ClassVar[str] = ""  # the library's policy whose fields these are, if not that of `kind`
    _fields: ClassVar[tuple[Field, ...]] = ()
    _extra_names: ClassVar[tuple[str, ...]] = ()  # fields that the library does not have

    def __init_subclass__(cls) -> None:
        own = cls.__dict__.get("__annotations__", {}) or cls.__annotations__
        cls._fields = tuple(field for field in FIELDS.get(cls._row or cls.kind, ()) if field.name in own)
        for field in cls._fields:
            if cls.__dict__.get(field.name) is DEFAULT:
                setattr(cls, field.name, field.default)
        if "share_heads" not in own:
            cls.share_heads = False

    @classmethod
    def _field(cls, name: str) -> Field:
        return next(field for field in cls._fields if field.name == name)

    def __post_init__(self) -> None:
        values = self._alternatives()
        for field in self._fields:
            values[field.name] = field.check(values.get(field.name, getattr(self, field.name)))
        if values["block_size"] % 16:
            refuse("block_size", values["block_size"], "a multiple of 16")
        self._rules(values)
        for name, value in values.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "text", self._spelled(values))
        object.__setattr__(self, "source", "")

    def _alternatives(self) -> dict[str, Any]:
        """Return what decides where nothing was given that does; refuse more than one that does."""
        fields = [field for field in self._fields if field.flags & _abi.ALTERNATIVE]
        given = [field.name for field in fields if getattr(self, field.name) is not None]
        if len(given) > 1:
            first, second = given[:2]
            of = "the two" if len(fields) == 2 else "them"
            must_be = f"None where {first} is given ({getattr(self, first)}): one of {of} decides"
            refuse(second, getattr(self, second), must_be)
        if given:
            return {}
        return {field.name: field.initial for field in fields if field.initial is not None}

    def _rules(self, values: dict[str, Any]) -> None:
        """Check fields against each other, and lists. May change values."""

    @staticmethod
    def _doubt_alpha(values: dict[str, Any]) -> None:
        """Warn of a share above 1, which no block reaches: a percentage, perhaps."""
        alpha = values.get("alpha")
        if alpha is not None and alpha > 1 and not values["min_blocks"]:
            warnings.warn(
                f"alpha is {alpha:g}, and no block has more than once its tile's best score: nothing but the "
                f"forced blocks is kept. 12 % is alpha=0.12",
                stacklevel=6,
            )

    def _spelled(self, values: dict[str, Any]) -> str:
        shown = []
        for field in self._fields:
            value = values[field.name]
            if value is not None and (field.flags & _abi.DECIDES or value != field.default):
                shown.append(f"{field.name}={self._spell(field.name, value)}")
        return f"{self.kind}({', '.join(shown)})" if shown else self.kind

    def _spell(self, name: str, value: Any) -> str:
        """Return a value as the library reads it."""
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, tuple):
            return "[" + ", ".join([self._spell(name, each) for each in value]) + "]"
        return f"{value}".removesuffix(".0")

    def __repr__(self) -> str:
        return self.text

    def __reduce__(self) -> Any:
        return type(self), tuple(getattr(self, name) for name in self._names())

    @classmethod
    def _names(cls) -> list[str]:
        """Return the names of the dataclass's fields."""
        return [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]

    @classmethod
    def for_model(cls, model: Any, **changes: Any) -> Self:
        """Return the policy with the values that the method's authors publish for a model.

        ``source`` of the result says where they come from.

        Args:
            model: a loaded model, a config, a hub id or a folder ("meta-llama/Llama-3.1-8B-Instruct"), or a
                family's name ("llama-3.1").
            **changes: other fields of the policy.

        Raises:
            ValueError: nothing is published for the model; the message lists the families that have values.
        """
        preset = preset_of(cls.kind, model)
        made = cls(**{**preset.values, **changes})
        object.__setattr__(made, "source", preset.source)
        return made

    @classmethod
    def own_names(cls, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return options by the names of our fields, where the method's own code has others."""
        return options

    def at_layer(self, layer: int) -> Policy:
        """Return the policy for one layer of a model: itself, unless it depends on the layer."""
        return self

    def check_model(self, config: Any) -> None:
        """Refuse a model, by its configuration, that the policy is not for."""

    def _in_model(self, layers: int) -> Policy:
        """Return the policy for a model of so many layers, from which those of its layers are made."""
        return self

    def _row_unit(self) -> int | None:
        """Return where a prompt may be cut so that the selection of no tile changes: at multiples of this.

        None: nowhere, because tiles are chosen for by rows or keys that may lie on the other side.
        """
        return None

    def _at_heads(self, first: int, past: int, heads: int) -> Policy:
        """Return the policy for query heads first to past - 1 of `heads`, as if there were no others.

        Raises:
            UnsupportedError: there is none, because the policy goes by a head's number.
        """
        return self

    def _vertical_slash_room(self, keys: int) -> tuple[int, int]:
        """Return how many verticals and slashes of single tokens a mask head needs room for."""
        return 0, 0

    def _key_list_room(self, keys: int, tile_tokens: int) -> tuple[int, int]:
        """Return how many keys a key list needs room for, 0 without lists, and the tiles that share one."""
        return 0, 1

    @property
    def skips(self) -> float:
        """Below which share of the heaviest weight so far attention skips keys; 0: none."""
        return float(getattr(self, "skip", 0.0))

    @property
    def corrects(self) -> bool | str:
        """Whether blocks left out count by their means, or by summary keys (``"summary"``)."""
        return getattr(self, "mean_correction", False)
