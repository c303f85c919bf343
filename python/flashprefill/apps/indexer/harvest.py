"""Sequences to learn from: a model reads a text, and of every layer keys, values and true masses remain.

Reading costs some ten times what a step of learning does, so the last few sequences stay in a pool and are
learnt from more than once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ... import Dense, patch_model, unpatch_model
from .. import models
from ..errors import UsageError
from .masses import far_masses, masses

TARGETS = {"far": far_masses, "published": masses}


@dataclass
class LayerData:
    """What one layer made of a sequence."""

    inputs: torch.Tensor  # [kv_heads, tokens, 2 head_dim]: keys after the rotation, then values
    by_key: torch.Tensor  # fp32 [kv_heads, tokens], the true masses
    by_distance: torch.Tensor

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Its three parts."""
        return self.inputs, self.by_key, self.by_distance

    def to(self, device: Any) -> LayerData:
        """The same elsewhere."""
        return LayerData(*(x.to(device) for x in self.tensors()))


Harvest = dict[int, LayerData]


@contextmanager
def _watching(
    model: Any, harvest: Harvest, layers: frozenset[int], dtype: torch.dtype, targets: str
) -> Iterator[None]:
    """Inside the block, every call of the model's attention leaves its masses in `harvest`."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    functions: Any = ALL_ATTENTION_FUNCTIONS
    name = model.config._attn_implementation
    attention = functions[name]

    def watched(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        layer = getattr(module, "layer_idx", None)
        if layer in layers:
            scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
            by_key, by_distance = TARGETS[targets](query[0].transpose(0, 1), key[0].transpose(0, 1), scale)
            inputs = torch.cat([key[0], value[0]], dim=-1).to(dtype)
            harvest[int(layer)] = LayerData(inputs, by_key, by_distance)
        return attention(module, query, key, value, *args, **kwargs)

    functions[name] = watched
    try:
        yield
    finally:
        del functions[name]


def read(
    loaded: models.Loaded,
    ids: Sequence[int],
    layers: Sequence[int],
    store: Any = None,
    targets: str = "far",
) -> Harvest:
    """The model reads ids from position 0 with dense attention; returns what its layers made of them.

    Args:
        loaded: the model.
        ids: the tokens.
        layers: the layers to watch.
        store: the device that keeps the result; the model's by default.
        targets: which truth, one of TARGETS.
    """
    harvest: Harvest = {}
    patch_model(loaded.model, Dense())
    try:
        with (
            torch.no_grad(),
            _watching(loaded.model, harvest, frozenset(layers), models.torch_dtype(loaded.dtype), targets),
        ):
            loaded.model(input_ids=torch.tensor([list(ids)], device=loaded.device.kind), logits_to_keep=1)
    finally:
        unpatch_model(loaded.model)
    missing = sorted(set(layers) - set(harvest))
    if missing:
        raise UsageError(f"layer {missing[0]} of this model has no attention that could be watched")
    return {number: data if store is None else data.to(store) for number, data in sorted(harvest.items())}
