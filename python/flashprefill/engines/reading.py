"""Counters as they were at one moment, without waiting for a GPU that has counted a part of them."""

from __future__ import annotations

import sys
from typing import Any


class Reading:
    """Numbers of the host, and one of a GPU's that is on its way.

    Args:
        numbers: counters, "kept_blocks" without what lies on the GPU.
        device_kept: the rest of it, an integer tensor of a GPU, or None.
    """

    def __init__(self, numbers: dict[str, Any], device_kept: Any) -> None:
        self._numbers = numbers
        self._host: Any = None
        self._event: Any = None
        if device_kept is not None:
            torch = sys.modules["torch"]
            self._host = torch.empty((), dtype=device_kept.dtype, pin_memory=True)
            self._host.copy_(device_kept, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def is_there(self) -> bool:
        """Return whether `numbers` does not wait."""
        return self._event is None or bool(self._event.query())

    def numbers(self) -> dict[str, Any]:
        """Return the counters, with their "density". Waits for what is not there."""
        if self._event is not None:
            self._event.synchronize()
            self._numbers["kept_blocks"] += int(self._host)
            self._event = None
        causal = self._numbers["causal_blocks"]
        return {**self._numbers, "density": self._numbers["kept_blocks"] / causal if causal else None}
