"""One forward pass over a prompt: seconds to the first token, and attention's part of them.

Dense attention and ours are timed by the same hook, put around whatever attention function the model's
configuration names; selection's share is what the library itself measured, on the CPU: on a GPU nothing
waits between the two, and a selection is timed alone (`select_seconds`). The last hidden states are
caught on the way, so that the logits of many positions can be compared afterwards without their cost being
part of the time to first token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .. import collect_stats, select
from ..policies import Policy
from .device import CPU, Device, Span

if TYPE_CHECKING:
    from .models import Loaded


@dataclass
class Pass:
    """The times and results of one forward pass over a prompt."""

    ttft: float
    attention: float
    select: float | None  # None where it can't be told from attention
    logits: torch.Tensor  # of the last position
    hidden: torch.Tensor  # last hidden states of the last positions
    stats: Any  # flashprefill's own statistics of the pass
    cache: Any
    host_share: float | None = None  # on a GPU: share of the time to first token until all work was launched


class Captured(NamedTuple):
    """The arguments of one layer's attention: [tokens, heads, head_dim] each, and the scale."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float


@dataclass
class Clock:
    """Time inside the attention function, and what the layers that were asked for were called with."""

    device: Device = CPU
    spans: list[Span] = field(default_factory=list)
    capture: frozenset[int] = frozenset()
    captured: dict[int, Captured] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Seconds inside the attention function, of all layers."""
        return sum(span.seconds for span in self.spans)

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
            with self.device.span() as span:
                result = attention(module, query, key, value, *args, **kw)
            self.spans.append(span)
            return result

        return timed


@contextmanager
def attention_clock(model: Any, device: Device, capture: frozenset[int] = frozenset()) -> Iterator[Clock]:
    """Time the model's attention function inside the block."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    functions: Any = ALL_ATTENTION_FUNCTIONS
    name = model.config._attn_implementation
    clock = Clock(device, capture=capture)
    functions[name] = clock.wrap(functions[name])
    try:
        yield clock
    finally:
        del functions[name]


def cache_keyword(model: Any) -> str:
    """What this version of Transformers calls a model's cache, as an argument and in its outputs."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def run(
    loaded: Loaded, ids: Sequence[int], keep: int, capture: frozenset[int] = frozenset()
) -> tuple[Pass, Clock]:
    """Read a prompt and pick the first token; keep the hidden states of the last `keep` positions.

    On a GPU the prompt is read twice, watched and then timed: to count what each layer kept takes the host
    as long as a small model's layer, and memory is asked for in the first of the two.
    """
    model, device = loaded.model, loaded.device
    prompt = torch.tensor([list(ids)], device=device.kind)
    hidden: list[torch.Tensor] = []

    def catch(_module: Any, _args: Any, output: Any) -> None:
        hidden.append(output[0][0, -keep:].clone())

    def read(layers: frozenset[int]) -> tuple[Any, Clock, float, float]:
        with torch.inference_mode(), attention_clock(model, device, layers) as clock:
            start = device.now()
            output = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
            asked = device.clock() - start
            output.logits[0, -1].argmax().item()
            return output, clock, device.now() - start, asked

    hook = model.base_model.register_forward_hook(catch)
    try:
        with collect_stats(model) as stats:
            output, clock, ttft, _ = read(capture)
    finally:
        hook.remove()
    selecting: float | None = stats.select_seconds
    host_share = None
    if device.cuda:
        _, timed, ttft, asked = read(frozenset())
        clock.spans, selecting, host_share = timed.spans, None, asked / ttft
    logits, cache = output.logits[0, -1], output[cache_keyword(model)]
    return Pass(ttft, clock.seconds, selecting, logits, hidden[0], stats, cache, host_share), clock


def select_seconds(device: Device, policy: Policy, layers: Mapping[int, Captured]) -> float:
    """Seconds of selections alone, over captured layers by number."""
    calls = []
    for number, one in layers.items():
        own = policy.at_layer(number)
        value = one.value if own.reads_values else None
        calls.append(partial(select, one.query, one.key, own, v=value, softmax_scale=one.scale))
    return sum(device.timed(call)[1] for call in calls)


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
            step = torch.tensor([[token]], device=result.logits.device)
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
