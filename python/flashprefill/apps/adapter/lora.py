"""A low-rank adapter of a model's attention (LoRA; Hu et al., arXiv 2106.09685) and its file.

Every projection of the attention, W [out, in], becomes W + scale B A with A [rank, in] and B [out, rank].
Only A and B are trained. The folder that is saved is one that PEFT reads: adapter_model.safetensors with
PEFT's names, and adapter_config.json. PEFT has no place for a rotary base, so the file's metadata has it:
`attach` puts both into a model, with A and B multiplied out, after which it is an ordinary model.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UsageError

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
METHOD, VERSION = "flashprefill-adapter", "1"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Reach:
    """How far positions go: the rotary base, and the tokens that it is for."""

    rope_theta: float
    context: int


class LoRALinear(nn.Module):
    """A frozen projection with its two small factors, in fp32."""

    def __init__(self, base: nn.Linear, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        drawn = torch.empty(rank, base.in_features).uniform_(generator=generator)
        bound = 1.0 / math.sqrt(base.in_features)  # as nn.Linear begins
        device = base.weight.device
        self.A = nn.Parameter(((2 * drawn - 1) * bound).to(device))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """W x + scale B A x, the factors in x's dtype."""
        low = nn.functional.linear(x, self.A.to(x.dtype))
        plain: torch.Tensor = self.base(x)
        return plain + nn.functional.linear(low, (self.B * self.scale).to(x.dtype))


def reach_of(config: Any) -> Reach:
    """What a model's configuration says."""
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict) or "rope_theta" not in rope or rope.get("rope_type") != "default":
        raise UsageError("this model has no single rotary base to scale: it cannot take an adapter")
    return Reach(float(rope["rope_theta"]), int(config.max_position_embeddings))


def set_reach(model: Any, reach: Reach) -> None:
    """Give a model another rotary base, in its configuration and in what it has computed from it."""
    for config in (model.config, model.config.get_text_config()):
        rope = {**config.rope_parameters, "rope_theta": reach.rope_theta}
        config.rope_parameters, config.max_position_embeddings = rope, reach.context
    config = model.config.get_text_config()
    found = 0
    for module in model.modules():
        if type(module).__name__.endswith("RotaryEmbedding"):
            fresh = type(module)(config=config).to(next(model.parameters()).device)
            module.__dict__.update(
                {k: v for k, v in fresh.__dict__.items() if k not in ("_buffers", "_modules", "_parameters")}
            )
            module._buffers.update(fresh._buffers)
            found += 1
    if not found:
        raise UsageError("this model's rotary embedding was not found: it cannot take an adapter")


def projections(model: Any, targets: tuple[str, ...] = TARGETS) -> dict[str, nn.Linear]:
    """The projections of the attention by name, in the model's order."""
    found = {
        name: module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in targets and isinstance(module, nn.Linear)
    }
    if not found:
        raise UsageError(f"this model has no linear layers named {', '.join(targets)}")
    return found


def add(model: Any, rank: int, alpha: float, seed: int) -> dict[str, LoRALinear]:
    """Freeze a model and put an adapter that changes nothing yet into its attention."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    added = {}
    for name, linear in projections(model).items():
        parent, _, leaf = name.rpartition(".")
        added[name] = LoRALinear(linear, rank, alpha / rank, generator)
        setattr(model.get_submodule(parent), leaf, added[name])
    return added


def save(folder: Path, added: dict[str, LoRALinear], alpha: float, reach: Reach, model: str) -> None:
    """Write the folder, factors in bf16."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, layer in added.items():
        for part, values in (("A", layer.A), ("B", layer.B)):
            tensors[f"{PREFIX}{name}.lora_{part}.weight"] = values.detach().to("cpu", torch.bfloat16)
    rank = next(iter(added.values())).A.shape[0]
    own = {"method": METHOD, "version": VERSION, "model": model, "alpha": f"{alpha:g}"}
    own |= {"rope_theta": f"{reach.rope_theta:g}", "context": str(reach.context)}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt", **own})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in added}),
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def load(path: Path) -> tuple[dict[str, torch.Tensor], Reach, float]:
    """Read a folder, or its file: the tensors by PEFT's names, the reach and alpha.

    Raises:
        UsageError: it is no such folder; one line says where it differs.
    """
    from safetensors import SafetensorError, safe_open

    path = path.expanduser()
    file = path / WEIGHTS if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"--adapter {path}: there is no {WEIGHTS}")
    try:
        with safe_open(file, "pt") as opened:
            notes = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UsageError(f"--adapter {path}: {error}") from error
    if (notes.get("method"), notes.get("version")) != (METHOD, VERSION):
        raise UsageError(f"--adapter {path}: is not one of `flashprefill train-adapter`")
    try:
        return tensors, Reach(float(notes["rope_theta"]), int(notes["context"])), float(notes["alpha"])
    except (KeyError, ValueError) as error:
        raise UsageError(f"--adapter {path}: damaged metadata, {error}") from error


@torch.no_grad()
def attach(model: Any, path: Path) -> None:
    """Multiply an adapter's factors out into a model's weights, and give it the adapter's reach.

    Raises:
        UsageError: the adapter is for a model of other shapes.
    """
    tensors, reach, alpha = load(path)
    reach_of(model.config)
    for name, linear in projections(model).items():
        a, b = (tensors.pop(f"{PREFIX}{name}.lora_{part}.weight", None) for part in "AB")
        if a is None or b is None:
            raise UsageError(f"--adapter {path}: it has nothing for this model's {name}")
        if a.shape[1] != linear.in_features or b.shape[0] != linear.out_features:
            raise UsageError(
                f"--adapter {path}: its {name} is {b.shape[0]} by {a.shape[1]}, "
                f"the model's {linear.out_features} by {linear.in_features}"
            )
        change = (alpha / a.shape[0]) * (b.float() @ a.float())
        weight = linear.weight
        weight.copy_((weight.float() + change.to(weight.device)).to(weight.dtype))
    if tensors:
        raise UsageError(f"--adapter {path}: this model has no {next(iter(tensors))[len(PREFIX) :]}")
    set_reach(model, reach)
