"""Errors of attention in 8 bits on a Hopper GPU, on Q, K and V of real layers, against float64.

    flashprefill lab --text gpl --text code --dump out/qkv
    python3 bench/cuda/eight_bit_real.py out/qkv

Heads below 128 dimensions are filled up with zeros, which change neither scores nor outputs: the kernel of
8-bit products is for wider heads, and SmolLM2 has 64. Of every dump and policy: the error over the norm of
the exact output under the same mask, of bf16 and of 8-bit products, of one row at worst, and both again with
keys and values stored in e4m3 (a scale per head), where the exact output is that of the stored values. Prints
a line for each and writes $OUT/eight_bit_real.json.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from operator_bench import write_results

import flashprefill as fp
from flashprefill.apps.lab import texts

E4M3 = torch.float8_e4m3fn
POLICIES = {
    "dense": fp.Dense(),
    "FlashPrefill": fp.FlashPrefill(alpha=0.25, query_pool=16),
    "FlashPrefill, means": fp.FlashPrefill(alpha=0.25, query_pool=16, mean_correction=True),
    "Sketch": fp.Sketch(),
}


def exact(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, keep: torch.Tensor, tile: int, block: int
) -> torch.Tensor:
    """Attention under a mask in float64; q [tokens, heads, dim], keep [mask heads, tiles, blocks]."""
    tokens, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    row = torch.arange(tokens, device=q.device)
    for head in range(heads):
        kv = head * k.shape[1] // heads
        own = keep[head * keep.shape[0] // heads]
        for begin in range(0, tokens, 2048):
            rows = row[begin : begin + 2048]
            seen = own[rows // tile].repeat_interleave(block, -1)[:, : k.shape[0]] & (row <= rows[:, None])
            scores = q[rows, head].double() @ k[:, kv].double().T * scale
            out[rows, head] = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v[:, kv].double()
    return out


def errors(out: torch.Tensor, want: torch.Tensor) -> tuple[float, float]:
    """Over the norm of the output, and of the worst row over its own norm."""
    apart, norm = (out.double() - want).norm(dim=-1), want.norm(dim=-1)
    return (apart.norm() / norm.norm()).item(), (apart / norm).max().item()


def stored(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor in e4m3 and its scale per head, [1, heads]."""
    scale = x.float().abs().amax((0, 2)) / 448
    return (x.float() / scale[:, None]).to(E4M3), scale[None]


def figures(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> list[dict]:
    """All policies on one layer."""
    dim = q.shape[-1]
    wide = [torch.nn.functional.pad(x, (0, 128 - dim)).contiguous() if dim < 128 else x for x in (q, k, v)]
    (k8, k_scale), (v8, v_scale) = stored(wide[1]), stored(wide[2])
    back = [(x8.float() * s[0, :, None])[..., :dim] for x8, s in ((k8, k_scale), (v8, v_scale))]
    rows = []
    for policy_name, policy in POLICIES.items():
        mask = fp.select(*wide[:2], policy, v=wide[2], softmax_scale=scale)
        mask.mean_correction = False
        keep = torch.as_tensor(mask.dense()).to(q.device)
        correct = getattr(policy, "mean_correction", False)
        row = {"layer": name, "policy": policy_name, "density": mask.density}
        want = exact(q, k, v, scale, keep, mask.tile_tokens, mask.block_size)
        if correct:  # what is added for blocks left out is bf16's: the difference is of the products
            mask.mean_correction = True
            want = fp.attend(*wide, mask, softmax_scale=scale)[..., :dim].double()
        for math in ("input", "8bit"):
            out = fp.attend(*wide, mask, softmax_scale=scale, math=math)[..., :dim]
            row[math], row[math + ", worst row"] = errors(out, want)
        if not correct:
            want = exact(q, back[0], back[1], scale, keep, mask.tile_tokens, mask.block_size)
            for math in ("input", "8bit"):
                out = fp.attend(
                    wide[0],
                    k8,
                    v8,
                    mask,
                    softmax_scale=scale,
                    math=math,
                    k_descale=k_scale,
                    v_descale=v_scale,
                )
                row["e4m3, " + math], _ = errors(out[..., :dim], want)
            rounded = [torch.nn.functional.pad(x.to(q.dtype), (0, 128 - dim)) for x in back]
            out = fp.attend(wide[0], *rounded, mask, softmax_scale=scale)[..., :dim]
            row["e4m3 made bf16 first"], _ = errors(out, want)
        rows.append(row)
        said = (f"{n} {x if isinstance(x, str) else format(x, '.4g')}" for n, x in row.items())
        print(", ".join(said), flush=True)
    return rows


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    rows = []
    for text, layers in texts.load(Path(sys.argv[1])).items():
        for layer, c in layers.items():
            q, k, v = (x.to("cuda", torch.bfloat16) for x in c[:3])
            rows += figures(f"{text}, layer {layer}, {q.shape[0]} tokens", q, k, v, c.scale)
    write_results(Path(os.environ.get("OUT", ".")) / "eight_bit_real.json", rows)


if __name__ == "__main__":
    main()
