"""`flashprefill try`: do the policies find what dense attention finds?

One pass of each method over each prompt, then the answer, token by token from the cache. Prompts are the
demo's: real text with a sentence hidden in it. A prompt longer than the model was trained for is read with
the rotary base scaled by a power of two; finding needles is what suffers from that first, dense or not.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..guard import Guard
from ..policies import Dense, FlashPrefill, Policy, Sketch
from . import checks, device, factors, machine, models, prompt, table
from .errors import UsageError
from .spec import parse_policy

SCHEMA = "flashprefill-try/1"
LEAST_TOKENS, MOST_TOKENS = 256, 1 << 20
CONTINUATION = 24  # tokens of the answer
DENSE = "dense attention"
SHORT = (
    "at so short a prompt the blocks that are always kept (the beginning, the neighbourhood, the last tiles) "
    "and those that pass the threshold are all there are; what is gained is our kernel's, and longer prompts "
    "leave more out"
)


@dataclass
class Options:
    """The command line's options."""

    model: Path | None = None
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    prompt: Path | None = None
    policies: Sequence[str] = ()
    tokens: Sequence[int] = (4096, 8000)
    depths: Sequence[float] = (0.1, 0.5, 0.9)
    guard: str = "observe"
    out: Path | None = None


def stretch_for(tokens: int, context: int | None) -> float:
    """The power of two that the rotary base is scaled by, 1 within the model's own context."""
    if context is None or tokens <= context:
        return 1.0
    return float(2 ** math.ceil(math.log2(tokens / context)))


def check(options: Options) -> None:
    """Refuse what argparse cannot know."""
    for tokens in options.tokens:
        if not LEAST_TOKENS <= tokens <= MOST_TOKENS:
            raise UsageError(f"--tokens {tokens}: must be from {LEAST_TOKENS} to {MOST_TOKENS}")
    for depth in options.depths:
        if not 0.0 <= depth <= 1.0:
            raise UsageError(f"--depth {depth:g}: must be from 0 (the beginning) to 1 (the end)")
    if options.threads is not None and options.threads < 1:
        raise UsageError(f"--threads {options.threads}: must be at least 1")
    checks.can_write(options.out)
    checks.guard(options.guard)
    checks.need("try", "torch", "transformers", *checks.modules_of(options.model))
    checks.can_run(options.model, options.device, options.dtype, options.prompt)


def contenders(texts: Sequence[str]) -> list[tuple[str, Policy | None]]:
    """Return PyTorch's dense attention, ours, then the policies of the command line."""
    policies = [parse_policy(text) for text in texts] or [FlashPrefill(), Sketch()]
    policies = [policy for policy in policies if not (isinstance(policy, Dense) and policy.exact)]
    return [(DENSE, None), (factors.OURS, Dense()), *((policy.text, policy) for policy in policies)]


def answer(
    loaded: models.Loaded, policy: Policy | None, text: prompt.Prompt, guard: Guard | None = None
) -> dict[str, Any]:
    """One method reads one prompt and answers."""
    from .. import patch_model, unpatch_model
    from . import measure

    if policy is not None:
        patch_model(loaded.model, policy, guard=None if isinstance(policy, Dense) else guard)
    try:
        result, clock = measure.run(loaded, text.ids, 1)
        # A layer that ran dense keeps everything.
        kept = np.ones(1) if policy is None else np.nan_to_num(result.stats.density, nan=1.0)
        written, least = measure.continue_greedily(loaded.model, result, CONTINUATION)
    finally:
        if policy is not None:
            unpatch_model(loaded.model)
    words = loaded.tokenizer.decode(written, skip_special_tokens=True).strip()
    found = result.stats.guard
    return {
        "ttft_seconds": round(result.ttft, 5),
        "attention_seconds": round(clock.seconds, 5),
        "density": round(float(kept.mean()), 4),
        "fallbacks": {} if policy is None else dict(result.stats.fallbacks),
        "guard": None if found is None else {"words": str(found), **found.figures()},
        "found": text.found_in(words),
        "least_sure_token": round(least, 3),  # its probability: how much of a guess the answer is
        "answer": words,
    }


def verdict(cases: Sequence[dict[str, Any]]) -> tuple[bool, str]:
    """Return whether every policy found what dense attention found, and a sentence that says so."""
    base = [(case["tokens"], case["depth"]) for case in cases if case["method"] == DENSE and case["found"]]
    total = sum(case["method"] == DENSE for case in cases)
    dense = (DENSE, factors.OURS)
    others = [
        case for case in cases if case["method"] not in dense and (case["tokens"], case["depth"]) in base
    ]
    missed = [case for case in others if not case["found"]]
    words = f"dense attention finds {len(base)} of {total} needles"
    if not base:
        return True, f"{words}: nothing to hold the policies against"
    if not missed:
        return True, f"{words}, and every policy finds those too"
    places = (f"{c['method']} at {c['tokens']} tokens, depth {c['depth']:g}" for c in missed)
    return False, f"{words}; missed: {'; '.join(places)}"


def notes(cases: Sequence[dict[str, Any]]) -> list[str]:
    """What the times and densities do not say by themselves.

    For each length the fastest policy's speed-up as a product; and why a policy kept everything.
    """
    said = []
    for tokens in dict.fromkeys(case["tokens"] for case in cases):
        here = [case for case in cases if case["tokens"] == tokens]
        seconds = {
            name: statistics.median(case["attention_seconds"] for case in here if case["method"] == name)
            for name in dict.fromkeys(case["method"] for case in here)
        }
        sparse = [name for name in seconds if name not in (DENSE, factors.OURS)]
        if sparse:
            best = min(sparse, key=lambda name: seconds[name])
            split = factors.product(seconds[DENSE] / seconds[best], seconds[DENSE] / seconds[factors.OURS])
            said.append(f"{tokens} tokens: attention {split}, with {best}")
        for name in sparse:
            read = [case for case in here if case["method"] == name and case.get("guard")]
            said += [f"{tokens} tokens, depth {c['depth']:g}, {name}: {c['guard']['words']}" for c in read]
        whole = [n for n in sparse if all(c["density"] == 1.0 for c in here if c["method"] == n)]
        if whole:
            said.append(f"{tokens} tokens, density 1.000 with {' and '.join(whole)}: {SHORT}")
    return said


TIMES = ("first\ntoken, s", "attention,\ns")
HEADER = ("", "tokens", "depth", *TIMES, "density", "recall", "found", "least\nsure", "answer")


def row_of(case: dict[str, Any]) -> list[str]:
    """A line of the table."""
    words = " ".join(case["answer"].split())
    return [
        case["method"],
        str(case["tokens"]),
        f"{case['depth']:g}",
        table.seconds(case["ttft_seconds"]),
        table.seconds(case["attention_seconds"]),
        f"{case['density']:.3f}",
        "-" if case.get("guard") is None else f"{case['guard']['recall']:.3f}",
        "yes" if case["found"] else "no",
        f"{case['least_sure_token']:.2f}",
        words if len(words) <= 48 else words[:45] + "...",
    ]


def run(options: Options) -> dict[str, Any]:
    """All prompts through all methods; `passed` says whether the policies found what dense found."""
    check(options)
    methods = contenders(options.policies)
    import torch

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    where = device.resolve(options.device, options.dtype)
    guard = checks.guard(options.guard)
    cases: list[dict[str, Any]] = []
    busy = machine.busy()
    print("loading the model ...", file=sys.stderr, flush=True)
    loaded = models.load(options.model, options.dtype, where)
    context = loaded.context
    for tokens in sorted(options.tokens):
        factor = stretch_for(tokens, context)
        loaded = models.stretched(loaded, factor)
        for depth in options.depths:
            text = prompt.build(loaded.tokenizer, tokens, depth, options.prompt)
            for label, policy in methods:
                print(f"{len(text.ids)} tokens, depth {depth:g}: {label}", file=sys.stderr, flush=True)
                case = {"method": label, "tokens": len(text.ids), "depth": depth, "rotary_scale": factor}
                cases.append({**case, **answer(loaded, policy, text, guard)})
    passed, words = verdict(cases)
    results = {
        "schema": SCHEMA,
        **machine.describe(where.facts()),
        "model": {"name": loaded.name, "dtype": loaded.dtype, "context": context},
        "settings": {"threads": torch.get_num_threads(), "busy": busy, "expected": prompt.ANSWER},
        "cases": cases,
        "notes": notes(cases),
        "verdict": words,
        "passed": passed,
    }
    print(f"{loaded.name}, {loaded.dtype}, {where.describe(torch.get_num_threads())}\n")
    print(table.render(HEADER, [row_of(case) for case in cases]))
    for note in (*results["notes"], words):
        print(f"\n{note}", flush=True)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results
