"""From what layers lose under each other's masks to a plan.

A layer selects, or it stays with the last layer before it that did (HyLRA, arXiv 2602.00777: one mask is
alive at a time). Of all ways in which so many layers borrow, the plan has the least worst loss, and of those
the least sum. Both are found by a pass over (layer, last source, layers that borrow): first the worst, then
the sum over steps that are no worse.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Losses = npt.NDArray[np.float64]

Join = Callable[[float, float], float]
# By (last source, layers that borrow): the cost, and the sources so far.
Ways = dict[tuple[int, int], tuple[float, tuple[int | None, ...]]]


def sources(loss: Losses, borrow: int) -> list[int | None]:
    """Return the source of each layer, None where it selects.

    Args:
        loss: [layers, layers], what layer j loses under the mask of layer i < j; inf: it must not.
        borrow: how many layers borrow.

    Raises:
        ValueError: there is no way for so many to.
    """
    worst = _cheapest(loss, borrow, max)[0]
    if math.isinf(worst):
        raise ValueError(f"no plan has {borrow} of {len(loss)} layers borrow")
    return _cheapest(np.where(loss <= worst, loss, np.inf), borrow, lambda a, b: a + b)[1]


def _cheapest(loss: Losses, borrow: int, join: Join) -> tuple[float, list[int | None]]:
    """The least cost, joined over the layers that borrow, and how it is reached."""
    layers = len(loss)
    best: Ways = {(0, 0): (0.0, (None,))}
    for j in range(1, layers):
        following: Ways = {}

        def offer(state: tuple[int, int], cost: float, path: tuple[int | None, ...]) -> None:
            if state not in following or cost < following[state][0]:  # noqa: B023
                following[state] = (cost, path)  # noqa: B023

        for (source, count), (cost, path) in best.items():
            offer((j, count), cost, (*path, None))
            if count < borrow and np.isfinite(loss[source, j]):
                offer((source, count + 1), join(cost, max(0.0, float(loss[source, j]))), (*path, source))
        best = following
    found = [entry for (_, count), entry in best.items() if count == borrow]
    if not found:
        return math.inf, []
    cost, path = min(found, key=lambda entry: entry[0])
    return cost, list(path)
