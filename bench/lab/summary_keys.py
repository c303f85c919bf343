"""How much of the mean correction's gain summary keys keep, on Q, K and V of real layers.

    flashprefill lab --text long --dump out/qkv
    python bench/lab/summary_keys.py out/qkv --text long --out bench/results/lab-summary-keys.json

The exact correction (FlashPrefill V2) gives every block that a tile leaves out a key of its own, its mean. A
summary has one key for up to 64 of them, weighed by the tile's mean query. `kept` is the part of the exact
form's gain in output error that is left of it. The variants: other numbers of blocks per key; weights that no
query enters (plain means); and one plain mean for each 4 neighbouring blocks that are all left out, single
ones counting by themselves, which no tile's queries enter either.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import flashprefill as fp
from flashprefill.apps import machine
from flashprefill.apps.lab import texts
from flashprefill.apps.lab.figures import Layer, by_tile, tile_norms

BLOCK = 128
FORCED = {"sink_blocks": 1, "window_blocks": 2, "dense_tail_blocks": 0}
POLICIES = {
    "FlashPrefill": [fp.FlashPrefill(alpha=a, query_pool=16, **FORCED) for a in (0.7, 0.45, 0.25, 0.12)],
    "FlashPrefill, shared": [
        fp.FlashPrefill(alpha=a, query_pool=16, share_heads=True, **FORCED) for a in (0.7, 0.45, 0.25, 0.12)
    ],
    "Sketch": [fp.Sketch(mass=m, **FORCED) for m in (0.75, 0.82, 0.88, 0.93)],
}


@dataclass(frozen=True)
class Variant:
    """What stands for the blocks that are left out."""

    name: str
    blocks: int = 64  # per key
    weighed: bool = True  # by the tile's mean query; else every block alike
    by_head: bool = True  # a mean query for each head of a shared tile; else one of all its rows
    neighbours: bool = False  # only blocks that are all left out go together


VARIANTS = (
    Variant("summary, 64 blocks"),
    Variant("summary, 64 blocks, one query for all heads", by_head=False),
    Variant("summary, 32 blocks", blocks=32),
    Variant("summary, 16 blocks", blocks=16),
    Variant("summary, 8 blocks", blocks=8),
    Variant("plain means of 64 blocks", weighed=False),
    Variant("plain means of 4 neighbours", blocks=4, weighed=False, neighbours=True),
)


def means(rows: torch.Tensor) -> torch.Tensor:
    """Rounded means of each block, fp32 [heads, blocks, dim]; rows: [tokens, heads, dim]."""
    n = rows.shape[0]
    padded = torch.nn.functional.pad(rows.float(), (0, 0, 0, 0, 0, -n % BLOCK))
    count = (n - torch.arange(0, n, BLOCK)).clamp(max=BLOCK)
    sums = padded.view(-1, BLOCK, *rows.shape[1:]).sum(1) / count[:, None, None]
    return sums.to(rows.dtype).float().transpose(0, 1)


def summaries(
    keys: torch.Tensor,
    values: torch.Tensor,
    left: torch.Tensor,
    query: torch.Tensor,
    scale: float,
    v: Variant,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys, biases and values of a head's tiles: [tiles, columns, dim], but for biases [tiles, columns].

    keys, values: means [blocks, dim]; left: [tiles, blocks]; query: the tiles' mean rows.
    """
    tiles, blocks = left.shape
    wide = -(-blocks // v.blocks) * v.blocks
    pad = torch.nn.functional.pad
    shape = (tiles, wide // v.blocks, v.blocks)
    there = pad(left, (0, wide - blocks)).view(shape)
    k, val = (pad(x, (0, 0, 0, wide - blocks)).view(*shape[1:], -1) for x in (keys, values))
    energy = torch.einsum("td,gbd->tgb", query, k) * scale if v.weighed else torch.zeros(shape)
    if v.neighbours:
        whole = there.all(-1, keepdim=True)
        together = torch.zeros_like(energy).masked_fill(~whole.expand(shape), float("-inf"))
        grouped = columns(together, k, val, torch.zeros_like(query), scale)
        alone = summaries(keys, values, pad((there & ~whole).flatten(1), (0, 0))[:, :blocks], query, scale,
                          Variant("", blocks=1, weighed=False))  # fmt: skip
        return tuple(torch.cat(pair, 1) for pair in zip(grouped, alone, strict=True))
    return columns(
        energy.masked_fill(~there, float("-inf")), k, val, query if v.weighed else 0 * query, scale
    )


def columns(
    energy: torch.Tensor, k: torch.Tensor, val: torch.Tensor, query: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One key per group from the energies [tiles, groups, blocks]."""
    most = torch.logsumexp(energy, -1, keepdim=True)
    share = (energy - most).exp().nan_to_num(nan=0.0)
    key = torch.einsum("tgb,gbd->tgd", share, k)
    bias = most[..., 0] + torch.tensor(float(BLOCK)).log() - scale * torch.einsum("td,tgd->tg", query, key)
    return key, bias, torch.einsum("tgb,gbd->tgd", share, val)


def corrected(
    layer: Layer, mask: fp.BlockMask, out: torch.Tensor, lse: torch.Tensor, v: Variant
) -> torch.Tensor:
    """What attention over the kept blocks becomes with a variant's keys beside them."""
    n, heads, _ = layer.query.shape
    group = heads // layer.key.shape[1]
    keep = torch.as_tensor(mask.dense())
    tokens = mask.tile_tokens
    tiles = -(-n // tokens)
    begin = torch.arange(tiles) * tokens
    full = begin // BLOCK
    left = ~keep & (torch.arange(keep.shape[-1]) < full[:, None])
    key_means, value_means = means(layer.key), means(layer.value)
    result = torch.empty_like(out)
    for head in range(heads):
        mask_head = head // group if mask.share_heads else head
        of_tile = (
            slice(mask_head * group, (mask_head + 1) * group) if mask.share_heads else slice(head, head + 1)
        )
        rows = layer.query[:, of_tile if not v.by_head else slice(head, head + 1)].float().mean(1)
        padded = torch.nn.functional.pad(rows, (0, 0, 0, tiles * tokens - n)).view(tiles, tokens, -1)
        query = padded.sum(1) / (n - begin).clamp(max=tokens)[:, None]
        kv = head // group
        key, bias, value = summaries(key_means[kv], value_means[kv], left[mask_head], query, layer.scale, v)
        q = torch.nn.functional.pad(layer.query[:, head].float(), (0, 0, 0, tiles * tokens - n))
        z = layer.scale * q.view(tiles, tokens, -1) @ key.transpose(1, 2) + bias[:, None]
        z = z.flatten(0, 1)[:n]
        total = torch.logaddexp(lse[head], torch.logsumexp(z, -1))
        weight = torch.nn.functional.pad((z - total[:, None]).exp(), (0, 0, 0, tiles * tokens - n))
        added = (weight.view(tiles, tokens, -1) @ value).flatten(0, 1)[:n]
        result[:, head] = out[:, head].float() * (lse[head] - total).exp()[:, None] + added
    return result


def measure(layers: list[Layer], policy: fp.Policy) -> dict[str, float]:
    """Density, recall and the mean error of tiles by variant."""
    errors: dict[str, list[torch.Tensor]] = {}
    densities, recalls = [], []
    for layer in layers:
        mask, _ = layer.select(policy)
        densities.append(mask.density)
        count = by_tile(torch.ones(layer.query.shape[0], 1))

        def add(name: str, out: torch.Tensor, layer: Layer = layer) -> None:
            error = tile_norms(out.float() - layer.out.float()) / layer.norm
            errors.setdefault(name, []).append(error.flatten().nan_to_num())

        mask.mean_correction = False
        out, lse = layer.attend(mask)
        recalls.append((by_tile((lse - layer.lse).T.clamp(max=0).exp()) / count).flatten())
        add("none", out)
        for v in VARIANTS:
            if v.by_head or mask.share_heads:
                add(v.name, corrected(layer, mask, out, lse, v))
        mask.mean_correction = True
        add("exact", layer.attend(mask)[0])
    figures = {name: float(torch.cat(parts).mean()) for name, parts in errors.items()}
    gain = figures["none"] - figures["exact"]
    kept = {name: round((figures["none"] - error) / gain, 4) for name, error in figures.items()}
    return {
        "density": round(sum(densities) / len(densities), 4),
        "recall": round(float(torch.cat(recalls).mean()), 4),
        "error": {name: round(error, 5) for name, error in figures.items()},
        "kept": {name: part for name, part in kept.items() if name not in ("none", "exact")},
    }


def main() -> None:
    """All policies and densities over one text's dumps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dumps", type=Path)
    parser.add_argument("--text", action="append", help="which texts of the folder; all by default")
    parser.add_argument("--every", type=int, default=1, help="of a policy's values take each N-th one only")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    for text, captured in texts.load(arguments.dumps).items():
        if arguments.text and text not in arguments.text:
            continue
        layers = [Layer.of(number, one) for number, one in captured.items()]
        shape: dict[str, Any] = {
            "text": text,
            "tokens": layers[0].query.shape[0],
            "head_dim": layers[0].query.shape[2],
        }
        shape["layers"] = list(captured)
        for label, policies in POLICIES.items():
            for policy in policies[:: arguments.every]:
                rows.append({**shape, "label": label, "policy": policy.text, **measure(layers, policy)})
                print(json.dumps(rows[-1]), flush=True)
    results = {
        "schema": "flashprefill-summary-keys/1",
        **machine.describe(),
        "command": shlex.join(["python", "bench/lab/summary_keys.py", *sys.argv[1:]]),
        "rows": rows,
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
