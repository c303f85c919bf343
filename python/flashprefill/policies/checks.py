"""Checks of values: each returns the value as a plain Python one, or raises with the argument's name."""

from __future__ import annotations

import sys
from typing import Any

from ..errors import refuse, refuse_type, shown

MAX_TOKENS = (1 << 31) - 1


def check_number(name: str, value: Any) -> float:
    """Return a number of any kind as a float."""
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
        refuse_type(name, shown(value), "a number")
    try:
        return float(value)
    except OverflowError:
        refuse(name, value, f"at most {sys.float_info.max:g}")
    except (TypeError, ValueError):  # an array, for one
        refuse_type(name, shown(value), "a number")


def check_integer(name: str, value: Any, low: int, high: int) -> int:
    """Return an integer from low to high."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        refuse_type(name, shown(value), "an integer")
    number = int(value)
    if not low <= number <= high:
        refuse(name, number, f"from {low} to {high}")
    return number


def check_list(name: str, value: Any, of: str) -> tuple[Any, ...]:
    """Return what is listed, or refuse what is no list."""
    if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
        refuse_type(name, shown(value), of)
    if not (listed := tuple(value)):
        refuse(name, (), of)
    return listed


def check_bool(name: str, value: Any) -> bool:
    """Return a bool."""
    if not isinstance(value, bool):
        refuse_type(name, shown(value), "True or False")
    return value


def check_choice(name: str, value: Any, choices: tuple[bool | str, ...]) -> bool | str:
    """Return one of the choices. 0 and 1 are not the bools that they equal."""
    if not any(value is each if isinstance(each, bool) else value == each for each in choices):
        refuse(name, shown(value), "one of " + ", ".join(map(repr, choices)))
    return value  # type: ignore[no-any-return]


# What a policy's and a mask's mean_correction may be, in the order of fp_mean_correction.
CORRECTIONS = (False, True, "summary")


def check_stride(stride: int, block_size: int) -> None:
    """Refuse a cell whose tokens are no power of two, or do not divide a block."""
    if stride & (stride - 1):
        refuse("stride", stride, "4, 8, 16, 32, 64 or 128")
    if block_size % stride:
        refuse("stride", stride, f"a divisor of block_size ({block_size})")
