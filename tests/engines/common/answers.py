"""Requests to an engine that is driven step by step, its answers, and how those of two engines are
compared."""

import math
import random
from dataclasses import dataclass, field

NEAR = 1e-3  # the stock engine's two best log-probabilities may be swapped if they are so close


@dataclass
class Request:
    ids: list
    new: int = 8
    at: int = 0  # the engine's step at which it comes
    abort_at: int = -1  # and the one at which its client leaves
    ends: bool = False  # at the model's own end of a text (SGLang)
    lora: object = None  # vLLM's LoRARequest


@dataclass
class Answer:
    tokens: list = field(default_factory=list)
    logprobs: list = field(default_factory=list)  # of each token: {token: log-probability} of the best five
    cached: int = 0
    finished: bool = False
    reason: object = None  # why it ended, as the engine says it


def delta(before, after):
    """What was counted between two snapshots."""
    change = {}
    for name, value in after.items():
        if isinstance(value, dict) and name != "guard":
            change[name] = {
                k: n - before[name].get(k, 0) for k, n in value.items() if n != before[name].get(k, 0)
            }
        elif name not in ("density", "guard"):
            change[name] = value - before[name]
    possible = change["causal_blocks"]
    change["density"] = change["kept_blocks"] / possible if possible else None
    return change


def distance(stock, ours, near=NEAR):
    """Largest difference of log-probabilities up to the first token that differs, and whether that one may.

    Returns (difference, tokens that agree). A token that differs where the stock engine was not in doubt
    makes the difference infinite. After it the two answer different questions.
    """
    worst, agreed = 0.0, 0
    for a, b, x, y in zip(stock.tokens, ours.tokens, stock.logprobs, ours.logprobs, strict=True):
        if a != b:
            best = sorted(x.values(), reverse=True)
            return (worst if best[0] - best[1] < near else math.inf), agreed
        worst = max([worst, *(abs(x[token] - y[token]) for token in x.keys() & y.keys())])
        agreed += 1
    return worst, agreed


def assert_same(stock, ours, limit, near=NEAR):
    for i, (a, b) in enumerate(zip(stock, ours, strict=True)):
        assert a.finished and b.finished
        worst, agreed = distance(a, b, near)
        best = [
            sorted(x[agreed].values())[:-3:-1] if agreed < len(x) else [] for x in (a.logprobs, b.logprobs)
        ]
        where = f"request {i}: {worst} after {agreed} tokens, {best}"
        assert worst < limit, f"{where}, {a.tokens} and {b.tokens}"


def tokens(count, seed):
    generator = random.Random(seed)
    return [generator.randrange(3, 500) for _ in range(count)]
