"""What was tried to make Sketch better, on Q and K of real layers: one change of its score or rule at a time.

    flashprefill lab --text long --dump out/qkv
    python bench/lab/sketch_prototypes.py out/qkv --text long --out bench/results/lab-prototypes.json

Scores are computed in fp32 by torch, and each variant keeps as many blocks as give the density exactly, so
rows differ by what is kept and by nothing else. A *unit* is one product of a pooled query row with one vector
of a block; V1 takes 128 of them for a tile and a block.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from flashprefill import BlockMask
from flashprefill.apps import machine
from flashprefill.apps.lab import texts
from flashprefill.apps.lab.figures import Layer, Sums

BLOCK = 128
TOP = 10  # kept whatever the score: the sort key of forced blocks


@dataclass(frozen=True)
class Variant:
    """One way to score and keep."""

    group: str
    name: str
    rule: str = "mass"  # alpha, share, mass, or gain: share * rest^power
    power: float = 0.5
    pool: int = 16
    outliers: int = 4
    metric: str = "plain"
    clusters: int = 0  # centroids with one shared variance, in place of outliers
    directions: int = 0  # principal directions of the rest, beside its diagonal variance
    variance: bool = True
    exact: bool = False  # all keys, no description
    normalise: float = 0.0  # 1: every row's energies sum to 1; .5: half way, in logarithms
    diagonal: bool = False  # the tile's own block is in the sum too, by the part of it that a row sees

    @property
    def units(self) -> int:
        """Products a tile and a block."""
        terms = self.clusters + 1 if self.clusters else 1 + self.variance + self.outliers + self.directions
        return (BLOCK if self.exact else terms) * (BLOCK // self.pool)


GAIN, EIGHTH = {"rule": "gain"}, {"rule": "gain", "pool": 64, "outliers": 6}
NARROW = {"rule": "gain", "pool": 32, "outliers": 10}
SEEN = {"metric": "sampled"}
VARIANTS = (
    Variant("as it was", "Sketch, mass"),
    Variant("as it was", "Sketch, alpha", rule="alpha"),
    Variant("rule", "share", rule="share"),
    Variant("rule", "share * rest^1/4", rule="gain", power=0.25),
    Variant("rule", "share * rest^1/2", **GAIN),
    Variant("rule", "share * rest", rule="gain", power=1.0),
    Variant("rule", "the same with rest^1/2, rows normalised half way", **GAIN, normalise=0.5),
    Variant("rule", "the same, rows normalised", **GAIN, normalise=1.0),
    Variant("rule", "the same, the diagonal block estimated too", **GAIN, diagonal=True),
    Variant("rows and keys", "rows by 32, 4 outliers", **GAIN, pool=32),
    Variant("rows and keys", "rows by 32, 10 outliers", **NARROW),
    Variant("rows and keys", "rows by 64, 6 outliers", **EIGHTH),
    Variant("rows and keys", "rows by 64, 22 outliers", rule="gain", pool=64, outliers=22),
    Variant("rows and keys", "rows by 128, 6 outliers", rule="gain", pool=128, outliers=6),
    Variant("rows and keys", "rows by 128, 46 outliers", rule="gain", pool=128, outliers=46),
    Variant("description", "8 centroids, a shared variance", rule="gain", pool=64, clusters=8),
    Variant(
        "description", "2 principal directions, 8 outliers", rule="gain", pool=32, outliers=8, directions=2
    ),
    Variant("description", "no variance", **NARROW, variance=False),
    Variant("metric", "along the first principal direction", **NARROW, metric="principal"),
    Variant("metric", "within the block's own variance", **NARROW, metric="whitened"),
    Variant("metric", "farthest from zero", **NARROW, metric="norm"),
    Variant("metric", "q^2 of all rows", **NARROW, metric="queries"),
    Variant("metric", "q^2 of the last row of each tile", **NARROW, **SEEN),
    Variant("metric", "the whole covariance of q", **NARROW, metric="covariance"),
    Variant("kept", "mass, 4 outliers, rows by 16, query metric", **SEEN),
    Variant("kept", "gain, 6 outliers, rows by 64, query metric", **EIGHTH, **SEEN),
    Variant("kept", "gain, 6 outliers, rows by 128, query metric", rule="gain", pool=128, outliers=6, **SEEN),
    Variant("kept", "gain, 16 outliers, rows by 64, query metric", rule="gain", pool=64, outliers=16, **SEEN),
    Variant("bound", "all keys, rows by 16", **GAIN, exact=True),
    Variant("bound", "all keys, rows by 64", rule="gain", pool=64, exact=True),
    Variant("bound", "all keys, rows by 128", rule="gain", pool=128, exact=True),
    Variant("oracle", "true masses, alpha", rule="alpha", metric="oracle"),
    Variant("oracle", "true masses, share", rule="share", metric="oracle"),
)


def pooled(layer: Layer, pool: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounded means of each `pool` rows, [heads, tiles, rows per tile, dim], and their last positions."""
    n, heads, dim = layer.query.shape
    tiles = -(-n // BLOCK)
    rows = torch.nn.functional.pad(layer.query.float().permute(1, 0, 2), (0, 0, 0, tiles * BLOCK - n))
    at = torch.arange(tiles * BLOCK).view(-1, pool)
    count = (at < n).sum(1)
    means = rows.view(heads, -1, pool, dim).sum(2) / count.clamp(min=1)[:, None]
    last = torch.where(count > 0, at[:, -1].clamp(max=n - 1), -1)
    shape = (tiles, BLOCK // pool)
    return means.to(layer.query.dtype).float().view(heads, *shape, dim), last.view(shape)


def distances(layer: Layer, head: int, away: torch.Tensor, keys: torch.Tensor, metric: str) -> torch.Tensor:
    """How far each key is from its block's mean, [blocks, keys]. away: keys minus means."""
    group = layer.query.shape[1] // layer.key.shape[1]
    queries = layer.query[:, head * group : (head + 1) * group].float()
    if metric == "principal":
        first = torch.linalg.svd(away, full_matrices=False)[2][:, 0]
        return torch.einsum("bkd,bd->bk", away, first).abs()
    if metric == "whitened":
        return (away**2 / (away.square().mean(1, keepdim=True) + 1e-3)).sum(-1)
    if metric == "norm":
        return keys.square().sum(-1)
    if metric == "covariance":
        seen = queries.flatten(0, 1)
        return torch.einsum("bkd,de,bke->bk", away, seen.T @ seen / len(seen), away)
    weight = torch.ones(keys.shape[-1])
    if metric == "queries":
        weight = queries.square().sum((0, 1))
    if metric == "sampled":
        weight = (
            queries[sorted({*range(BLOCK - 1, len(queries), BLOCK), len(queries) - 1})].square().sum((0, 1))
        )
    return (away**2 * weight).sum(-1)


def centroids(
    keys: torch.Tensor, there: torch.Tensor, clusters: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Farthest-first centres, one assignment: (centres [blocks, clusters, dim], counts, shared variance)."""
    weight = there[..., None].float()
    centres = [(keys * weight).sum(1) / weight.sum(1).clamp(min=1)]
    near = (keys - centres[0][:, None]).square().sum(-1).masked_fill(~there, -1)
    for _ in range(clusters - 1):
        new = keys[torch.arange(len(keys)), near.argmax(-1)]
        centres.append(new)
        near = torch.minimum(near, (keys - new[:, None]).square().sum(-1).masked_fill(~there, -1))
    owner = torch.cdist(keys, torch.stack(centres, 1)).argmin(-1)
    member = torch.nn.functional.one_hot(owner, clusters).float() * weight
    counts = member.sum(1)
    means = torch.einsum("bkc,bkd->bcd", member, keys) / counts.clamp(min=1)[..., None]
    left = torch.einsum("bkc,bkd->bcd", member, keys**2) - counts[..., None] * means**2
    return means, counts, left.clamp(min=0).sum(1) / counts.sum(1).clamp(min=1)[:, None]


def terms(layer: Layer, head: int, rows: torch.Tensor, v: Variant) -> Iterator[torch.Tensor]:
    """The logarithm of each term's energy, [heads of the group, tiles, rows, blocks]."""
    n, s, dtype = layer.key.shape[0], layer.scale, layer.key.dtype
    blocks = -(-n // BLOCK)
    keys = torch.nn.functional.pad(layer.key[:, head].float(), (0, 0, 0, blocks * BLOCK - n)).view(
        blocks, BLOCK, -1
    )
    there = torch.arange(blocks * BLOCK).view(blocks, BLOCK) < n
    if v.exact:
        for key in range(BLOCK):
            yield (s * rows @ keys[:, key].T).masked_fill(~there[:, key], float("-inf"))
        return
    if v.clusters:
        means, counts, variance = centroids(keys, there, v.clusters)
        wide = 0.5 * s * s * rows**2 @ variance.T
        for c in range(v.clusters):
            yield s * rows @ means[:, c].to(dtype).float().T + wide + counts[:, c].log()
        return
    weight = there[..., None].float()
    away = (keys - ((keys * weight).sum(1) / weight.sum(1).clamp(min=1))[:, None]) * weight
    far = distances(layer, head, away, keys, v.metric).masked_fill(~there, -1)
    order = torch.sort(far, dim=-1, descending=True, stable=True).indices[:, : v.outliers]
    rest = there.scatter(1, order, False)
    weight, count = rest[..., None].float(), rest.sum(1)
    mean = (keys * weight).sum(1) / count.clamp(min=1)[:, None]
    left = (keys - mean[:, None]) * weight
    variance = left.square().sum(1) / count.clamp(min=1)[:, None]
    z = s * rows @ mean.to(dtype).float().T + count.log()
    if v.directions:
        _, size, axes = torch.linalg.svd(left, full_matrices=False)
        for i in range(v.directions):
            axis = axes[:, i] * (size[:, i] / count.clamp(min=1).sqrt())[:, None]
            z = z + 0.5 * s * s * (rows @ axis.T) ** 2
            variance = (variance - axis**2).clamp(min=0)
    yield z + (0.5 * s * s * rows**2 @ variance.to(dtype).float().T if v.variance else 0.0)
    for i in range(v.outliers):
        key = keys[torch.arange(blocks), order[:, i]]
        yield (s * rows @ key.T).masked_fill(~there[torch.arange(blocks), order[:, i]], float("-inf"))


def energies(layer: Layer, v: Variant) -> torch.Tensor:
    """Tile energies, [heads, tiles, blocks]."""
    if v.metric == "oracle":
        return layer.mass
    rows, last = pooled(layer, v.pool)
    group, blocks = layer.query.shape[1] // layer.key.shape[1], -(-layer.key.shape[0] // BLOCK)
    begin = torch.arange(blocks) * BLOCK
    sees = last[..., None] >= begin + (0 if v.diagonal else BLOCK - 1)
    part = ((last[..., None] + 1 - begin).clamp(1, BLOCK) / BLOCK).log() if v.diagonal else 0.0
    result = []
    for head in range(layer.key.shape[1]):
        total: torch.Tensor | None = None
        for z in terms(layer, head, rows[head * group : (head + 1) * group], v):
            total = z if total is None else torch.logaddexp(total, z)
        assert total is not None
        log = (total + part).masked_fill(~sees, float("-inf"))
        if v.normalise:
            log = log - v.normalise * torch.logsumexp(log, -1, keepdim=True).nan_to_num(neginf=0.0)
        most = log.amax((-1, -2), keepdim=True).nan_to_num(neginf=0.0)
        result.append((log - most).exp().sum(2))
    return torch.cat(result)


def worth(energy: torch.Tensor, v: Variant) -> torch.Tensor:
    """What a rule's threshold is put on: a block is kept if this is large enough."""
    if v.rule == "alpha":
        return energy / energy.amax(-1, keepdim=True).clamp(min=1e-30)
    share = energy / energy.sum(-1, keepdim=True).clamp(min=1e-30)
    if v.rule == "share":
        return share
    ordered, order = torch.sort(share, dim=-1, descending=True, stable=True)
    rest = (1 - (ordered.cumsum(-1) - ordered)).clamp(min=0)
    value = rest + 1e-9 * ordered if v.rule == "mass" else ordered * rest**v.power
    return torch.zeros_like(share).scatter(-1, order, value)


def masks(found: list[torch.Tensor], density: float) -> list[torch.Tensor]:
    """The blocks of highest worth, as many over all layers as the density says; sink 1 and window 2 first."""
    blocks = found[0].shape[-1]
    tile, block = torch.arange(blocks)[:, None], torch.arange(blocks)[None, :]
    visible = block <= tile
    forced = visible & ((block < 1) | (block >= tile - 1))
    every = torch.stack(found).masked_fill(forced, TOP).masked_fill(~visible, -TOP)
    wanted = round(density * int(visible.sum()) * every.shape[0] * every.shape[1])
    least = every.flatten().topk(wanted).values[-1]
    return [one >= least for one in every]


def main() -> None:
    """All variants over one text's dumps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dumps", type=Path)
    parser.add_argument("--text", default="long")
    parser.add_argument("--density", type=float, default=0.15)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    captured = texts.load(arguments.dumps)[arguments.text]
    layers = [Layer.of(number, one) for number, one in captured.items()]
    rows = []
    for v in VARIANTS:
        energy = [energies(layer, v) for layer in layers]
        sums = Sums()
        for layer, keep in zip(layers, masks([worth(e, v) for e in energy], arguments.density), strict=True):
            n = layer.query.shape[0]
            sums.add(layer, BlockMask.from_dense(keep, q_len=n, k_len=n))
        figures = sums.figures()
        rows.append(
            {
                "units": v.units if v.metric != "oracle" else None,
                **asdict(v),
                **figures,
                "text": arguments.text,
                "density": arguments.density,
            }
        )
        print(f"{v.group:14} {v.name:52} {rows[-1]['units'] or '-':>5} {figures}", flush=True)
    tokens = layers[0].query.shape[0]
    results = {
        "schema": "flashprefill-prototypes/1",
        **machine.describe(),
        "command": shlex.join(["python", "bench/lab/sketch_prototypes.py", *sys.argv[1:]]),
        "tokens": {arguments.text: tokens},
    }
    results |= {"layers": list(captured), "rows": rows}
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
