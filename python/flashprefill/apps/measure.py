"""One forward pass over a prompt, taken apart: seconds to the first token, and what of them attention took.

Dense attention and ours are timed by the same hook, put around whatever attention function the model's
configuration names; selection's share is what the library itself measured. The last hidden states are
caught on the way, so that the logits of many positions can be compared afterwards without their cost being
part of the time to first token.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from .. import collect_stats


@dataclass
class Pass:
    """What one forward pass over a prompt took, and what it left behind."""

    ttft: float
    attention: float
    select: float
    logits: torch.Tensor  # of the last position
    hidden: torch.Tensor  # last hidden states of the last positions
    stats: Any  # flashprefill's own statistics of the pass
    cache: Any


class Captured(NamedTuple):
    """What one layer's attention was called with: [tokens, heads, head_dim] each, and the scale."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float


@dataclass
class Clock:
    """Seconds inside the attention function, and what the layers that were asked for were called with."""

    seconds: float = 0.0
    capture: frozenset[int] = frozenset()
    captured: dict[int, Captured] = field(default_factory=dict)

    def wrap(self, attention: Callable[..., Any]) -> Callable[..., Any]:
        """The same attention function, timed."""

        def timed(
            module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kw: Any
        ) -> Any:
            layer = getattr(module, "layer_idx", None)
            if layer in self.capture:
                scale = kw.get("scaling") or query.shape[-1] ** -0.5
                q, k, v = (x[0].transpose(0, 1).clone() for x in (query, key, value))
                self.captured[layer] = Captured(q, k, v, scale)
            start = time.perf_counter()
            result = attention(module, query, key, value, *args, **kw)
            self.seconds += time.perf_counter() - start
            return result

        return timed


@contextmanager
def attention_clock(model: Any, capture: frozenset[int] = frozenset()) -> Iterator[Clock]:
    """Time the model's attention function inside the block."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    functions: Any = ALL_ATTENTION_FUNCTIONS
    name = model.config._attn_implementation
    clock = Clock(capture=capture)
    functions[name] = clock.wrap(functions[name])
    try:
        yield clock
    finally:
        del functions[name]


def cache_keyword(model: Any) -> str:
    """What this version of Transformers calls a model's cache, as an argument and in its outputs."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def run(
    model: Any, ids: torch.Tensor, keep: int, capture: frozenset[int] = frozenset()
) -> tuple[Pass, Clock]:
    """Read a prompt and pick the first token; keep the hidden states of the last `keep` positions."""
    hidden: list[torch.Tensor] = []

    def catch(_module: Any, _args: Any, output: Any) -> None:
        hidden.append(output[0][0, -keep:].clone())

    hook = model.base_model.register_forward_hook(catch)
    try:
        with torch.inference_mode(), attention_clock(model, capture) as clock, collect_stats(model) as stats:
            start = time.perf_counter()
            output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
            output.logits[0, -1].argmax().item()
            ttft = time.perf_counter() - start
    finally:
        hook.remove()
    logits, cache = output.logits[0, -1], output[cache_keyword(model)]
    return Pass(ttft, clock.seconds, stats.select_seconds, logits, hidden[0], stats, cache), clock


def continue_greedily(model: Any, result: Pass, tokens: int) -> tuple[list[int], float]:
    """The most likely continuation, token by token from the prompt's cache, which is used up by it.

    Returns the tokens and the probability of the least sure of them: where dense attention is as good as
    guessing, what another method writes says little about the method.
    """
    end = model.generation_config.eos_token_id
    ends = set(end) if isinstance(end, (list, tuple)) else {end}

    def pick(logits: torch.Tensor) -> tuple[int, float]:
        probability, token = torch.softmax(logits.float(), dim=-1).max(dim=-1)
        return int(token), float(probability)

    token, least = pick(result.logits)
    written = [token]
    cache = {cache_keyword(model): result.cache}
    with torch.inference_mode():
        while len(written) < tokens and token not in ends:
            step = torch.tensor([[token]])
            output = model(input_ids=step, use_cache=True, logits_to_keep=1, **cache)
            token, probability = pick(output.logits[0, -1])
            written.append(token)
            least = min(least, probability)
    result.cache = None
    return written, least


def log_probabilities(model: Any, result: Pass) -> torch.Tensor | None:
    """Log-probabilities at the kept positions, fp32; None if more than the output layer makes the logits."""
    with torch.inference_mode():
        logits = model.get_output_embeddings()(result.hidden)
        if not torch.allclose(logits[-1].float(), result.logits.float(), rtol=2e-2, atol=2e-2):
            return None
        return torch.log_softmax(logits.float(), dim=-1)


def agreement(reference: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """Return (mean KL divergence from `reference` in nats, share of positions with the same top token)."""
    kl = (reference.exp() * (reference - other)).sum(dim=-1).clamp(min=0).mean().item()
    same = (reference.argmax(dim=-1) == other.argmax(dim=-1)).float().mean().item()
    return kl, same
