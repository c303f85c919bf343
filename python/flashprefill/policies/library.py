"""Policies as the library knows them: their names, and the fields of each with defaults and ranges.

All of it is read from the library once, at import (``fp_policy_name`` and ``fp_policy_field_at``), so that
no name, default or range is written down here again.
"""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any, NamedTuple

from .. import _abi
from ..errors import refuse
from .checks import MAX_TOKENS, check_bool, check_choice, check_integer, check_number

_MAX_FLOAT32 = 3.4028234663852886e38
_MIN_FLOAT32 = 1e-37  # less would be 0 or subnormal in fp32

# The default of a dataclass's field: the one that the library has.
DEFAULT: Any = object()


class Field(NamedTuple):
    """A field of a policy.

    Attributes:
        name: the name.
        type: fp_field_type.
        default: the default as the dataclass has it. None where no value is given: fields of which one
            decides, lists, and budgets without a limit.
        initial: of fields of which one decides, what the one has that does where none is given; else None.
        least: the least value.
        most: the largest value; infinity: any that is finite.
        flags: fp_field_flags.
        choices: the words that a word is one of; False and True among them are the bools.
    """

    name: str
    type: int
    default: Any
    initial: float | None
    least: float
    most: float
    flags: int
    choices: tuple[bool | str, ...]

    def spelled_default(self) -> str:
        """Return the default as the library writes it."""
        default = self.default if self.initial is None else self.initial
        return str(default).lower() if default is None or isinstance(default, bool) else f"{default}"

    def check(self, value: Any) -> Any:
        """Return a value as the policy keeps it, or refuse it. Lists are their policy's own business."""
        if self.type == _abi.BOOL:
            return check_bool(self.name, value)
        if value is None and self.default is None:
            return None
        if self.type == _abi.FLOAT:
            return self._check_float(value)
        if self.type == _abi.CHOICE:
            return check_choice(self.name, value, self.choices)
        if self.type == _abi.INT:
            least = max(int(self.least), 1) if self.flags & _abi.ZERO_IS_NONE else int(self.least)
            return check_integer(self.name, value, least, int(self.most))
        return value

    def _check_float(self, value: Any) -> float:
        number = check_number(self.name, value)
        least, most = self.least, min(self.most, _MAX_FLOAT32)
        if self.flags & _abi.ABOVE_LEAST and least == 0:
            least = _MIN_FLOAT32
        below = number < most if self.flags & _abi.BELOW_MOST else number <= most
        if not (least <= number and below):  # NaN is refused too
            refuse(self.name, number, self._range())
        return number

    def _range(self) -> str:
        """Return the range in words, as the library's own refusals have it."""
        least = f"{'above' if self.flags & _abi.ABOVE_LEAST else 'at least'} {self.least:g}"
        if math.isinf(self.most):
            return f"finite and {least}"
        return f"{least} and {'below' if self.flags & _abi.BELOW_MOST else 'at most'} {self.most:g}"


def parsed(text: str) -> Any:
    """Return the C struct that a policy's text describes, with its tables, as memory that C may read."""
    needed = ctypes.c_size_t()
    _abi.check(_abi.lib.fp_policy_parse(text.encode(), None, 0, ctypes.byref(needed)))
    memory = (ctypes.c_uint64 * (needed.value // 8))()
    _abi.check(_abi.lib.fp_policy_parse(text.encode(), ctypes.byref(memory), needed.value, None))
    return memory


def _default(field: _abi.PolicyField, struct: Any, choices: tuple[bool | str, ...]) -> Any:
    if field.flags & (_abi.ALTERNATIVE | _abi.OPTIONAL) or field.type in (_abi.INT_TABLE, _abi.FLOAT_TABLE):
        return None
    if field.type == _abi.FLOAT:
        return field.initial
    number = ctypes.c_int32.from_buffer(struct, field.offset).value
    if field.type == _abi.BOOL:
        return bool(number)
    if field.type == _abi.CHOICE:
        return choices[number]
    return None if field.flags & _abi.ZERO_IS_NONE and number == 0 else number


_BOOLS = {"false": False, "true": True}


def _fields_of(name: str, kind: int) -> tuple[Field, ...]:
    struct, raw = parsed(name), _abi.PolicyField()
    found: list[Field] = []
    while _abi.lib.fp_policy_field_at(kind, len(found), ctypes.byref(raw)) == 0:
        choices = tuple([_BOOLS.get(word, word) for word in raw.choices.decode().split()])
        decides = raw.flags & _abi.ALTERNATIVE and not math.isnan(raw.initial)
        found.append(
            Field(
                raw.name.decode(),
                raw.type,
                _default(raw, struct, choices),
                raw.initial if decides else None,
                raw.least,
                raw.most,
                raw.flags,
                choices,
            )
        )
    return tuple(found)


def _read() -> dict[str, tuple[Field, ...]]:
    kind = ctypes.c_int32()
    fields: dict[str, tuple[Field, ...]] = {}
    while name := _abi.lib.fp_policy_name(len(fields), ctypes.byref(kind)):
        fields[name.decode()] = _fields_of(name.decode(), kind.value)
    return fields


FIELDS = _read()  # by name of the policy, in the library's order


@functools.lru_cache(maxsize=256)
def struct_of(text: str) -> Any:
    """Return `parsed`, kept for the next call."""
    return parsed(text)


def vertical_slash_room(text: str, heads: int) -> tuple[int, int]:
    """Return how many verticals and slashes a policy's masks need room for, however many keys there are."""
    problem, mask = _abi.sized(_abi.Problem), _abi.sized(_abi.BlockMask)
    problem.batch, problem.q_heads, problem.kv_heads, problem.head_dim = 1, heads, heads, 16
    problem.causal, problem.softmax_scale = 1, 1.0
    problem.total_q = problem.max_seqlen_q = 1
    problem.total_k = problem.max_seqlen_k = MAX_TOKENS
    somewhere = ctypes.c_float()  # described, never read
    for tensor in (problem.q, problem.k, problem.v):
        tensor.data = ctypes.addressof(somewhere)
    struct = parsed(text)
    _abi.check(_abi.lib.fp_mask_describe(ctypes.byref(problem), ctypes.byref(struct), ctypes.byref(mask)))
    return mask.max_verticals, mask.max_slashes
