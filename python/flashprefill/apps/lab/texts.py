"""The lab's inputs: real long texts, and the queries, keys and values that a model makes of them.

The texts are those of the study that `Sketch` came from: a licence, a program, and all licences one after
the other for the long one, where the rotary base is scaled so that the model still predicts; and two programs
one after the other, as long. The forward pass
runs our own kernel with every block kept, which is exact and several times faster than PyTorch's at 24K
tokens.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ... import Dense, patch_model, unpatch_model
from .. import dump, measure, models, prompt
from ..device import CPU, Device
from ..errors import UsageError

STUDY_LAYERS = (
    np.array([2, 7, 13, 19, 25, 29]) / 29
)  # as shares of the last layer's number: early, middle, late


@dataclass(frozen=True)
class Text:
    """A text to read: its name, its files, how many tokens of it, whether the rotary base is scaled."""

    name: str
    files: tuple[Path, ...]
    tokens: int
    long: bool = False


def known() -> dict[str, Text]:
    """The texts that `--text` names."""
    modules = [Path(sysconfig.get_paths()["stdlib"]) / name for name in ("argparse.py", "typing.py")]
    licences = tuple(prompt.LICENCES / name for name in prompt.LICENCE_NAMES)
    texts = (
        Text("gpl", licences[:1], 7600),
        Text("code", (modules[0],), 7600),
        Text("long", licences, 24355, long=True),
        Text("long-code", tuple(modules), 24355, long=True),
    )
    return {text.name: text for text in texts}


def chosen_layers(layers: int, wanted: Sequence[int]) -> list[int]:
    """The layers to look at: those that were asked for, or six from early to late."""
    for layer in wanted:
        if not 0 <= layer < layers:
            raise UsageError(f"--layers {layer}: must be from 0 to {layers - 1}")
    spread = np.unique((STUDY_LAYERS * (layers - 1)).round().astype(int)).tolist()
    return sorted(set(wanted)) or [int(layer) for layer in spread]


def tokens_of(tokenizer: Any, text: Text) -> list[int]:
    """Return the token ids of a text, at most text.tokens. Several files are joined by an empty line."""
    contents = []
    for file in text.files:
        try:
            contents.append(file.read_text(encoding="utf-8", errors="ignore"))
        except OSError as error:
            reason = error.strerror or error
            raise UsageError(f"{file}: {reason}; give a text of your own with --prompt") from error
    whole = contents[0] if len(contents) == 1 else "\n\n".join(content.strip() for content in contents)
    ids: list[int] = tokenizer(whole, add_special_tokens=False)["input_ids"]
    return ids[: text.tokens]


def capture(loaded: models.Loaded, ids: Sequence[int], layers: Sequence[int]) -> dict[int, measure.Captured]:
    """Read the text; return what the attention of these layers was called with."""
    patch_model(loaded.model, Dense())
    try:
        _, clock = measure.run(loaded, ids, 1, frozenset(layers))
    finally:
        unpatch_model(loaded.model)
    return dict(sorted(clock.captured.items()))


def save(folder: Path, name: str, captured: dict[int, measure.Captured]) -> None:
    """Write one file per layer, which `flashprefill inspect` and `--from` read."""
    folder.mkdir(parents=True, exist_ok=True)
    for layer, one in captured.items():
        content = {"q": one.query.cpu(), "k": one.key.cpu(), "v": one.value.cpu()}
        content["scale"] = torch.tensor(one.scale)
        torch.save(content, folder / f"{name}-layer{layer}.pt")


DUMPED = ("q", "k", "v", "scale")


def _tensor(value: Any) -> torch.Tensor:
    """Return what a dump has under a name as a tensor: an empty one if it is no array of numbers."""
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return torch.empty(0)


def load(folder: Path, device: Device = CPU, dtype: str = "auto") -> dict[str, dict[int, measure.Captured]]:
    """All dumps of a folder, NAME-layerN.pt (or .npz, .safetensors), by text and layer.

    They keep their own dtype if dtype is "auto". A GPU takes 16 bits only, and rounds wider ones.
    """
    texts: dict[str, dict[int, measure.Captured]] = {}
    for file in sorted(path for path in folder.glob("*-layer*") if path.suffix in dump.SUFFIXES):
        name, _, layer = file.stem.rpartition("-layer")
        if not layer.isdigit():
            raise UsageError(f"{file}: must be named like text-layer7{file.suffix}")
        content = {key: _tensor(value) for key, value in dump.load(file).items() if key in DUMPED}
        for key in ("q", "k", "v"):
            if key not in content or content[key].ndim != 3 or not content[key].is_floating_point():
                raise UsageError(f"{file}: must hold q, k and v, each [tokens, heads, head_dim] of floats")
        asked = (
            content["q"].dtype if dtype == "auto" else models.torch_dtype(models.resolve_dtype(dtype, device))
        )
        if device.cuda and asked == torch.float32:
            asked = torch.bfloat16
        q, k, v = (content[key].to(device.kind, asked) for key in "qkv")
        if q.shape[0] != k.shape[0] or k.shape != v.shape:
            raise UsageError(f"{file}: q, k and v must be of one prompt from its first token on")
        scale = content.get("scale", torch.tensor(max(q.shape[-1], 1) ** -0.5))
        if scale.numel() != 1 or scale.is_complex() or not scale > 0:
            raise UsageError(f"{file}: scale must be a number above 0")
        texts.setdefault(name, {})[int(layer)] = measure.Captured(q, k, v, float(scale))
    if not texts:
        raise UsageError(f"--from {folder}: holds no dumps named like text-layer7.pt")
    return {name: dict(sorted(layers.items())) for name, layers in texts.items()}
