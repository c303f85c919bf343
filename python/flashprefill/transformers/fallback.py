"""Why calls are not sparse, and one warning per reason, which points at the line that called a library."""

from __future__ import annotations

import sys
import warnings
from typing import Any


class FlashPrefillWarning(UserWarning):
    """A model, or a part of it, runs dense; the message says why."""


# Nothing to wonder at: these are never warned about.
QUIET = {
    "decode": "one query row",
    "short": "too few rows or keys to leave any out",
    "policy": "the layer has no policy",
    "compiled mask": "padding is not read while torch.compile traces",
    "unpatched": "the model has a patched model's config, and is not patched",
}

# What the kernel does not do.
LOUD = {
    "softcap": "logit softcapping",
    "attention sinks": "learned attention sinks",
    "sliding window": "a sliding window",
    "dropout": "attention dropout while training",
    "gradients": "gradients are wanted; run the model under torch.no_grad() or torch.inference_mode()",
    "attention weights": "output_attentions asks for the weights",
    "position bias": "a position bias on the scores",
    "paged cache": "continuous batching on a device whose steps may be CUDA graphs",
    "packed sequences": "several sequences packed into one",
    "value head_dim": "head_dim of v differs from that of q and k",
    "layout": "shapes or dtypes that the kernel does not take",
    "device": "a device that is neither a CPU nor a CUDA device",
    "fake tensors": "tensors that are no plain ones, or a mode that watches every operator (FakeTensorMode, "
    "FlopCounterMode, make_fx, torch.func)",
    "tracing": "torch.jit.trace, ONNX export and torch.export with dynamic lengths record it, because it is "
    "right at other lengths too",
    "bidirectional": "attention that is not causal",
    "custom mask": "a mask that is not causal with padding at the ends",
    "backend": "no backend of this build runs on the model's device",
}

# Of these the message says what q, k and v were.
DETAILED = ("layout", "device", "value head_dim")

# What is no fallback, and yet to be known.
NOTES = {
    "sparse in grad mode": "runs sparse although grad mode is on, because nothing that it reads requires "
    "grad. Gradients of what comes later are then those of a sparse forward; call train() for a dense one, "
    "or run the model under torch.no_grad() if no gradient is wanted",
    "short mask": "got an attention_mask that is shorter than its cached and new tokens together; the last "
    "tokens count as padding. A mask must cover the cached tokens too",
    "nothing but padding": "got sequences of which all rows are padding; their results are zeros",
}

_warned: set[str] = set()
_LIBRARIES = {"flashprefill", "transformers", "transformers_modules", "torch", "accelerate", "peft"}
_LIBRARIES |= {"contextlib", "functools", "concurrent", "threading"}


def stack_level() -> int:
    """Return the level of the first line outside of libraries, for warnings.warn in the caller."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES:
        level, frame = level + 1, frame.f_back
    return level


def warn_once(reason: str, module: Any, detail: str = "") -> None:
    """Say once in a process why layers run dense; `detail` says more about this call."""
    if reason in LOUD and reason not in _warned:
        _warned.add(reason)
        more = f" ({detail})" if detail else ""
        warnings.warn(
            f"flashprefill: {type(module).__name__} runs the model's own dense attention, exact and as "
            f"slow as without flashprefill, because of this: {LOUD[reason]}{more}",
            FlashPrefillWarning,
            stacklevel=stack_level(),
        )


def note_once(what: str, who: str, detail: str = "") -> None:
    """Say once in a process what is likely a mistake."""
    if what not in _warned:
        _warned.add(what)
        more = f" ({detail})" if detail else ""
        message = f"flashprefill: {who} {NOTES[what]}{more}"
        warnings.warn(message, FlashPrefillWarning, stacklevel=stack_level())
