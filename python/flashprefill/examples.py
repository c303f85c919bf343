"""Made-up inputs with something in them to find.

Independent random numbers give every block of keys the same score, and a policy then keeps all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

import numpy as np

from .errors import refuse, refuse_type, shown
from .policies.checks import MAX_TOKENS, check_integer

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

__all__ = ["example_inputs"]

_TOPICS, _STRETCH = 16, 256  # topics, and tokens until the next one


@overload
def example_inputs(
    tokens: int,
    heads: int = ...,
    kv_heads: int = ...,
    head_dim: int = ...,
    *,
    batch: int | None = ...,
    seed: int = ...,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]]: ...


@overload
def example_inputs(
    tokens: int,
    heads: int = ...,
    kv_heads: int = ...,
    head_dim: int = ...,
    *,
    batch: int | None = ...,
    seed: int = ...,
    dtype: torch.dtype,
    device: str | torch.device = ...,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...


def example_inputs(
    tokens: int,
    heads: int = 8,
    kv_heads: int = 2,
    head_dim: int = 64,
    *,
    batch: int | None = None,
    seed: int = 0,
    dtype: Any = None,
    device: Any = "cpu",
) -> Any:
    """Return queries, keys and values with structure: like a text, they stay with a topic for a while.

    Every 256 tokens the topic changes, and queries ask for keys of their own topic. So the blocks of that
    topic matter, and most others do not. There is something to leave out from some 2,000 tokens on; below,
    the blocks that every policy keeps (the beginning, the neighbourhood, the prompt's end) are nearly all.

    Args:
        tokens: length of the prompt.
        heads: query heads.
        kv_heads: KV heads, which divide the query heads.
        head_dim: numbers per head and token.
        batch: prompts; None gives 3 axes instead of 4.
        seed: other numbers for other seeds.
        dtype: a torch dtype, for torch tensors; None gives NumPy arrays of float32.
        device: where torch tensors are.

    Returns:
        q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim]; with ``batch`` one axis more in
        front.
    """
    tokens = check_integer("tokens", tokens, 1, MAX_TOKENS)
    heads, kv_heads = check_integer("heads", heads, 1, 4096), check_integer("kv_heads", kv_heads, 1, 4096)
    head_dim = check_integer("head_dim", head_dim, 1, 512)
    if heads % kv_heads:
        refuse("heads", heads, f"a multiple of kv_heads ({kv_heads})")
    if batch is not None:
        one_each = [
            example_inputs(tokens, heads, kv_heads, head_dim, seed=seed + number)
            for number in range(check_integer("batch", batch, 1, 4096))
        ]
        made = tuple(np.stack(parts) for parts in zip(*one_each, strict=True))
    else:
        draw = np.random.default_rng(seed)
        topic = draw.integers(_TOPICS, size=-(-tokens // _STRETCH)).repeat(_STRETCH)[:tokens]
        meaning = 1.5 * draw.standard_normal((_TOPICS, head_dim), dtype=np.float32)[topic][:, None]
        made = tuple(
            draw.standard_normal((tokens, count, head_dim), dtype=np.float32) + about
            for count, about in ((heads, meaning), (kv_heads, meaning), (kv_heads, np.float32(0)))
        )
    if dtype is None:
        return made
    import torch

    if not isinstance(dtype, torch.dtype):
        refuse_type("dtype", shown(dtype), "a torch dtype, or None for NumPy arrays")
    return tuple(torch.from_numpy(part).to(device, dtype) for part in made)
