"""The demo's pictures: heads, masks and bars, from the queries and keys of the dense pass.

Masks are selected again from the dense pass's own queries and keys, so that all policies decide on the same
input, next to the true attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..api import select
from ..policies import Policy, Streaming
from . import heads as kinds
from . import plots
from .method import Method

SHOWN_POLICIES = 2  # more masks in a row would be too small to see
SAMPLED_ROWS = 512  # rows per head that the choice of heads looks at


@dataclass
class Drawn:
    """The files written, and the heads that were shown with their figures."""

    files: list[str]
    heads: list[dict[str, Any]]


def host(x: Any) -> Any:
    """A tensor or an array in host memory, as NumPy's."""
    return np.asarray(x.cpu() if isinstance(x, torch.Tensor) else x)


def forced_by(policy: Policy) -> Streaming:
    """Return the policy that keeps the forced blocks of this one alone."""
    names = ("sink_blocks", "window_blocks", "dense_tail_blocks")
    if not hasattr(policy, "sink_blocks"):
        return Streaming(0, 0, 0, block_size=policy.block_size, share_heads=policy.share_heads)
    counts = {name: getattr(policy, name) for name in names}
    return Streaming(**counts, block_size=policy.block_size, share_heads=policy.share_heads)


def always_kept(policy: Policy, captured: dict[int, Any]) -> float | None:
    """The share of the blocks that a policy keeps whatever their scores; None if no layer was captured."""
    if not captured:
        return None
    query, key = next(iter(captured.values()))[:2]
    return float(select(query, key, forced_by(policy)).density)


def mask_panels(
    query: Any,
    key: Any,
    scale: float,
    head: int,
    group: int,
    policies: Sequence[tuple[str, Policy]],
    mass: Any = None,
    value: Any = None,
) -> list[plots.MaskPanel]:
    """Return a panel per policy for one query head; query [tokens, heads, dim], key [tokens, kv_heads, dim].

    `mass(tile_tokens, block_size)`, if given, is the head's true attention mass; the panels then say how much
    of it is kept. `value` is like key, for policies that read it.
    """
    panels = []
    for label, policy in policies:
        mask = select(query, key, policy, v=value if policy.reads_values else None, softmax_scale=scale)
        forced = select(query, key, forced_by(policy), softmax_scale=scale)
        own = head // group if mask.share_heads else head
        kept, always = (host(m.dense())[own] for m in (mask, forced))
        visible = kinds.visible_blocks(mask, len(query), len(key))
        recall = None
        if mass is not None:
            weights = np.minimum(mask.tile_tokens, query.shape[0] - mask.tile_tokens * np.arange(len(kept)))
            recall = float(
                (mass(mask.tile_tokens, mask.block_size) * kept).sum(axis=1) @ weights / weights.sum()
            )
        panels.append(plots.MaskPanel(label, kept, always, visible, recall))
    return panels


def draw(out: Path, results: dict[str, Any], methods: Sequence[Method], captured: dict[int, Any]) -> Drawn:
    """Write masks.png, density.png and times.png."""
    runs = results["runs"]
    bars = []
    for run in runs:
        select_s = run["select_seconds"]["median"]
        attention, ttft = run["attention_seconds"]["median"], run["ttft_seconds"]["median"]
        bars.append((run["label"], select_s, max(0.0, attention - select_s), max(0.0, ttft - attention)))
    plots.times(out / "times.png", bars)
    files = ["times.png"]
    maps = [
        (method.label, method.density) for method in methods if method.selects and method.density is not None
    ]
    if maps:
        plots.density(out / "density.png", maps)
        files.append("density.png")
    heads = draw_masks(out / "masks.png", methods, captured) if captured else []
    if heads:
        files.append("masks.png")
    return Drawn(files, heads)


def _to_show(methods: Sequence[Method]) -> list[tuple[str, Policy]]:
    """The policies whose masks are shown: the first, and the one that differs from it most."""
    policies = [
        (method.label, method.policy) for method in methods if method.policy is not None and method.selects
    ]
    return policies[:1] if len(policies) < SHOWN_POLICIES else [policies[0], policies[-1]]


def candidates_of(
    captured: dict[int, Any], policy: Policy
) -> tuple[list[kinds.Candidate], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Return all captured heads as candidates, the forced blocks, and the visible blocks."""
    found: list[kinds.Candidate] = []
    forced = visible = np.zeros((0, 0), bool)
    for layer, (query, key, value, scale) in captured.items():
        here = policy.at_layer(layer)
        mask = select(query, key, here, v=value if here.reads_values else None, softmax_scale=scale)
        kept = host(mask.dense())
        forced = host(select(query, key, forced_by(policy), softmax_scale=scale).dense())[0]
        visible = kinds.visible_blocks(mask, len(query), len(key))
        rows = torch.linspace(0, len(query) - 1, min(SAMPLED_ROWS, len(query)), device=query.device).long()
        tiles = host(rows // mask.tile_tokens)
        group = query.shape[1] // key.shape[1]
        for head in range(query.shape[1]):
            own = kept[head // group if mask.share_heads else head]
            mass = host(kinds.row_mass(query[:, head], key[:, head // group], scale, rows, mask.block_size))
            recall, forced_recall = ((mass * some[tiles]).sum(axis=1).mean() for some in (own, forced))
            found.append(kinds.Candidate(layer, head, own, float(recall), float(forced_recall)))
    return found, forced, visible


def draw_masks(path: Path, methods: Sequence[Method], captured: dict[int, Any]) -> list[dict[str, Any]]:
    """Pick heads that differ in kind and draw their attention and masks; returns the heads' figures."""
    shown = _to_show(methods)
    if not shown:
        return []
    rows, figures = [], []
    for layer, head, kind in kinds.choose(*candidates_of(captured, shown[0][1])):
        query, key, value, scale = captured[layer]
        group = query.shape[1] // key.shape[1]

        def mass(
            tile_tokens: int, block_size: int, q: Any = query[:, head], k: Any = key[:, head // group]
        ) -> Any:
            return host(kinds.attention_mass(q, k, scale, tile_tokens, block_size).double())  # noqa: B023

        here = [(label, policy.at_layer(layer)) for label, policy in shown]
        panels = mask_panels(query, key, scale, head, group, here, mass, value)
        rows.append(plots.HeadRow(f"layer {layer}, head {head}: {kinds.KINDS[kind]}", mass(128, 128), panels))
        seen = {panel.title: {"density": panel.density, "recall": panel.recall} for panel in panels}
        figures.append({"layer": layer, "head": head, "kind": kinds.KINDS[kind], "masks": seen})
    if rows:
        plots.masks(path, rows, query.shape[0])
    return figures
