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


def refuse(argument: str, value: Any, must_be: str) -> NoReturn:
    """Raise the one form of refusal for a bad value."""
    raise InvalidArgumentError(f"{argument} is {_in_digits(value)}; it must be {must_be}")


def _in_digits(value: Any) -> str:
    try:
        return f"{value}"
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return f"an integer of {value.bit_length()} bits"


def refuse_type(argument: str, value: Any, must_be: str) -> NoReturn:
    """Raise the one form of refusal for a bad type."""
    raise ArgumentTypeError(f"{argument} is {value}; it must be {must_be}")
