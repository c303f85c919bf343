"""Hugging Face Transformers: models that call their attention through AttentionInterface prefill sparsely.

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="flashprefill")
    fp.patch_model(model, fp.FlashPrefill(alpha=0.12))       # or: a model that is loaded, and a policy
    with fp.collect_stats(model) as stats:
        model.generate(**inputs)
    print(stats)

One file for each question: masks.py says which rows see which keys, attention.py which calls are sparse and
how, fallback.py what the model's own dense attention is, patch.py which layer has which policy, register.py
how Transformers finds us, stats.py what came of it. Importing this package imports torch and Transformers.
"""

from __future__ import annotations

# First: when this is loaded the import hook registers us, which imports the files below in its own order.
try:
    import torch  # noqa: F401
    import transformers.modeling_utils  # noqa: F401
except ModuleNotFoundError as error:
    _missing = (error.name or "").partition(".")[0]
    if _missing not in ("torch", "transformers"):
        raise
    raise ModuleNotFoundError(
        f"flashprefill's Transformers integration needs {_missing}, which is not installed: "
        "pip install torch 'transformers>=5' accelerate",
        name=_missing,
    ) from None

from .fallback import FlashPrefillWarning
from .patch import patch_model, unpatch_model
from .register import register_transformers
from .stats import Call, ModelStats, collect_stats

__all__ = [
    "Call",
    "FlashPrefillWarning",
    "ModelStats",
    "collect_stats",
    "patch_model",
    "register_transformers",
    "unpatch_model",
]
