"""How long selection and attention take: each method at the swept value nearest to one density, by turns.

On one layer, since the times of layers differ only by their densities, in the dtype of the model. PyTorch's
dense attention and our kernel with every block kept take turns with the methods in the same loop.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from ... import collect_timings, prefill_attention
from ...policies import Dense, Policy
from .figures import Layer


def _sdpa(layer: Layer) -> float:
    q, k, v = (x.transpose(0, 1)[None] for x in (layer.query, layer.key, layer.value))
    begin = time.perf_counter()
    torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=layer.scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return time.perf_counter() - begin


def _ours(layer: Layer, policy: Policy) -> tuple[float, float, float]:
    with collect_timings() as timings:
        begin = time.perf_counter()
        result: Any = prefill_attention(
            layer.query, layer.key, layer.value, policy, softmax_scale=layer.scale, return_stats=True
        )
        whole = time.perf_counter() - begin
    return whole, timings.select_seconds, result[1].mean_density


def measure(
    layer: Layer, policies: list[tuple[str, Policy]], turns: int, step: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """Medians of so many turns: one row for PyTorch, one for our dense kernel, one a policy."""
    everyone = [("Dense", Dense()), *policies]
    sdpa: list[float] = []
    rows: dict[str, list[tuple[float, float, float]]] = {label: [] for label, _ in everyone}
    for _ in range(turns):
        sdpa.append(_sdpa(layer))
        step()
        for label, policy in everyone:
            rows[label].append(_ours(layer, policy))
            step()
    base = statistics.median(sdpa)
    table: list[dict[str, Any]] = [
        {"label": "PyTorch SDPA", "density": 1.0, "select_seconds": None, "seconds": base, "speedup": 1.0}
    ]
    for label, runs in rows.items():
        whole, select, density = (statistics.median(run[i] for run in runs) for i in range(3))
        table.append(
            {
                "label": label,
                "density": round(density, 4),
                "select_seconds": None if label == "Dense" else round(select, 5),
                "seconds": round(whole, 5),
                "speedup": round(base / whole, 3),
            }
        )
    return table
