"""The arguments of the library's verbs: select, attend, prefill and audit.

Each verb is described once, as a list of names and types. From this list come the schema of the torch
operator (torch_op.py), the tuple in which api.py hands arguments over, and the names under which _engine.py
reads them again. Types are those of torch's schemas; "Tensor!" is a tensor that the verb writes to.

Arguments whose type has a "?" come last and are None by default. A call hands over no more than it has to:
each argument costs time in torch's dispatcher, and most calls have none of these.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any

_ALIASES = "abcdefghijklmnop"  # torch's names for the tensors that an operator writes to

_INPUTS = {"q": "Tensor", "k": "Tensor"}
_RESULTS = {"v": "Tensor", "out": "Tensor!", "lse": "Tensor!?"}
_LAYOUT = {
    "cu_seqlens_q": "Tensor?",
    "cu_seqlens_k": "Tensor?",
    "seqused_k": "Tensor?",
    "block_table": "Tensor?",
    "k_scale": "Tensor?",
    "v_scale": "Tensor?",
    "max_seqlen_q": "SymInt",
    "max_seqlen_k": "SymInt",
    "softmax_scale": "float",
    "causal": "bool",
}
_SELECTION = {"final_chunk": "bool[]", "policy": "str"}
_EXECUTION = {"threads": "int", "backend": "str?", "target": "str?"}
_PRODUCTS = {"math": "int"}  # fp_math


class Verb:
    """One verb: its name, and the names and types of its arguments in their order."""

    def __init__(self, name: str, *groups: dict[str, str]) -> None:
        self.name = name
        types = {argument: kind for group in groups for argument, kind in group.items()}
        self._required = tuple(argument for argument in types if "?" not in types[argument])
        self._optional = tuple(argument for argument in types if "?" in types[argument])
        self._places = {argument: place for place, argument in enumerate(self._optional, 1)}
        names = self._required + self._optional
        self.types = {argument: types[argument] for argument in names}
        defaults = (None,) * len(self._optional)
        self._call: Any = namedtuple(f"{name}_arguments", names, defaults=defaults)  # type: ignore[misc]

    @property
    def schema(self) -> str:
        """The signature as torch.library writes it."""
        aliases, parts = iter(_ALIASES), []
        for name, kind in self.types.items():
            if kind.startswith("Tensor!"):
                kind = f"Tensor({next(aliases)}!){kind.removeprefix('Tensor!')}"
            parts.append(f"{kind} {name}" + ("=None" if "?" in kind else ""))
        return f"{self.name}({', '.join(parts)}) -> ()"

    def pack(self, **values: Any) -> tuple[Any, ...]:
        """Return the arguments in their order, without the last ones that are None."""
        arguments, count = [values[name] for name in self._required], 0
        for name, value in values.items():
            if value is not None and (place := self._places.get(name, 0)) > count:
                count = place
        if count:
            arguments += [values.get(name) for name in self._optional[:count]]
        return tuple(arguments)

    def unpack(self, arguments: tuple[Any, ...]) -> Any:
        """Return the arguments as a named tuple."""
        return self._call(*arguments)


# Of no guard, or its settings (a JSON text) and where its results go, in host memory: see guard.py.
_GUARD = {
    "guard": "str?",
    "guard_shares": "Tensor!?",
    "guard_numbers": "Tensor!?",
    "guard_moments": "Tensor!?",
    "guard_levels": "Tensor!?",
}

_LISTS = {"vertical_slash": "Tensor!?", "key_lists": "Tensor!?"}

# Of a mask that is given, besides its bits.
_MASK = {
    "tile_tokens": "SymInt",
    "block_size": "SymInt",
    "share_heads": "bool",
    "mean_correction": "int",
    "vertical_slash": "Tensor?",
    "max_verticals": "SymInt",
    "key_lists": "Tensor?",
    "segment_tiles": "SymInt",
    "skip": "float",
}

SELECT = Verb(
    "select",
    _INPUTS,
    {"v": "Tensor?"},
    {"bits": "Tensor!", "counts": "Tensor!", "fallback": "Tensor!", **_LISTS},
    _LAYOUT,
    _SELECTION,
    _EXECUTION,
)
ATTEND = Verb(
    "attend",
    _INPUTS,
    _RESULTS,
    {"bits": "Tensor", **_MASK, "skipped": "Tensor!?"},
    _LAYOUT,
    _EXECUTION,
    _PRODUCTS,
)
PREFILL = Verb(
    "prefill",
    _INPUTS,
    _RESULTS,
    {"bits": "Tensor!?", "counts": "Tensor!?", "fallback": "Tensor!?", **_LISTS, "skipped": "Tensor!?"},
    _LAYOUT,
    _SELECTION,
    _EXECUTION,
    _PRODUCTS,
    _GUARD,
)
AUDIT = Verb(
    "audit",
    _INPUTS,
    {"bits": "Tensor!", "counts": "Tensor!?", **_MASK},
    _LAYOUT,
    _EXECUTION,
    _GUARD,
)
