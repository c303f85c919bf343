"""What the package raises.

Every error is a :class:`FlashPrefillError` and also the built-in exception that Python's users expect for its
kind, so ``except ValueError`` works without knowing this module. The one line of each message names the
argument, what it was and what it must be; where the C library refused, the line is the library's own.
"""

from __future__ import annotations

from typing import Any, NoReturn

__all__ = [
    "ArgumentTypeError",
    "DeviceError",
    "FlashPrefillError",
    "InternalError",
    "InvalidArgumentError",
    "OutOfMemoryError",
    "UnsupportedError",
    "refuse",
    "refuse_type",
    "shown",
]


class FlashPrefillError(Exception):
    """The base of all errors of this package."""


class InvalidArgumentError(FlashPrefillError, ValueError):
    """An argument has a value that it must not have."""


class ArgumentTypeError(FlashPrefillError, TypeError):
    """An argument is not of a type, or not of a dtype, that is understood."""


class UnsupportedError(FlashPrefillError, NotImplementedError):
    """The call is right, but no backend on this machine does it."""


class OutOfMemoryError(FlashPrefillError, MemoryError):
    """There was not enough memory."""


class DeviceError(FlashPrefillError, RuntimeError):
    """The device or its driver refused; the message is theirs."""


class InternalError(FlashPrefillError, RuntimeError):
    """A mistake in the library."""


def shown(value: Any) -> str:
    """Return a value as a message has it: its repr, cut to a line's length."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        size = f"of {value.bit_length()} bits" if isinstance(value, int) else "too long to write"
        return f"a {type(value).__name__} {size}"
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


_MOST_SHOWN = 200  # characters


def refuse(argument: str, value: Any, must_be: str) -> NoReturn:
    """Raise the one form of refusal for a bad value."""
    raise InvalidArgumentError(f"{argument} is {_worded(value)}; it must be {must_be}")


def _worded(value: Any) -> str:
    try:
        return f"{value}"
    except ValueError:
        return shown(value)


def refuse_type(argument: str, value: Any, must_be: str) -> NoReturn:
    """Raise the one form of refusal for a bad type."""
    raise ArgumentTypeError(f"{argument} is {_worded(value)}; it must be {must_be}")
