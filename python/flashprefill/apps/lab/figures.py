"""One mask's figures on one layer: density, recall of the true softmax mass, output error.

All figures come from the library's own kernel, so a mask is judged as it would run. The
true mass on what a mask keeps needs no list of masses: it is exp(lse - lse of dense attention), row by row.
The masses by block are computed too, once a layer: the oracle selects by them and the page shows them. For
all methods a *tile* is 128 query tokens of one query head, whatever tiles a mask has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ... import attend, audit, select
from ...errors import UnsupportedError
from ...guard import Guard, GuardReport
from ...mask import BlockMask
from ...policies import Dense, Policy
from .. import measure
from ..device import Device
from ..heads import attention_mass

LONG_FROM = 16384  # tokens, from which on the reference density is the lower one
TILE = 128  # query tokens over which recall and error are averaged first


@dataclass
class Layer:
    """One layer of one text: what its attention was called with, and what dense attention made of it."""

    number: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    block_size: int = 128
    out: torch.Tensor = field(init=False)
    lse: torch.Tensor = field(init=False)
    norm: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        mask = select(self.query, self.key, Dense(block_size=self.block_size), softmax_scale=self.scale)
        self.out, self.lse = self.attend(mask)
        self.norm = tile_norms(self.out)

    @classmethod
    def of(cls, number: int, captured: measure.Captured) -> Layer:
        """A captured layer, its dense attention computed."""
        return cls(number, *captured)

    @property
    def device(self) -> Device:
        """Where it is."""
        return Device(self.query.device.type)

    def sdpa_backend(self) -> str | None:
        """Which of its attentions PyTorch picks here on a GPU."""
        tokens, heads, dim = self.query.shape
        return self.device.sdpa_backend(heads, self.key.shape[1], dim, tokens, self.query.dtype)

    @cached_property
    def in_host_memory(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, for what selects on the CPU only."""
        return self.query.cpu(), self.key.cpu(), self.value.cpu()

    def select(self, policy: Policy) -> tuple[BlockMask, str]:
        """Return a policy's mask, and the kind of device that selected: the CPU where no other can."""
        policy = policy.at_layer(self.number)
        try:
            value = self.value if policy.reads_values else None
            return select(self.query, self.key, policy, v=value, softmax_scale=self.scale), self.device.kind
        except UnsupportedError:
            if not self.device.cuda:
                raise
        query, key, value = self.in_host_memory
        mask = select(query, key, policy, v=value if policy.reads_values else None, softmax_scale=self.scale)
        return mask.to(self.query.device), "cpu"

    def attend(self, mask: BlockMask) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (out [tokens, heads, head_dim], lse [heads, tokens]) under a mask."""
        out, lse = attend(self.query, self.key, self.value, mask, softmax_scale=self.scale, return_lse=True)
        return out, lse

    @cached_property
    def mass(self) -> torch.Tensor:
        """True softmax mass by block, the mean over a tile's rows: fp32 [heads, tiles, blocks]."""
        heads, group = self.query.shape[1], self.query.shape[1] // self.key.shape[1]
        return torch.stack(
            [
                attention_mass(self.query[:, h], self.key[:, h // group], self.scale, TILE, self.block_size)
                for h in range(heads)
            ]
        )


def by_tile(rows: torch.Tensor) -> torch.Tensor:
    """Sums over the tokens of each tile: [tokens, heads] to [tiles, heads]."""
    tokens, heads = rows.shape
    padded = torch.nn.functional.pad(rows, (0, 0, 0, -tokens % TILE))
    return padded.view(-1, TILE, heads).sum(dim=1)


def tile_norms(x: torch.Tensor) -> torch.Tensor:
    """The norm of each tile of each head, [tiles, heads]."""
    return by_tile(x.float().square().sum(dim=-1)).sqrt()


@dataclass
class Sums:
    """The tiles of all layers, of one method at one value."""

    density: list[list[float]] = field(default_factory=list)  # by layer and mask head
    recall: list[torch.Tensor] = field(default_factory=list)
    error: list[torch.Tensor] = field(default_factory=list)
    corrected: list[torch.Tensor] = field(default_factory=list)
    select_seconds: float = 0.0
    attend_seconds: float = 0.0
    guards: list[GuardReport] = field(default_factory=list)  # one per layer

    def add(self, layer: Layer, mask: BlockMask) -> None:
        """Attend under the mask, without the mean correction and with it."""
        tokens = by_tile(torch.ones(layer.query.shape[0], 1, device=layer.query.device))
        guard = Guard(layer=layer.number)
        self.guards.append(audit(layer.query, layer.key, mask, guard, softmax_scale=layer.scale))
        mask.mean_correction = False
        (out, lse), seconds = layer.device.timed(lambda: layer.attend(mask))
        self.attend_seconds += seconds
        stats = mask.stats
        density = np.asarray(stats.kept - stats.skipped, dtype=float)[0] / int(stats.total[0])
        group = layer.query.shape[1] // len(density)
        self.density.append(np.repeat(density, group).round(4).tolist())
        kept = (lse - layer.lse).T.clamp(max=0).exp()
        self.recall.append((by_tile(kept) / tokens).flatten().cpu())
        self.error.append((tile_norms(out.float() - layer.out.float()) / layer.norm).flatten().cpu())
        if mask.key_lists is not None and layer.device.cuda:
            return  # CUDA corrects no lists of keys
        mask.mean_correction = mask.vertical_slash is None  # parts of blocks have no mean
        out, _ = layer.attend(mask)
        self.corrected.append((tile_norms(out.float() - layer.out.float()) / layer.norm).flatten().cpu())

    def figures(self) -> dict[str, Any]:
        """Means over all tiles, and the recall that 95 of 100 tiles have at least; None: not measured."""
        recall = torch.cat(self.recall)
        corrected = float(torch.cat(self.corrected).nan_to_num().mean()) if self.corrected else None
        return {
            "density": round(float(np.mean(self.density)), 5),
            "recall": round(float(recall.mean()), 5),
            "recall_p5": round(float(torch.quantile(recall.double(), 0.05)), 5),
            "error": round(float(torch.cat(self.error).nan_to_num().mean()), 5),
            "error_corrected": None if corrected is None else round(corrected, 5),
            "select_seconds": round(self.select_seconds, 5),
            "attend_seconds": round(self.attend_seconds, 5),
        }


CURVES = ("recall", "recall_p5", "error", "error_corrected")


def reference_density(tokens: int, forced_blocks: int) -> float:
    """Return the density at which methods are compared.

    0.15 for long texts and 0.25 for short ones, and more where the `forced_blocks` of
    each tile, which all methods keep, leave too little to choose.
    """
    blocks = -(-tokens // TILE)
    rows = (min(tile + 1, forced_blocks) for tile in range(blocks))
    forced = sum(rows) / (blocks * (blocks + 1) / 2)
    least = 0.15 if tokens >= LONG_FROM else 0.25
    return next(
        d for d in (least, 0.3, 0.4, 0.5, 0.6, 0.75, 1.0) if d >= min(1.0, 1.25 * forced) and d >= least
    )


def shown(curve: dict[str, Any], density: float) -> tuple[dict[str, Any], float]:
    """A curve's figures for a table, and at which density: the asked one, or the nearest that it reaches."""
    at = curve["at"][f"{density:g}"]
    if at is not None:
        return at, density
    nearest = min(curve["points"], key=lambda point: abs(point["density"] - density))
    return nearest, nearest["density"]


def at_density(points: list[dict[str, Any]], density: float) -> dict[str, Any] | None:
    """A curve's figures at one density, between the two points around it; None outside of them.

    Linear in the logarithm of the density: curves are bent, and between points a factor of 1.6 apart a plain
    line is 0.0026 below the recall of masks cut at exactly that density, this one 0.0007 (root mean square).
    """
    ordered = sorted(points, key=lambda point: point["density"])
    for low, high in zip(ordered, ordered[1:], strict=False):
        if low["density"] <= density <= high["density"]:
            width = math.log(high["density"] / low["density"])
            t = math.log(density / low["density"]) / width if width else 0.0
            return {
                name: None if low[name] is None else round((1 - t) * low[name] + t * high[name], 4)
                for name in CURVES
            }
    return None
