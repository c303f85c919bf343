"""The learner: for every layer and KV head a perceptron with one hidden layer, all trained at once.

    Z = SiLU([k | v] W_U + b_U),   logits Z w_v and Z w_s, a softmax of each over the tokens

against the true masses by the Kullback-Leibler divergence. Layers share nothing, so each is a step of its
own: only one layer's activations exist at a time. Inputs are brought to mean 0 and deviation 1, as measured
on the first sequence, and the weights that are saved have that folded in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ...policies.indexer import LayerWeights
from .harvest import Harvest, LayerData

PARTS = ("up", "bias", "vertical", "slash")
KINDS = ("forward", "reverse")  # KL(true || predicted), KL(predicted || true)


def divergence(truth: torch.Tensor, logits: torch.Tensor, kind: str = "forward") -> torch.Tensor:
    """KL over the last axis, in nats; the mean over the others."""
    predicted = torch.log_softmax(logits, dim=-1)
    log_truth = truth.clamp(min=1e-12).log()
    if kind == "reverse":
        return (predicted.exp() * (predicted - log_truth)).sum(dim=-1).mean()
    return (truth * (log_truth - predicted)).sum(dim=-1).mean()


class Head:
    """The indexers of one layer: parameters in the normalised space, [kv_heads, ...]."""

    def __init__(self, data: LayerData, hidden: int, seed: int, device: Any) -> None:
        inputs = data.inputs.float()
        kv_heads, _, size = inputs.shape
        draw = torch.Generator().manual_seed(seed)
        self.mean = inputs.mean(dim=1, keepdim=True).to(device)  # [kv_heads, 1, inputs]
        self.deviation = inputs.std(dim=1, keepdim=True).clamp(min=1e-6).to(device)
        up = torch.randn(kv_heads, hidden, size, generator=draw) / math.sqrt(size)
        zeros = torch.zeros(kv_heads, hidden)
        self.parts = {"up": up, "bias": zeros, "vertical": zeros.clone(), "slash": zeros.clone()}
        self.parts = {name: part.to(device).requires_grad_() for name, part in self.parts.items()}

    def logits(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(verticals, slashes), [kv_heads, tokens] each."""
        x = (inputs.float() - self.mean) / self.deviation
        z = torch.baddbmm(self.parts["bias"][:, None], x, self.parts["up"].transpose(1, 2))
        z = torch.nn.functional.silu(z)
        both = z @ torch.stack([self.parts["vertical"], self.parts["slash"]], dim=2)
        return both[..., 0], both[..., 1]

    def loss(self, data: LayerData, kind: str) -> torch.Tensor:
        """The two divergences, added."""
        vertical, slash = self.logits(data.inputs)
        return divergence(data.by_key, vertical, kind) + divergence(data.by_distance, slash, kind)

    def weights(self) -> LayerWeights:
        """The weights for inputs as they are."""
        with torch.no_grad():
            up = self.parts["up"] / self.deviation
            bias = self.parts["bias"] - (up @ self.mean.transpose(1, 2))[..., 0]
        arrays = [up, bias, self.parts["vertical"], self.parts["slash"]]
        return LayerWeights(*(np.ascontiguousarray(x.detach().cpu().numpy()) for x in arrays))


class Trainer:
    """All layers, their optimiser and its schedule: warm-up, then a cosine down to nothing."""

    def __init__(self, first: Harvest, hidden: int, rate: float, steps: int, seed: int, device: Any) -> None:
        self.heads = {n: Head(data, hidden, seed * 100003 + n, device) for n, data in first.items()}
        self.rate, self.steps, self.warm_up = rate, steps, max(1, min(500, steps // 16))
        parameters = [part for head in self.heads.values() for part in head.parts.values()]
        self.optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
        self.step_number = 0

    def _rate_now(self) -> float:
        step = self.step_number + 1
        if step <= self.warm_up:
            return self.rate * step / self.warm_up
        share = (step - self.warm_up) / max(1, self.steps - self.warm_up)
        return self.rate * (1 + math.cos(math.pi * min(1.0, share))) / 2

    def step(self, harvest: Harvest, kind: str = "forward") -> float:
        """One step on one sequence; returns the mean loss of a layer, in nats."""
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate_now()
        total = 0.0
        for number, head in self.heads.items():
            device = head.mean.device
            loss = head.loss(harvest[number].to(device), kind)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step_number += 1
        return total / len(self.heads)

    @torch.no_grad()
    def evaluate(self, harvest: Harvest) -> tuple[float, float]:
        """Mean divergences (verticals, slashes) of a sequence over layers and KV heads, in nats."""
        sums = [0.0, 0.0]
        for number, head in self.heads.items():
            data = harvest[number].to(head.mean.device)
            vertical, slash = head.logits(data.inputs)
            sums[0] += float(divergence(data.by_key, vertical))
            sums[1] += float(divergence(data.by_distance, slash))
        return sums[0] / len(self.heads), sums[1] / len(self.heads)

    def weights(self) -> dict[int, LayerWeights]:
        """The weights by layer."""
        return {number: head.weights() for number, head in self.heads.items()}

    def state(self) -> dict[str, Any]:
        """All that `resume` needs."""
        layers = {
            n: {
                "mean": h.mean,
                "deviation": h.deviation,
                "parts": {k: p.detach() for k, p in h.parts.items()},
            }
            for n, h in self.heads.items()
        }
        return {"layers": layers, "optimizer": self.optimizer.state_dict(), "step": self.step_number}

    @torch.no_grad()
    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of a trainer of the same shape."""
        for number, saved in state["layers"].items():
            head = self.heads[number]
            head.mean, head.deviation = (saved[k].to(head.mean.device) for k in ("mean", "deviation"))
            for name, part in head.parts.items():
                part.copy_(saved["parts"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step_number = int(state["step"])
