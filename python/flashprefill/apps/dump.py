"""Reading a saved pair of queries and keys: a .npz, .safetensors or .pt with q and k."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import UsageError

SUFFIXES = (".npz", ".safetensors", ".pt", ".pth")


def load(path: Path) -> dict[str, Any]:
    """Return the file's arrays by name, unchecked."""
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file")
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path}: must end in {', '.join(SUFFIXES)}")
    try:
        if path.suffix == ".npz":
            import numpy as np

            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        import torch

        content = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise UsageError(f"{path}: reading it needs {error.name}: pip install {error.name}") from error
    except Exception as error:  # each format has its own errors for a damaged file
        reason = str(error).strip().splitlines()
        raise UsageError(
            f"{path}: cannot be read: {reason[0] if reason else type(error).__name__}"
        ) from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: must hold a dictionary with q and k, not a {type(content).__name__}")
    return content


def queries_and_keys(path: Path) -> tuple[Any, Any]:
    """Return q [tokens, heads, head_dim] and k [tokens, kv_heads, head_dim] of a dump."""
    content = load(path)
    pair = []
    for name in ("q", "k"):
        if name not in content:
            raise UsageError(
                f"{path}: holds no {name}; it has {', '.join(sorted(map(str, content))) or 'nothing'}"
            )
        array = content[name]
        shape = tuple(getattr(array, "shape", ()))
        if len(shape) == 4 and shape[0] == 1:
            array, shape = array[0], shape[1:]
        if len(shape) != 3:
            raise UsageError(
                f"{path}: {name} has the shape {list(shape)}; it must be [tokens, heads, head_dim]"
            )
        pair.append(array)
    return pair[0], pair[1]
