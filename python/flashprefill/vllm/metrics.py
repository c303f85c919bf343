"""The counters of a worker's process."""

from __future__ import annotations

from typing import Any

from .host import host

metrics = host.metrics


def snapshot() -> dict[str, Any]:
    """Return the counters of this process: the one that computes, not a server's front end.

    Returns:
        What `flashprefill.engines.metrics.Metrics.snapshot` describes.
    """
    return metrics.snapshot()


class WorkerExtension:
    """For vLLM's ``worker_extension_cls="flashprefill.vllm.WorkerExtension"``.

    ``llm.collective_rpc("flashprefill_stats")`` then returns each worker's `snapshot`.
    """

    def flashprefill_stats(self) -> dict[str, Any]:
        """Return this worker's counters."""
        return snapshot()
