"""What a policy's fields may be: each check returns the value, or raises with the field's name."""

from __future__ import annotations

from typing import Any

from ..errors import refuse, refuse_type

MAX_FLOAT32 = 3.4028234663852886e38
MAX_TOKENS = (1 << 31) - 1
MAX_BLOCKS = 1 << 24  # the library's limit: more blocks than the longest sequence has


def check_number(name: str, value: Any) -> float:
    """Return a number of any kind as a float."""
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
        refuse_type(name, repr(value), "a number")
    return float(value)


def check_integer(name: str, value: Any, low: int, high: int) -> int:
    """Return an integer from low to high."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        refuse_type(name, repr(value), "an integer")
    number = int(value)
    if not low <= number <= high:
        refuse(name, number, f"from {low} to {high}")
    return number


def check_alpha(value: Any) -> float:
    """Return a threshold as a share of a best score: any share, also above 1."""
    number = check_number("alpha", value)
    if not 0.0 <= number <= MAX_FLOAT32:  # false for NaN too
        refuse("alpha", number, "finite and at least 0")
    return number


_STRIDES = (4, 8, 16, 32, 64, 128)


def check_share(name: str, value: Any, *, zero: bool = False) -> float:
    """Return a share: at most 1, and 0 only with `zero`."""
    number = check_number(name, value)
    if not (0.0 if zero else 1e-37) <= number <= 1.0:  # 1e-37: less would be 0 or subnormal in fp32
        refuse(name, number, "at least 0 and at most 1" if zero else "above 0 and at most 1")
    return number


def check_stride(stride: Any, block_size: Any) -> int:
    """Return the tokens of a cell, whole cells a block."""
    number = check_integer("stride", stride, 4, 128)
    if number not in _STRIDES:
        refuse("stride", number, "4, 8, 16, 32, 64 or 128")
    if check_integer("block_size", block_size, 16, 1024) % number:
        refuse("stride", number, f"a divisor of block_size ({block_size})")
    return number
