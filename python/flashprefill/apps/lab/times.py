"""How long selection and attention take: each method at the swept value nearest to one density, by turns.

On one layer, since the times of layers differ only by their densities, in the dtype of the model. PyTorch's
dense attention and our kernel with every block kept take turns with the methods in the same loop. A method
that a GPU does not select for has the time of its selection on the CPU and no other.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ... import prefill_attention, select
from ...policies import Dense, Policy
from ..device import CPU, Device
from .figures import Layer


def _sdpa(layer: Layer) -> Callable[[], Any]:
    q, k, v = (x.transpose(0, 1)[None] for x in (layer.query, layer.key, layer.value))
    return lambda: torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=layer.scale, enable_gqa=q.shape[1] != k.shape[1]
    )


class Contender:
    """One method: its calls, what it keeps, where it selects, and its times."""

    def __init__(self, label: str, policy: Policy, layer: Layer) -> None:
        self.label, policy = label, policy.at_layer(layer.number)
        mask, self.selects_on = layer.select(policy)
        self.here = self.selects_on == layer.device.kind
        own = (layer.query, layer.key, layer.value)
        query, key, value = own if self.here else layer.in_host_memory
        values = value if policy.reads_values else None
        self.select = partial(select, query, key, policy, v=values, softmax_scale=layer.scale)
        self.whole = partial(prefill_attention, *own, policy, softmax_scale=layer.scale)
        self.density = self.whole(return_stats=True)[1].mean_density if self.here else mask.density
        self.seconds: list[float] = []
        self.selecting: list[float] = []

    def take_turn(self, device: Device) -> None:
        """Time it once more."""
        if self.here:
            whole, selecting = device.timed_policy(self.whole, self.select)
            self.seconds.append(whole)
        else:
            selecting = CPU.timed(self.select)[1]
        self.selecting.append(selecting)

    def row(self, dense: float) -> dict[str, Any]:
        """Return its medians, compared with PyTorch's."""
        seconds = statistics.median(self.seconds) if self.seconds else None
        return {
            "label": self.label,
            "density": round(self.density, 4),
            "selects_on": self.selects_on,
            "select_seconds": round(statistics.median(self.selecting), 8),
            "seconds": None if seconds is None else round(seconds, 8),
            "speedup": None if seconds is None else round(dense / seconds, 3),
        }


def measure(layer: Layer, policies: list[tuple[str, Policy]], turns: int) -> list[dict[str, Any]]:
    """Return medians over the turns: one row for PyTorch, one for our dense kernel, one per policy."""
    device, sdpa = layer.device, _sdpa(layer)
    everyone = [Contender(label, policy, layer) for label, policy in [("Dense", Dense()), *policies]]
    if device.cuda:
        sdpa()  # loads what its first use loads, untimed
    base: list[float] = []
    for _ in range(turns):
        base.append(device.timed(sdpa)[1])
        for one in everyone:
            one.take_turn(device)
    dense = statistics.median(base)
    about = {"label": "PyTorch SDPA", "density": 1.0, "selects_on": None, "select_seconds": None}
    rows = [one.row(dense) for one in everyone]
    rows[0]["select_seconds"] = None  # dense attention selects nothing
    return [{**about, "seconds": dense, "speedup": 1.0}, *rows]
