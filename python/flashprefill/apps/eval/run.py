"""The order of work: all prompts first, then each prompt through every method, then tables, pictures, files.

A few prompts are answered by all methods before the next ones come. So a run that is stopped has pairs to
compare, and a slow minute of a shared machine hits all methods alike. It also lets them share the longest
part of the work: each method reads each prompt by itself, and then all answers are written as one batch.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...policies import Dense, Policy
from ...policies.text import named
from .. import checks, device, machine, models, table
from ..errors import UsageError
from ..spec import parse_policy
from . import answers, figures, harness, ruler, suites, text
from .asker import Asker

SCHEMA = "flashprefill-eval/1"
LENGTHS = (4096, 8192)
PATTERNS = ("dense", "flashprefill", "sketch")
ANSWERS_TOGETHER = {"cuda": 40}  # answers that are written beside each other, of four prompts at least
LIST_PACKAGES = ("lm_eval", "datasets", "wonderwords")


@dataclass
class Options:
    """The command line's options."""

    suites: Sequence[str] = ("ruler",)
    model: Path | None = None
    adapter: Path | None = None
    patterns: Sequence[str] = ()
    policies: Sequence[str] = ()
    lengths: Sequence[int] = ()
    samples: int = ruler.SAMPLES
    seed: int = ruler.SEED
    text: Path | None = None
    data: Path | None = None
    last_token: str = "dense"
    max_tokens: int | None = None
    minutes: float | None = None
    chat: bool = False
    stretch: bool = False
    fresh: bool = False
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    out: Path = Path("out/eval")


def methods_of(options: Options) -> dict[str, Policy | None]:
    """Dense attention, which all are compared with, then the policies: by their text."""
    wanted = list(options.patterns or (() if options.policies else PATTERNS))
    if "all" in wanted:
        wanted = ["dense", *(name for name in named() if name != Dense.kind)]
    policies = [parse_policy(name) for name in [*wanted, *options.policies] if name != figures.DENSE]
    return {figures.DENSE: None, **{policy.text: policy for policy in policies}}


def refused(methods: dict[str, Policy | None], where: device.Device) -> dict[str, str]:
    """The policies that don't select on this device yet, with the reason; tried on a few tokens."""
    import torch

    from ... import select
    from ...errors import UnsupportedError

    dtype = torch.float32 if not where.cuda else torch.bfloat16
    draw = torch.Generator(where.kind).manual_seed(0)
    query, key = (
        torch.randn(256, heads, 64, generator=draw, device=where.kind, dtype=dtype) for heads in (2, 1)
    )
    reasons = {}
    for label, policy in methods.items():
        try:
            if policy is not None and not policy.reads_values:  # weights are for the model's own heads
                select(query, key, policy.at_layer(0))
        except UnsupportedError as error:
            reasons[label] = str(error)
    return reasons


def check(options: Options) -> tuple[list[str], dict[str, str]]:
    """Refuse what argparse cannot know; return the tasks, and those that are left out with the reason."""
    for name, value in (
        ("samples", options.samples),
        ("threads", options.threads),
        ("max-tokens", options.max_tokens),
    ):
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value}: must be at least 1")
    if options.minutes is not None and not options.minutes > 0:
        raise UsageError(f"--minutes {options.minutes:g}: must be above 0")
    checks.need(
        "eval",
        "torch",
        "transformers",
        "matplotlib",
        "tqdm",
        *harness.PACKAGES,
        *checks.modules_of(options.model),
    )
    tasks, left_out = suites.chosen(options.suites, options.data)
    for length in options.lengths:
        if length < ruler.LEAST_TOKENS:
            raise UsageError(f"--lengths {length}: must be at least {ruler.LEAST_TOKENS}")
    if options.text is not None:
        text.files_of(options.text)
    checks.can_make(options.out)
    checks.can_run(options.model, options.device, options.dtype)
    checks.adapter(options.adapter)
    return tasks, left_out


def lengths_for(task: str, options: Options, context: int | None) -> list[int]:
    """The lengths of a task: those that are asked for, or RULER's two as far as the model reads them."""
    asked = list(dict.fromkeys(options.lengths))
    if asked:
        too_long = [length for length in asked if context is not None and length > context]
        if too_long and not options.stretch:
            raise UsageError(
                f"--lengths {too_long[0]}: the model reads {context} tokens; --stretch scales its rotary base"
            )
        return asked
    if context is None:
        return list(LENGTHS)
    within = [length for length in LENGTHS if length <= context]
    return within if task in ruler.TASKS and within else [context]


def case_of(prompt: suites.Prompt) -> dict[str, Any]:
    """A prompt's entry in results.json, before anyone answers it."""
    expected = prompt.doc.get("outputs", prompt.doc.get("answer"))
    return {
        "task": prompt.task,
        "length": prompt.length,
        "index": prompt.index,
        "depth": None if prompt.depth is None else round(prompt.depth, 4),
        "prompt": prompt.hash[:16],
        "expected": expected,
        "answers": {},
    }


def add_answer(case: dict[str, Any], prompt: suites.Prompt, label: str, record: dict[str, Any]) -> None:
    """Score an answer and put it into the prompt's entry."""
    said = [answer if isinstance(answer, str) else tuple(answer) for answer in record["said"]]
    case["tokens"], case["cut"] = record["tokens"], record["cut"]
    case["answers"][label] = {
        "score": round(prompt.score(said), 6),
        "text": record["text"],
        "ttft_seconds": record["ttft_seconds"],
        "density": record["density"],
        "fallbacks": record["fallbacks"],
    }


def make_prompts(
    tasks: Sequence[str], options: Options, loaded: models.Loaded, chat: Any
) -> list[suites.Prompt]:
    """All prompts, a length after the other: a run that is stopped has the first ones whole."""
    from tqdm import tqdm

    name = str(models.resolve_path(options.model))
    source = suites.Source(loaded.tokenizer, name, options.samples, options.seed, options.text, options.data)
    plan = [(length, task) for task in tasks for length in lengths_for(task, options, loaded.context)]
    turn = {length: number for number, length in enumerate(options.lengths)}  # else the shortest first
    prompts: list[suites.Prompt] = []
    plan.sort(key=lambda one: turn.get(one[0], one[0]))
    with tqdm(plan, unit="task", desc="making prompts", disable=None) as bar:
        for length, task in bar:
            bar.set_description(f"making prompts: {task}, {length} tokens")
            prompts += suites.prompts_of(task, length, source, chat)
    return prompts


def grouped(prompts: Sequence[suites.Prompt], most: int) -> Iterator[list[suites.Prompt]]:
    """Neighbours of one task and length, at most so many."""
    for _, same in itertools.groupby(prompts, key=lambda prompt: (prompt.task, prompt.length)):
        left = list(same)
        for start in range(0, len(left), most):
            yield left[start : start + most]


def together(kind: str, methods: int) -> int:
    """How many prompts are answered beside each other: on a GPU as many as make a batch, elsewhere one."""
    return max(4, ANSWERS_TOGETHER[kind] // methods) if kind in ANSWERS_TOGETHER else 1


def answer_all(
    prompts: Sequence[suites.Prompt],
    methods: dict[str, Policy | None],
    asker: Asker,
    until: float = math.inf,
) -> list[dict[str, Any]]:
    """Every prompt through every method; no new ones after a time of time.monotonic()."""
    from tqdm import tqdm

    cases: list[dict[str, Any]] = []
    with tqdm(
        total=len(prompts) * len(methods),
        unit="answer",
        disable=None,
        bar_format="{desc:<48} {bar:24} {n_fmt}/{total_fmt} [{elapsed}<{remaining}]",
    ) as bar:
        for some in grouped(prompts, together(asker.loaded.device.kind, len(methods))):
            if time.monotonic() > until:
                print(f"note: the time is up after {len(cases)} prompts", file=sys.stderr)
                break
            here = {prompt.index: case_of(prompt) for prompt in some}
            bar.set_description(f"{some[0].task}, {some[0].length} tokens, prompt {some[0].index + 1}")
            for prompt, label, record in asker.ask(some, methods):
                add_answer(here[prompt.index], prompt, label, record)
                bar.update()
            for case in here.values():
                case["answers"] = {label: case["answers"][label] for label in methods}
                cases.append(case)
        bar.set_description("done")
    return cases


HEADER = (
    "",
    "score",
    "kept of\ndense",
    "worse",
    "better",
    "p",
    "same\nanswer",
    "density",
    "first\ntoken, s",
    "speed-\nup",
)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def cells_of(row: dict[str, Any]) -> list[str]:
    """A method's figures, as the tables show them."""
    dense = row["method"] == figures.DENSE
    return [
        _percent(row["score"]),
        "-" if dense else _percent(row["kept_of_dense"]),
        "-" if dense else str(row["worse"]),
        "-" if dense else str(row["better"]),
        "-" if dense else f"{row['mcnemar_p']:.2f}",
        "-" if dense else _percent(row["same_answer"]),
        "-" if row["density"] is None else f"{row['density']:.3f}",
        "-" if row["ttft_seconds"] is None else table.seconds(row["ttft_seconds"]),
        "-" if dense or row["ttft_speedup"] is None else f"{row['ttft_speedup']:.2f}x",
    ]


def render(results: dict[str, Any]) -> str:
    """The tables that are printed: a length each, all tasks together; then the tasks' scores."""
    rows, parts = results["rows"], []
    lengths = [length for length in results["settings"]["lengths"]]
    labels = list(results["methods"])
    for length in lengths:
        body = [[label, *cells_of(figures.one(rows, label, length, None))] for label in labels]
        prompts = figures.one(rows, figures.DENSE, length, None)["prompts"]
        parts.append(f"{length} tokens, {prompts} prompts\n" + table.render(HEADER, body))
        tasks = [
            row["task"]
            for row in rows
            if row["method"] == labels[0] and row["length"] == length and row["task"]
        ]
        scores = [
            [task, *(_percent(figures.one(rows, label, length, task)["score"]) for label in labels)]
            for task in tasks
        ]
        heads = [label.replace("(", "\n(") for label in labels]
        parts.append(f"scores at {length} tokens\n" + table.render(("", *heads), scores))
    return "\n\n".join(parts)


def verdict(results: dict[str, Any]) -> str:
    """One sentence per policy: how far from dense attention it is over everything."""
    said = []
    for label in results["methods"]:
        row = figures.one(results["rows"], label, None, None)
        if label == figures.DENSE or row["score"] is None:
            continue
        points = 100 * (row["score"] - row["dense_score"])
        said.append(
            f"{label}: {points:+.1f} points against dense attention's {100 * row['dense_score']:.1f}; of the "
            f"{row['dense_right']} prompts that dense attention answers fully it keeps "
            f"{_percent(row['kept_of_dense'])} %"
        )
    return "\n".join(said)


def run(options: Options) -> dict[str, Any]:
    """The whole evaluation; returns what results.json holds."""
    until = time.monotonic() + (math.inf if options.minutes is None else 60.0 * options.minutes)
    tasks, left_out = check(options)
    methods = methods_of(options)
    import torch

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    busy = machine.busy()
    for task, reason in left_out.items():
        print(f"note: {task} is left out: {reason}", file=sys.stderr)
    where = device.resolve(options.device, options.dtype)
    for label, reason in refused(methods, where).items():
        if "all" not in options.patterns:
            raise UsageError(f"{label}: {reason}")
        print(f"note: {label} is left out: {reason}", file=sys.stderr)
        left_out[label] = f"{label}: {reason}"
        del methods[label]
    print("loading the model ...", file=sys.stderr, flush=True)
    loaded = models.load(options.model, options.dtype, where, adapter=options.adapter)
    chat = None
    if options.chat:
        if not getattr(loaded.tokenizer, "chat_template", None):
            raise UsageError("--chat: the model's tokenizer has no chat template")
        chat = _template(loaded.tokenizer)
    prompts = make_prompts(tasks, options, loaded, chat)
    known = answers.Answers(options.out / "answers.jsonl", options.fresh)
    model = answers.of_model(models.resolve_path(options.model), options.adapter)
    asker = Asker(options, loaded, known, model)
    try:
        cases = answer_all(prompts, methods, asker, until)
    finally:
        known.close()
    if not cases:
        raise UsageError("--minutes: the time was up before the first prompt was answered")
    described = machine.describe(where.facts())
    described["versions"] |= {name: machine.version_of(name) for name in LIST_PACKAGES}
    results: dict[str, Any] = {
        "schema": SCHEMA,
        **described,
        "model": {"name": loaded.name, "dtype": loaded.dtype, "context": loaded.context},
        "settings": {
            "threads": torch.get_num_threads(),
            "busy": busy,
            "suites": list(options.suites),
            "tasks": tasks,
            "left_out": left_out,
            "lengths": sorted({case["length"] for case in cases}),
            "samples": options.samples,
            "seed": options.seed,
            "text": text.LOCAL if options.text is None else options.text.name,
            "last_token": options.last_token,
            "max_tokens": options.max_tokens,
            "chat": options.chat,
            "stretch": options.stretch,
            "from_disk": len(cases) * len(methods) - asker.asked,
            "unanswered": len(prompts) - len(cases),
        },
        "prompts_hash": answers.digest([prompt.hash for prompt in prompts]),
        "methods": {label: None if policy is None else policy.text for label, policy in methods.items()},
        "rows": figures.summaries(cases, list(methods)),
        "cases": cases,
    }
    results["table"], results["verdict"] = render(results), verdict(results)
    write(options.out, results)
    return results


def _template(tokenizer: Any) -> Any:
    def apply(history: Any, add_generation_prompt: bool = True) -> Any:
        return tokenizer.apply_chat_template(
            history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    return apply


def write(out: Path, results: dict[str, Any]) -> None:
    """Print the tables; write all files."""
    from . import draw, page

    print(f"{results['table']}\n\n{results['verdict']}", flush=True)
    results["files"] = ["results.json", "answers.jsonl", "report.html", *draw.all_of(out, results)]
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (out / "report.html").write_text(page.page(results, out), encoding="utf-8")
    print(f"\n{out}/: {', '.join(results['files'])}", flush=True)
