"""A speed-up as a product: what our dense kernel gains over PyTorch's attention, and what sparsity adds.

PyTorch's attention is slow in some dtypes on some processors. A speed-up over it says little about a policy
until the part that our own dense kernel has is named. So every comparison has a row of that kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

OURS = "Dense, our kernel"  # the label of the row
DENSE = (None, "dense")  # what `policy` is in the rows that select nothing


def times(factor: float) -> str:
    """Write a factor: 15.6x."""
    return f"{factor:.1f}x"


def product(whole: float, kernel: float) -> str:
    """Return "15.6x = 4.9x kernel x 3.2x sparsity".

    Args:
        whole: speed-up over PyTorch's dense attention.
        kernel: speed-up of our dense kernel over it.
    """
    return f"{times(whole)} = {times(kernel)} kernel x {times(whole / kernel)} sparsity"


def fastest(runs: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The run of the policy whose attention is fastest, None if there are only the dense ones."""
    sparse = [run for run in runs if run["policy"] not in DENSE]
    return max(sparse, key=lambda run: run["attention_speedup"] or 0.0) if sparse else None


def our_dense(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The run of our dense kernel."""
    return next(run for run in runs if run["policy"] == "dense")


def headline(runs: Sequence[dict[str, Any]]) -> str | None:
    """The fastest policy's gains as products of our kernel's and sparsity's."""
    best = fastest(runs)
    if best is None:
        return None
    ours = our_dense(runs)
    parts = (
        f"{what} {product(best[key] or 0.0, ours[key] or 1.0)}"
        for what, key in (("attention", "attention_speedup"), ("first token", "ttft_speedup"))
    )
    return f"{best['label']}: {', '.join(parts)}"
