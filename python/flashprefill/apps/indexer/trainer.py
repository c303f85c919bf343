"""The learner: for every layer and KV head a perceptron with one hidden layer, all trained at once.

    Z = SiLU([k | v] W_U + b_U),   logits Z w_v and Z w_s, a softmax of each over the tokens

against the true masses by the Kullback-Leibler divergence. Layers share nothing but the optimiser. On a GPU,
where one layer's step is too little work to be worth its launches, as many layers as there is memory for are
one product; elsewhere only one layer's activations exist at a time. Inputs are brought to mean 0 and
deviation 1, as measured on the first sequence, and the weights that are saved have that folded in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from ...policies.indexer import LayerWeights
from ..device import Device
from .harvest import Harvest, LayerData

PARTS = ("up", "bias", "vertical", "slash")
KINDS = ("forward", "reverse")  # KL(true || predicted), KL(predicted || true)
GPU_SHARE = 0.2  # of a GPU's free memory, for the activations of the layers of one product
COPIES = 6  # of the hidden units' activations, fp32, while gradients are made


def divergence(truth: torch.Tensor, logits: torch.Tensor, kind: str = "forward") -> torch.Tensor:
    """KL over the last axis, in nats, one per row."""
    predicted = torch.log_softmax(logits, dim=-1)
    log_truth = truth.clamp(min=1e-12).log()
    if kind == "reverse":
        return (predicted.exp() * (predicted - log_truth)).sum(dim=-1)
    return (truth * (log_truth - predicted)).sum(dim=-1)


class Trainer:
    """All layers, their optimiser and its schedule: warm-up, then a cosine down to nothing.

    Parameters are those of the normalised space, [layers * kv_heads, ...], layers in their order.
    """

    def __init__(self, first: Harvest, hidden: int, rate: float, steps: int, seed: int, device: Any) -> None:
        self.layers = list(first)
        self.kv_heads, _, size = next(iter(first.values())).inputs.shape
        inputs = torch.cat([data.inputs.float() for data in first.values()])
        self.mean = inputs.mean(dim=1, keepdim=True).to(device)  # [heads of all layers, 1, inputs]
        self.deviation = inputs.std(dim=1, keepdim=True).clamp(min=1e-6).to(device)
        ups = []
        for number in self.layers:
            draw = torch.Generator().manual_seed(seed * 100003 + number)
            ups.append(torch.randn(self.kv_heads, hidden, size, generator=draw) / math.sqrt(size))
        zeros = torch.zeros(len(self.layers) * self.kv_heads, hidden)
        parts = {"up": torch.cat(ups), "bias": zeros, "vertical": zeros.clone(), "slash": zeros.clone()}
        self.parts = {name: part.to(device).requires_grad_() for name, part in parts.items()}
        self.rate, self.steps, self.warm_up = rate, steps, max(1, min(500, steps // 16))
        self.optimizer = torch.optim.AdamW(list(self.parts.values()), lr=rate, weight_decay=0.01)
        self.step_number = 0
        where = Device(self.mean.device.type)
        self.room = GPU_SHARE * where.free_bytes() if where.cuda else 0.0  # elsewhere layers come one by one

    def _rate_now(self) -> float:
        step = self.step_number + 1
        if step <= self.warm_up:
            return self.rate * step / self.warm_up
        share = (step - self.warm_up) / max(1, self.steps - self.warm_up)
        return self.rate * (1 + math.cos(math.pi * min(1.0, share))) / 2

    def logits(self, inputs: torch.Tensor, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """(verticals, slashes), [layers * kv_heads, tokens] each, of layers one after the other.

        Args:
            inputs: [layers * kv_heads, tokens, 2 head_dim].
            first: the first of these layers, by its place among the trainer's.
        """
        here = slice(first * self.kv_heads, first * self.kv_heads + len(inputs))
        x = (inputs.float() - self.mean[here]) / self.deviation[here]
        z = torch.baddbmm(self.parts["bias"][here, None], x, self.parts["up"][here].transpose(1, 2))
        z = torch.nn.functional.silu(z)
        both = z @ torch.stack([self.parts["vertical"][here], self.parts["slash"][here]], dim=2)
        return both[..., 0], both[..., 1]

    def _at_once(self, tokens: int) -> int:
        """Layers of one product."""
        each = COPIES * 4 * self.kv_heads * self.parts["up"].shape[1] * tokens
        return max(1, int(self.room // each))

    def _divergences(self, harvest: Harvest, kind: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(verticals, slashes) of some layers after others, one divergence per layer and KV head."""
        step = self._at_once(next(iter(harvest.values())).inputs.shape[1])
        for first in range(0, len(self.layers), step):
            some = [harvest[number].to(self.mean.device) for number in self.layers[first : first + step]]
            whole = LayerData(*(torch.cat(x) for x in zip(*map(LayerData.tensors, some), strict=True)))
            vertical, slash = self.logits(whole.inputs, first)
            yield divergence(whole.by_key, vertical, kind), divergence(whole.by_distance, slash, kind)

    def step(self, harvest: Harvest, kind: str = "forward") -> float:
        """One step on one sequence; returns the mean loss of a layer, in nats."""
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate_now()
        total = torch.zeros((), device=self.mean.device)
        for vertical, slash in self._divergences(harvest, kind):
            loss = (vertical.sum() + slash.sum()) / self.kv_heads
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step_number += 1
        return float(total) / len(self.layers)

    @torch.no_grad()
    def evaluate(self, harvest: Harvest) -> tuple[float, float]:
        """Mean divergences (verticals, slashes) of a sequence over layers and KV heads, in nats."""
        found = list(self._divergences(harvest, "forward"))
        vertical, slash = (torch.cat(x).mean() for x in zip(*found, strict=True))
        return float(vertical), float(slash)

    @torch.no_grad()
    def weights(self) -> dict[int, LayerWeights]:
        """The weights by layer, for inputs as they are."""
        up = self.parts["up"] / self.deviation
        bias = self.parts["bias"] - (up @ self.mean.transpose(1, 2))[..., 0]
        arrays = [x.detach().cpu().numpy() for x in (up, bias, self.parts["vertical"], self.parts["slash"])]
        count = self.kv_heads
        return {
            number: LayerWeights(*(np.ascontiguousarray(x[i * count : (i + 1) * count]) for x in arrays))
            for i, number in enumerate(self.layers)
        }

    def state(self) -> dict[str, Any]:
        """All that `resume` needs."""
        return {
            "layers": self.layers,
            "mean": self.mean,
            "deviation": self.deviation,
            "parts": {name: part.detach() for name, part in self.parts.items()},
            "optimizer": self.optimizer.state_dict(),
            "step": self.step_number,
        }

    @torch.no_grad()
    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of a trainer of the same shape."""
        self.mean, self.deviation = (state[k].to(self.mean.device) for k in ("mean", "deviation"))
        for name, part in self.parts.items():
            part.copy_(state["parts"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step_number = int(state["step"])
