"""What a forward shows: each layer's true masses by tile and block, and what the policy would keep of them.

The forward runs with a policy in place, so that a layer's queries and keys are those of a model whose earlier
layers are sparse already. Overlaps that are profiled under dense attention say little about long chains of
layers that borrow: that is what HyLRA's reviewers found wanting.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ... import collect_stats, patch_model, select, unpatch_model
from ...errors import UnsupportedError
from ...policies import Policy, Reuse, ReusePlan
from ...policies.reuse import Borrowed
from .. import models
from ..errors import UsageError
from ..heads import attention_mass

PRICE = 0.5  # recall that a unit of density is worth: what a policy's own curve gains around density 0.2


@dataclass
class Profile:
    """All layers of one forward; a head is one of the mask's."""

    mass: dict[int, torch.Tensor] = field(default_factory=dict)  # fp32 [heads, tiles * blocks], sums to 1
    kept: dict[int, torch.Tensor] = field(default_factory=dict)  # the same shape, 0 or 1
    density: dict[int, torch.Tensor] = field(default_factory=dict)  # [heads]
    select_seconds: float = 0.0

    def add(
        self, layer: int, policy: Policy, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> None:
        """Look at one layer's call; q, k, v: [tokens, heads, head_dim]."""
        mask = select(q, k, policy, v=v if policy.reads_values else None, softmax_scale=scale)
        if mask.key_lists is not None or mask.vertical_slash is not None:
            raise UsageError(f"--policy {policy.text}: plans are made for policies of whole blocks")
        kept, size, tokens = mask.dense(), mask.block_size, q.shape[0]
        group = q.shape[1] // k.shape[1]
        mass = torch.stack(
            [
                attention_mass(q[:, h], k[:, h // group], scale, mask.tile_tokens, size)
                for h in range(q.shape[1])
            ]
        )
        rows = torch.full((mass.shape[1],), float(mask.tile_tokens))
        rows[-1] = tokens - mask.tile_tokens * (mass.shape[1] - 1)
        mass = mass * (rows / tokens)[None, :, None].to(mass.device)
        if mask.share_heads:
            mass = mass.view(-1, group, *mass.shape[1:]).mean(dim=1)
        self.mass[layer] = mass.flatten(1).cpu()
        self.kept[layer] = kept.flatten(1).float().cpu()
        self.density[layer] = torch.as_tensor(mask.stats.density, dtype=torch.float32).reshape(-1).cpu()

    def recall(self, source: int, layer: int) -> torch.Tensor:
        """What a layer's heads keep of their mass under those of another's mask: [heads, source's heads]."""
        return self.mass[layer] @ self.kept[source].T

    def worth(self, source: int, layer: int) -> torch.Tensor:
        """The recall less the price of the density, [heads, source's heads]."""
        return self.recall(source, layer) - PRICE * self.density[source][None, :]

    def used(self, plan: ReusePlan | None, layer: int) -> tuple[float, float]:
        """Mean recall and density of a layer under the mask that a plan gives it; None: its own."""
        own = None if plan is None else plan.layers[layer]
        source = layer if own is None else own.source
        heads = torch.arange(len(self.mass[layer]))
        taken = heads if own is None or own.heads is None else torch.tensor(own.heads)
        recall = self.recall(source, layer)[heads, taken]
        return float(recall.mean()), float(self.density[source][taken].mean())

    def means(self, plan: ReusePlan | None) -> tuple[float, float]:
        """Mean recall and density of all layers."""
        each = [self.used(plan, layer) for layer in self.mass]
        return sum(r for r, _ in each) / len(each), sum(d for _, d in each) / len(each)


@contextmanager
def _watching(model: Any, policy: Policy, profile: Profile) -> Iterator[None]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    functions: Any = ALL_ATTENTION_FUNCTIONS
    name = model.config._attn_implementation
    attention = functions[name]

    def watched(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        layer = int(module.layer_idx)
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        profile.add(layer, policy.at_layer(layer), q, k, v, scale)
        return attention(module, query, key, value, *args, **kwargs)

    functions[name] = watched
    try:
        yield
    finally:
        del functions[name]


def read(loaded: models.Loaded, ids: Sequence[int], inner: Policy, plan: ReusePlan | None = None) -> Profile:
    """The model reads ids with the inner policy, or with a plan; what its layers did."""
    profile, model = Profile(), loaded.model
    patch_model(model, inner if plan is None else Reuse(plan, inner))
    try:
        with torch.no_grad(), collect_stats(model) as stats, _watching(model, inner, profile):
            model(input_ids=torch.tensor([list(ids)], device=loaded.device.kind), logits_to_keep=1)
        profile.select_seconds = stats.select_seconds
    except UnsupportedError as error:
        raise UsageError(f"--policy {inner.text}: {error}") from None
    finally:
        unpatch_model(model)
    return profile


def mean_worth(profiles: Sequence[Profile], source: int, layer: int) -> torch.Tensor:
    """`Profile.worth` over texts."""
    return torch.stack([profile.worth(source, layer) for profile in profiles]).mean(dim=0)


def losses(profiles: Sequence[Profile]) -> tuple[torch.Tensor, dict[tuple[int, int], tuple[int, ...]]]:
    """What each layer loses under each earlier one's mask, [layers, layers], and the best map of heads."""
    layers = len(profiles[0].mass)
    loss = torch.full((layers, layers), float("inf"), dtype=torch.float64)
    heads: dict[tuple[int, int], tuple[int, ...]] = {}
    for layer in range(layers):
        own = mean_worth(profiles, layer, layer).diagonal()
        for source in range(layer):
            best = mean_worth(profiles, source, layer).max(dim=1)
            loss[source, layer] = float((own - best.values).mean())
            heads[source, layer] = tuple(best.indices.tolist())
    return loss, heads


def plan_of(
    found: Sequence[int | None], heads: dict[tuple[int, int], tuple[int, ...]], policy: str, model: str
) -> ReusePlan:
    """The plan of these sources."""
    layers = [
        None if source is None else Borrowed(source, heads[source, layer])
        for layer, source in enumerate(found)
    ]
    return ReusePlan(tuple(layers), policy, model)
