"""Synthetic queries, keys and values with structure for a policy to find.

Independent Gaussians would give every block the same score. Here keys drift slowly with the position (so
neighbours are alike), each stretch of the prompt has one of a few topics, and a query asks for its own
topic: so a head has blocks worth keeping and many that are not. Selection sees realistic densities; what a
kernel costs depends only on those.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from .errors import UsageError
from .lengths import length


@dataclass(frozen=True)
class Shape:
    """One problem: query and KV heads, head_dim, tokens."""

    q_heads: int
    kv_heads: int
    head_dim: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.q_heads}/{self.kv_heads}x{self.head_dim}x{self.tokens}"


def parse_shape(text: str) -> Shape:
    """Read 9/3x64x8192: query heads / KV heads x head_dim x tokens; a K at the end multiplies by 1024."""
    wrong = UsageError(f"--shape {text!r}: write QHEADS/KVHEADSxDIMxTOKENS, like 32/8x128x16K")
    try:
        heads, dim, tokens = text.lower().split("x")
        q_heads, _, kv_heads = heads.partition("/")
        shape = Shape(int(q_heads), int(kv_heads or q_heads), int(dim), length(tokens))
    except ValueError:
        raise wrong from None
    if min(shape.q_heads, shape.kv_heads, shape.head_dim, shape.tokens) < 1 or shape.q_heads % shape.kv_heads:
        raise UsageError(f"--shape {text!r}: all must be positive, and KV heads must divide query heads")
    return shape


def make(shape: Shape, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> tuple[Any, Any, Any]:
    """Q [tokens, q_heads, dim], k and v [tokens, kv_heads, dim]; each kind of device has its own numbers."""
    draw = torch.Generator(device).manual_seed(seed)
    n, d, topics, stretch = shape.tokens, shape.head_dim, 8, 512

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=draw, device=device)

    topic = torch.randint(topics, (-(-n // stretch),), generator=draw, device=device)
    topic = topic.repeat_interleave(stretch)[:n]
    centres = normal(topics, shape.kv_heads, d)[topic]
    drift = normal(-(-n // stretch), shape.kv_heads, d).repeat_interleave(stretch, 0)[:n]
    k = 0.8 * normal(n, shape.kv_heads, d) + centres + 0.5 * drift
    sharpness = math.sqrt(5.0) * torch.linspace(0.2, 1.0, shape.q_heads, device=device)[None, :, None]
    asked = (centres + 0.5 * drift).repeat_interleave(shape.q_heads // shape.kv_heads, 1)
    q = normal(n, shape.q_heads, d) + sharpness * asked
    v = normal(n, shape.kv_heads, d)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def random_mask(shape: Shape, density: float, block_size: int = 128, seed: int = 0) -> torch.Tensor:
    """Bools [q_heads, tiles, blocks] that keep this share of the causal blocks, the diagonal among them."""
    draw = torch.Generator().manual_seed(seed)
    tiles = -(-shape.tokens // block_size)
    causal = torch.ones(tiles, tiles, dtype=torch.bool).tril()
    wanted = max(tiles, round(density * int(causal.sum())))
    score = torch.rand(shape.q_heads, tiles, tiles, generator=draw).masked_fill(~causal, -1.0)
    score.diagonal(dim1=1, dim2=2).fill_(2.0)
    order = score.flatten(1).argsort(dim=1, descending=True)[:, :wanted]
    keep = torch.zeros(shape.q_heads, tiles * tiles, dtype=torch.bool).scatter_(1, order, True)
    return keep.view(shape.q_heads, tiles, tiles)
