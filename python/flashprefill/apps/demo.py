"""`flashprefill demo`: a real model reads a long prompt, with dense attention and with each policy.

The order of work keeps the comparison fair on a machine that is slow or shared: every method first reads a
short piece of the prompt (threads start, memory is mapped), then all of them take turns, so that a slow
minute hits them alike, and medians are compared. Only the first turn is also looked at: what the model
would say at the last positions, what was skipped, and the queries and keys that the pictures are drawn
from.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..guard import Guard
from ..policies import Dense, FlashPrefill, Gather, Sketch
from . import checks, device, factors, machine, models, prompt, report, table
from .errors import UsageError
from .method import Method
from .spec import parse_policy

TOKENS = 7600
LONG_TOKENS = 24000
QUICK_TOKENS = 1536
SCHEMA = "flashprefill-demo/1"
HOST_BOUND = 0.9  # share of the time to first token; above it the GPU waits for Python


@dataclass
class Options:
    """The command line's options."""

    model: Path | None = None
    prompt: Path | None = None
    policies: Sequence[str] = ()
    device: str = "auto"
    dtype: str = "auto"
    tokens: int | None = None
    depths: Sequence[float] = (0.5,)
    needle: bool = True
    long: bool = False
    quick: bool = False
    repeats: int | None = None
    threads: int | None = None
    positions: int = 512
    continuation: int = 24
    guard: str = "observe"
    out: Path = Path("out/demo")


def methods_for(texts: Sequence[str], cuda: bool = False) -> list[Method]:
    """Return PyTorch's dense attention, ours, and the policies of the command line or the main ones."""
    dense = [Method("Dense (PyTorch SDPA)", None), Method(factors.OURS, Dense())]
    if texts:
        policies = [
            policy for policy in map(parse_policy, texts) if not (isinstance(policy, Dense) and policy.exact)
        ]
        return dense + [Method(policy.text, policy) for policy in policies]
    return [
        *dense,
        Method("FlashPrefill, published", FlashPrefill(alpha=0.12)),
        Method(
            "FlashPrefill, shared + mean", FlashPrefill(alpha=0.12, share_heads=True, mean_correction=True)
        ),
        Method("FlashPrefill, pooled", FlashPrefill(alpha=0.12, query_pool=16)),
        Method("Sketch", Sketch()),
        *([] if cuda else [Method("Gather", Gather())]),  # most GPUs refuse it
    ]


class Runner:
    """Runs the methods over the prompts and keeps the figures."""

    def __init__(self, loaded: models.Loaded, methods: list[Method], options: Options, bar: Any) -> None:
        self.loaded, self.methods, self.options, self.bar = loaded, methods, options, bar
        self.guard = checks.guard(options.guard)
        layers = loaded.model.config.get_text_config().num_hidden_layers
        self.layers = layers
        self.capture = frozenset(int(layer) for layer in np.linspace(1, layers - 1, min(6, layers)).round())
        self.captured: dict[int, Any] = {}
        self.reference: Any = None

    def _with_policy(self, method: Method, work: Any, guard: Guard | None = None) -> Any:
        from .. import patch_model, unpatch_model

        if method.policy is None:
            return work()
        patch_model(self.loaded.model, method.policy, guard=guard)
        try:
            return work()
        finally:
            unpatch_model(self.loaded.model)

    def _step(self, what: str, method: Method) -> None:
        self.bar.set_description(f"{what}: {method.label}")

    def warm_up(self, ids: Sequence[int]) -> None:
        """A short piece of the prompt through every method."""
        from . import measure

        for method in self.methods:
            self._step("warming up", method)
            self._with_policy(method, lambda: measure.run(self.loaded, ids, 1))
            self.bar.update()

    def read(self, text: prompt.Prompt, repeats: int, measured: bool) -> None:
        """All methods read one prompt by turns; the last turn goes on to write the continuation."""
        for turn in range(repeats):
            # Observing is for the turn that is looked at; what changes masks is part of all turns.
            looked_at = measured and turn == 0
            guard = self.guard if looked_at or (self.guard and self.guard.mode != "observe") else None
            for method in self.methods:
                self._step(f"turn {turn + 1} of {repeats}" if measured else f"depth {text.depth:g}", method)
                work = lambda m=method, t=turn: self._pass(m, text, t, repeats, measured)  # noqa: E731
                self._with_policy(method, work, guard if method.selects else None)
                self.bar.update()

    def _pass(self, method: Method, text: prompt.Prompt, turn: int, repeats: int, measured: bool) -> None:
        from . import measure

        model, keep = self.loaded.model, min(self.options.positions, len(text.ids))
        first = measured and turn == 0
        capture = self.capture if first and method.policy is None else frozenset()
        result, clock = measure.run(self.loaded, text.ids, keep, capture)
        if first and method.policy is not None:
            # A layer that ran dense, because the model or the policy's table wants it so, keeps everything.
            method.density = np.nan_to_num(result.stats.density, nan=1.0)
            method.fallbacks = dict(result.stats.fallbacks)
            method.guard = result.stats.guard
        if measured:
            method.ttft.append(result.ttft)
            method.attention.append(clock.seconds)
            method.select.append(self._select_alone(method) if result.select is None else result.select)
            method.host_share += [] if result.host_share is None else [result.host_share]
        if first:
            self.captured = clock.captured or self.captured
            self._compare(method, measure.log_probabilities(model, result))
        if turn == repeats - 1:
            written, least = measure.continue_greedily(model, result, self.options.continuation)
            words = self.loaded.tokenizer.decode(written, skip_special_tokens=True)
            method.needles.append(
                {
                    "depth": text.depth,
                    "found": text.found_in(words),
                    "least_sure_token": round(least, 3),
                    "continuation": words.strip(),
                }
            )

    def _select_alone(self, method: Method) -> float:
        """Return the seconds of all layers' selections, from those of the captured layers."""
        from . import measure

        if method.policy is None or not self.captured:
            return 0.0
        some = measure.select_seconds(self.loaded.device, method.policy, self.captured)
        return float(some / len(self.captured) * self.layers)

    def _compare(self, method: Method, logs: Any) -> None:
        from . import measure

        if logs is None:
            return
        if method.policy is None:
            self.reference = logs
        if self.reference is not None:
            method.kl, method.top1 = measure.agreement(self.reference, logs)


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "all": list(values)}


def summarise(method: Method, dense: Method, ours: Method) -> dict[str, Any]:
    """One method's figures, as results.json holds them; `ours` is our dense kernel."""
    ttft, attention = statistics.median(method.ttft), statistics.median(method.attention)
    return {
        "label": method.label,
        "policy": None if method.policy is None else method.policy.text,
        "ttft_seconds": _spread(method.ttft),
        "attention_seconds": _spread(method.attention),
        "select_seconds": _spread(method.select),
        "host_share": statistics.median(method.host_share) if method.host_share else None,
        "ttft_speedup": statistics.median(dense.ttft) / ttft,
        "attention_speedup": statistics.median(dense.attention) / attention if attention else None,
        "ttft_speedup_over_our_dense": statistics.median(ours.ttft) / ttft,
        "attention_speedup_over_our_dense": statistics.median(ours.attention) / attention
        if attention
        else None,
        "density": 1.0 if method.density is None else float(np.mean(method.density)),
        "density_by_layer_and_head": None if method.density is None else np.round(method.density, 4).tolist(),
        "dense_layers": method.fallbacks,
        "guard": None if method.guard is None else {"words": str(method.guard), **method.guard.figures()},
        "kl_nats": method.kl,
        "top1_agreement": method.top1,
        "needles": method.needles,
    }


def needle_text(needles: Sequence[dict[str, Any]]) -> str:
    """yes, no, or how many of several."""
    known = [needle["found"] for needle in needles if needle["found"] is not None]
    if not known:
        return "-"
    if len(known) == 1:
        return "yes" if known[0] else "no"
    return f"{sum(known)} of {len(known)}"


HEADER = (
    "",
    "first\ntoken, s",
    "speed-\nup",
    "attention,\ns",
    "speed-\nup",
    "over our\ndense",
    "selection,\ns",
    "\ndensity",
    "KL,\nnats",
    "same\ntop-1",
    "needle\nfound",
)


def table_rows(runs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The table's cells."""

    def optional(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return [
        [
            run["label"],
            table.seconds(run["ttft_seconds"]["median"]),
            f"{run['ttft_speedup']:.2f}x",
            table.seconds(run["attention_seconds"]["median"]),
            optional(run["attention_speedup"], ".2f") + "x",
            optional(run["attention_speedup_over_our_dense"], ".2f") + "x",
            "-" if run["policy"] in factors.DENSE else table.seconds(run["select_seconds"]["median"]),
            f"{run['density']:.3f}",
            optional(run["kl_nats"], ".4f"),
            optional(run["top1_agreement"], ".1%"),
            needle_text(run["needles"]),
        ]
        for run in runs
    ]


def guards(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Return what the guard found, a line for each run that had one."""
    return [f"{run['label']}: {run['guard']['words']}" for run in runs if run["guard"]]


def pace(runs: Sequence[dict[str, Any]]) -> str | None:
    """Return a note if the GPU waits for Python: then times say little about attention."""
    waits = [run["label"] for run in runs if (run["host_share"] or 0.0) > HOST_BOUND]
    if not waits:
        return None
    return (
        f"the GPU waited for Python with {', '.join(waits)}: the model is too small or the prompt too short "
        "for these times to say much of a GPU; try --long, or a larger --model"
    )


def check(options: Options) -> None:
    """Refuse what argparse cannot know."""
    for name, value, low in (
        ("tokens", options.tokens, 16),
        ("repeats", options.repeats, 1),
        ("threads", options.threads, 1),
    ):
        if value is not None and value < low:
            raise UsageError(f"--{name} {value}: must be at least {low}")
    for depth in options.depths:
        if not 0.0 <= depth <= 1.0:
            raise UsageError(f"--depth {depth:g}: must be from 0 (the beginning) to 1 (the end)")
    checks.can_make(options.out)
    checks.guard(options.guard)
    needed = ("torch", "transformers", "matplotlib", "tqdm", *checks.modules_of(options.model))
    checks.need("the demo", *needed)
    checks.can_run(options.model, options.device, options.dtype, options.prompt)


def run(options: Options) -> dict[str, Any]:
    """The whole demo; returns what results.json holds."""
    check(options)
    import torch
    from tqdm import tqdm

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    where, stretch = (
        device.resolve(options.device, options.dtype),
        models.ROPE_STRETCH if options.long else 1.0,
    )
    methods = methods_for(options.policies, where.cuda)
    busy = machine.busy()
    if busy:
        print(f"note: {busy}", file=sys.stderr)
    print("loading the model ...", file=sys.stderr, flush=True)
    loaded = models.load(options.model, options.dtype, where, stretch)
    tokens = options.tokens or (QUICK_TOKENS if options.quick else LONG_TOKENS if options.long else TOKENS)
    repeats = options.repeats or (1 if options.long or options.quick else 3)
    depths = list(options.depths) if options.needle else [None]
    texts = [prompt.build(loaded.tokenizer, tokens, depth, options.prompt) for depth in depths]
    first = texts[0]
    print(
        f"{loaded.name}, {loaded.dtype}, {loaded.device.describe(torch.get_num_threads())}\n"
        f"prompt: {len(first.ids)} tokens of {first.source}",
        file=sys.stderr,
        flush=True,
    )
    passes = len(methods) * (1 + repeats + len(texts) - 1)
    with tqdm(
        total=passes,
        unit="pass",
        disable=None,  # where stderr is no terminal
        bar_format="{desc:<48} {bar:24} {n_fmt}/{total_fmt} [{elapsed}<{remaining}]",
    ) as bar:
        runner = Runner(loaded, methods, options, bar)
        runner.warm_up(first.ids[: max(64, min(1024, len(first.ids) // 2))])
        runner.read(first, repeats, measured=True)
        for text in texts[1:]:
            runner.read(text, 1, measured=False)
        bar.set_description("done")
    config = loaded.model.config.get_text_config()
    results: dict[str, Any] = {
        "schema": SCHEMA,
        **machine.describe(loaded.device.facts()),
        "model": {
            "name": loaded.name,
            "dtype": loaded.dtype,
            "layers": runner.layers,
            "q_heads": config.num_attention_heads,
            "kv_heads": getattr(config, "num_key_value_heads", config.num_attention_heads),
            "parameters": sum(p.numel() for p in loaded.model.parameters()),
        },
        "prompt": {
            "tokens": len(first.ids),
            "source": first.source,
            "depths": depths,
            "needle": first.needle,
            "question": first.question,
            "answer": first.answer,
        },
        "settings": {
            "threads": torch.get_num_threads(),
            "repeats": repeats,
            "compared_positions": min(options.positions, len(first.ids)),
            "continuation_tokens": options.continuation,
            "long": options.long,
            "busy": busy,
            "device": loaded.device.kind,
            "sdpa": loaded.sdpa_backend(len(first.ids)),
        },
        "runs": [summarise(method, *methods[:2]) for method in methods],
    }
    results["table"] = table.render(HEADER, table_rows(results["runs"]))
    results["headline"] = factors.headline(results["runs"])
    results["settings"]["pace"] = pace(results["runs"])
    print(results["table"], flush=True)
    for line in guards(results["runs"]):
        print(f"\n{line}" if line == guards(results["runs"])[0] else line, flush=True)
    if results["headline"]:
        print(f"\n{results['headline']}", flush=True)
    if results["settings"]["pace"]:
        print(f"\nnote: {results['settings']['pace']}", flush=True)
    print("drawing the pictures ...", file=sys.stderr, flush=True)
    from . import pictures

    options.out.mkdir(parents=True, exist_ok=True)
    drawn = pictures.draw(options.out, results, methods, runner.captured)
    results["heads"] = drawn.heads
    for run, method in zip(results["runs"], methods, strict=True):
        if method.policy is not None and method.selects:
            run["always_kept"] = pictures.always_kept(method.policy, runner.captured)
    results["files"] = ["results.json", "report.html", *drawn.files]
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (options.out / "report.html").write_text(report.page(results, options.out), encoding="utf-8")
    print(f"\n{options.out}/: {', '.join(results['files'])}", flush=True)
    return results
