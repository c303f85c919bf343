"""Counters as they were at one moment, without waiting for a GPU that has counted a part of them."""

from __future__ import annotations

import sys
from typing import Any

from .findings import figures


class Reading:
    """Numbers of the host, and those of a GPU that are on their way.

    Args:
        numbers: counters, "kept_blocks" without what lies on the GPU.
        device_kept: the rest of it, an integer tensor of a GPU, or None.
        found: sums of what a guard found, float64 [findings.SUMS], on any device, or None.
        risk: of the guard.
    """

    def __init__(
        self, numbers: dict[str, Any], device_kept: Any = None, found: Any = None, risk: float = 0.0
    ) -> None:
        self._numbers = numbers
        self._event: Any = None
        self._risk = risk
        self._kept, self._found = self._on_its_way(device_kept), self._on_its_way(found)

    def _on_its_way(self, x: Any) -> Any:
        """Return a tensor's copy on the host, which is there when the event is."""
        if x is None or x.device.type == "cpu":
            return x
        torch = sys.modules["torch"]
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        host.copy_(x, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()
        return host

    def is_there(self) -> bool:
        """Return whether `numbers` does not wait."""
        return self._event is None or bool(self._event.query())

    def numbers(self) -> dict[str, Any]:
        """Return the counters, with their "density" and "guard". Waits for what is not there."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        if self._kept is not None:
            self._numbers["kept_blocks"] += int(self._kept)
            self._kept = None
        self._numbers["guard"] = None if self._found is None else figures(self._found.tolist(), self._risk)
        causal = self._numbers["causal_blocks"]
        return {**self._numbers, "density": self._numbers["kept_blocks"] / causal if causal else None}
