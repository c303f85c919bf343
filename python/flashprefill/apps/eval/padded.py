"""Answers to prompts of several lengths as one batch: caches padded on the left, and attention for a step.

PyTorch's fast attention takes a mask or groups of heads, not both. So with a mask Transformers repeats keys
and values for each query head: for SmolLM2 three times the cache is written and read again at every step.
The heads of a group have the same keys, though, and as rows of one query they need no copies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

NAME = "fp_eval_step"  # Transformers takes names with "flash" in them for its own


class Rows:
    """The caches of a batch, one row each; made like the first one of them.

    Args:
        like: a cache of one prompt, which becomes the batch's.
        count: rows.
        tokens: what each row has room for.
    """

    def __init__(self, like: Any, count: int, tokens: int) -> None:
        self._like, self._tokens = like, tokens
        self._layers = [
            tuple(
                each.new_zeros(count, each.shape[1], tokens, each.shape[3])
                for each in (layer.keys, layer.values)
            )
            for layer in like.layers
        ]

    def put(self, row: int, cache: Any, tokens: int) -> None:
        """The first tokens of a cache become the end of a row."""
        for rows, layer in zip(self._layers, cache.layers, strict=True):
            for into, source in zip(rows, (layer.keys, layer.values), strict=True):
                into[row, :, self._tokens - tokens :] = source[0, :, :tokens]

    def cache(self) -> Any:
        """The batch's cache."""
        for rows, layer in zip(self._layers, self._like.layers, strict=True):
            layer.keys, layer.values = rows
        return self._like


def left(prompts: Sequence[torch.Tensor], longest: int, padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts [1, tokens] as a batch [prompts, longest] and its mask, 0 where there is padding."""
    batch = prompts[0].new_full((len(prompts), longest), padding)
    mask = torch.zeros_like(batch)
    for row, ids in enumerate(prompts):
        batch[row, longest - ids.shape[1] :] = ids[0]
        mask[row, longest - ids.shape[1] :] = 1
    return batch, mask


def step(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **more: Any
) -> tuple[torch.Tensor, None]:
    """Attention as Transformers calls it, for a single query per sequence; all else is its own."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    batch, heads, queries, dim = query.shape
    groups = key.shape[1]
    if queries != 1 or attention_mask is None:
        own: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
        result: tuple[torch.Tensor, None] = own(module, query, key, value, attention_mask, **more)
        return result
    rows = query.reshape(batch, groups, heads // groups, dim)
    mask = attention_mask[..., : key.shape[2]].expand(batch, 1, heads // groups, key.shape[2])
    out = torch.nn.functional.scaled_dot_product_attention(
        rows, key, value, attn_mask=mask, scale=more.get("scaling")
    )
    return out.reshape(batch, 1, heads, dim), None


@contextmanager
def attention(model: Any) -> Iterator[None]:
    """Inside the block a model that uses PyTorch's attention takes the step above."""
    if model.config._attn_implementation != "sdpa":
        yield
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, step)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")
