"""Seconds of selection, attention and guards: :func:`collect_timings` sums them up over a block of code."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator


class Timings:
    """Seconds that calls on the CPU spent, summed over the calls inside a :func:`collect_timings` block."""

    def __init__(self) -> None:
        self.select_seconds = 0.0
        self.attend_seconds = 0.0
        self.guard_seconds = 0.0
        self.calls = 0

    def __repr__(self) -> str:
        return (
            f"Timings(select_seconds={self.select_seconds:.6f}, attend_seconds={self.attend_seconds:.6f}, "
            f"guard_seconds={self.guard_seconds:.6f}, calls={self.calls})"
        )


_timings: contextvars.ContextVar[Timings | None] = contextvars.ContextVar(
    "flashprefill_timings", default=None
)


@contextlib.contextmanager
def collect_timings() -> Iterator[Timings]:
    """Sum up the seconds of selection, attention and guards of the calls inside the block. CPU only."""
    timings = Timings()
    token = _timings.set(timings)
    try:
        yield timings
    finally:
        _timings.reset(token)


def active() -> Timings | None:
    """Return what the innermost block collects in, or None outside of one."""
    return _timings.get()
