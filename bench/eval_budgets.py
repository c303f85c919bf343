#!/usr/bin/env python3
"""RULER for every policy at three budgets: many processes on one GPU, in rounds, cut when the time is up.

    python bench/eval_budgets.py out/budgets --adapter bench/adapters/smollm2-135m-32k --minutes 5
    python bench/eval_budgets.py out/budgets --join
    python tools/quality.py out/budgets/results.json h200-adapter

A round is one prompt of every task at every length. Within a round the policies of GROUPS come one group
after the other, so that a run that is cut has whole columns. Every answer is a line of
out/budgets/part-N.jsonl as soon as it is given; --join makes of them what one run of `flashprefill eval`
writes, of the prompts that all policies answered. A policy that no answer was asked of in time is left out,
and so is VSPrefill while its weights (--indexer) are not there. Processes share the machine, so there are no
times.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

TASKS = (
    "niah_single_2",
    "niah_multikey_3",
    "niah_multiquery",
    "vt",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multivalue",
    "niah_multikey_2",
)
EIGHTH = "query_metric=true, outliers=6, query_pool=64"
GROUPS = (
    ("flashprefill(alpha={})", ("0.05", "0.12", "0.3"), 0),
    ("sketch(mass={})", ("0.95", "0.87", "0.7"), 0),
    (f"sketch(gain={{}}, {EIGHTH})", ("0.0025", "0.0075", "0.02"), 0),
    ("gather(gain={})", ("0.0007", "0.002", "0.006"), 0),
    ("flexprefill(gamma={})", ("0.95", "0.9", "0.8"), 1),
    ("xattention(threshold={})", ("0.95", "0.9", "0.8"), 1),
    ("minference(vertical={})", ("1000, slash=6096", "500, slash=1000", "100, slash=250"), 1),
    ("streaming(window_blocks={})", ("24", "12", "4"), 2),
    ("rrattention(threshold={})", ("0.95", "0.9", "0.8"), 2),
    ("s2o(tau={})", ("0.01", "0.03", "0.1"), 2),
    ("spargeattn(topk={})", ("0.3", "0.2", "0.1"), 3),
    ("prism(mass={})", ("0.97", "0.9", "0.75"), 3),
    ("sampleattention(coverage={})", ("0.95", "0.7", "0.35"), 3),
    ("tokensparse(coverage={})", ("0.005", "0.02", "0.05"), 4),
    ("vsprefill(vertical_mass={}, slash_mass=0.01, weights='INDEXER')", ("0.8", "0.6", "0.4"), 5),
)
MOST_TOGETHER = 24  # answers that are written as one batch


def grouped(indexer: Path | None) -> list[list[str]]:
    """The policies' texts by group; dense attention, which all are compared with, is of the first."""
    count = 1 + max(number for *_, number in GROUPS)
    found: list[list[str]] = [["dense"], *([] for _ in range(count - 1))]
    for text, values, number in GROUPS:
        if "INDEXER" in text and (indexer is None or not indexer.is_file()):
            continue
        found[number] += [text.format(value).replace("INDEXER", str(indexer)) for value in values]
    return found


def shown(text: str) -> str:
    """A policy's text without the place of its weights."""
    return re.sub(r", weights='[^']*'", "", text)


def claimed(folder: Path, name: str) -> bool:
    """Whether this process is the first to ask for a piece of work."""
    try:
        os.close(os.open(folder / name, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def work(options: argparse.Namespace, number: int) -> None:
    """One of the processes: takes what nobody has taken, its own tasks first."""
    import torch

    from flashprefill.apps import device, machine, models
    from flashprefill.apps.eval import answers, asker, figures, run, suites
    from flashprefill.apps.spec import parse_policy

    class Few(asker.Asker):
        """Asks so many at once as this process may have memory for."""

        def _together(self, lm: Any, prompt: Any) -> int:
            room = 0.5e9 * options.gigabytes // lm.cache_bytes(lm.max_length)
            return int(min(MOST_TOGETHER, max(1, room))) if lm.can_batch else 1

    class Once(set[Any]):
        """A policy that has run at one length is warm at all."""

        def __contains__(self, pair: Any) -> bool:
            return super().__contains__(pair[1])

        def add(self, pair: Any) -> None:
            super().add(pair[1])

    torch.set_num_threads(1)
    asker.COUNTED = options.counted
    where = device.resolve(options.device, "auto")
    if where.cuda:
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, 1e9 * options.gigabytes / whole))
    own = run.Options(
        model=options.model, adapter=options.adapter, samples=options.rounds, text=options.text,
        max_tokens=options.max_tokens, lengths=options.lengths, device=options.device, out=options.out,
    )  # fmt: skip
    loaded = models.load(own.model, own.dtype, where, adapter=own.adapter)
    path = models.resolve_path(own.model)
    source = suites.Source(loaded.tokenizer, str(path), own.samples, own.seed, own.text, None)
    known = answers.Answers(options.out / f"answers-{number}.jsonl")
    asking = Few(own, loaded, known, answers.of_model(path, own.adapter))
    asking.warm = Once()
    described = machine.describe(where.facts())
    described["versions"] |= {name: machine.version_of(name) for name in run.LIST_PACKAGES}
    described["model"] = {"name": loaded.name, "dtype": loaded.dtype, "context": loaded.context}
    (options.out / f"machine-{number}.json").write_text(json.dumps(described) + "\n", encoding="utf-8")
    made: dict[tuple[str, int], list[Any]] = {}
    refused: dict[str, str] = {}
    mine = [options.tasks[(i + number) % len(options.tasks)] for i in range(len(options.tasks))]
    units = [
        (turn, group, length, task)
        for turn in range(options.rounds)
        for group in range(len(grouped(None)))
        for length in options.lengths
        for task in mine
    ]
    lines = (options.out / f"part-{number}.jsonl").open("a", encoding="utf-8")
    for turn, group, length, task in units:
        if time.time() > options.until:
            return
        if not grouped(options.indexer)[group] or (options.out / "claims" / f"broken-{group}").exists():
            continue
        if not claimed(options.out / "claims", f"{turn}-{group}-{length}-{task}"):
            continue
        if (task, length) not in made:
            made[task, length] = suites.prompts_of(task, length, source)
        prompt = made[task, length][turn]
        texts = [text for text in grouped(options.indexer)[group] if text not in refused]
        methods = {text: None if text == figures.DENSE else parse_policy(text) for text in texts}
        masked = {text: policy for text, policy in methods.items() if not text.startswith("tokensparse")}
        for label, reason in run.refused(masked, where).items():  # tokensparse has no mask to be tried on
            refused[label] = reason
            print(f"{label}: {reason}", file=sys.stderr, flush=True)
            del methods[label]
        begin = time.monotonic()
        # Together, and one by one where that failed: a policy must not end the others.
        for some in [methods, *({label: policy} for label, policy in methods.items())]:
            try:
                for _, label, record in asking.ask([prompt], some):
                    case = run.case_of(prompt)
                    run.add_answer(case, prompt, label, record)
                    lines.write(json.dumps(case, ensure_ascii=False) + "\n")
                    lines.flush()
            except Exception as error:
                print(f"{task}, {length}, {list(some)}: {error!r}"[:600], file=sys.stderr, flush=True)
                if "CUDA error" in str(error):  # this process can go on with nothing
                    (options.out / "claims" / f"broken-{group}").touch()
                    raise
                if where.cuda:
                    torch.cuda.empty_cache()
            else:
                if some is methods:
                    break
        took = time.monotonic() - begin
        print(f"{took:.1f} s: round {turn}, group {group}, {length}, {task}", file=sys.stderr, flush=True)


def join(options: argparse.Namespace) -> None:
    """All parts as the results of one run, of the prompts that every policy answered."""
    from flashprefill.apps.eval import answers, figures, run

    cases: dict[tuple[int, str, int], dict[str, Any]] = {}
    for part in sorted(options.out.glob("part-*.jsonl")):
        for line in part.read_text(encoding="utf-8").splitlines():
            try:
                one = json.loads(line)
            except ValueError:
                continue  # cut while it was written
            said = one.pop("answers")
            case = cases.setdefault((one["length"], one["task"], one["index"]), {**one, "answers": {}})
            case["answers"] |= {shown(label): answer for label, answer in said.items()}
    counts = Counter(label for case in cases.values() for label in case["answers"])
    order = [shown(text) for group in grouped(Path(__file__)) for text in group]
    least = options.least * counts[figures.DENSE]
    methods = [label for label in order if counts[label] and counts[label] >= least]
    whole = [case for _, case in sorted(cases.items()) if all(label in case["answers"] for label in methods)]
    print({label: counts[label] for label in order}, len(whole), file=sys.stderr)
    for case in whole:
        case["answers"] = {label: case["answers"][label] | {"ttft_seconds": 0.0} for label in methods}
    rows = figures.summaries(whole, methods)
    rows = [row | {"ttft_seconds": None, "ttft_speedup": None} for row in rows]
    first = json.loads(sorted(options.out.glob("machine-*.json"))[0].read_text(encoding="utf-8"))
    started = json.loads((options.out / "settings.json").read_text(encoding="utf-8"))
    tasks = [task for task in TASKS if any(case["task"] == task for case in whole)]
    settings = started["settings"] | {
        "threads": 1, "suites": tasks, "tasks": tasks, "left_out": {}, "seed": 42, "last_token": "dense",
        "lengths": sorted({case["length"] for case in whole}), "chat": False, "stretch": False,
        "unanswered": 0, "from_disk": 0, "busy": None, "samples": 1 + max(case["index"] for case in whole),
    }  # fmt: skip
    results: dict[str, Any] = {
        "schema": run.SCHEMA, **first, "command": started["command"], "settings": settings,
        "prompts_hash": answers.digest([case["prompt"] for case in whole]),
        "methods": {label: None if label == figures.DENSE else label for label in methods},
        "rows": rows, "cases": whole,
    }  # fmt: skip
    results["table"], results["verdict"] = run.render(results), run.verdict(results)
    run.write(options.out, results)


def main() -> None:
    """Start the processes, or be one of them, or join what they left."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="the folder that is written")
    parser.add_argument("--model", type=Path, help="as for flashprefill eval")
    parser.add_argument("--adapter", type=Path, help="as for flashprefill eval")
    parser.add_argument("--text", type=Path, help="as for flashprefill eval")
    parser.add_argument("--device", default="auto", help="as for flashprefill eval")
    parser.add_argument("--indexer", type=Path, help="VSPrefill's weights; they may come while this runs")
    parser.add_argument("--tasks", type=lambda text: text.split(","), default=list(TASKS))
    what = "the shortest first, so that a round soon has something"
    parser.add_argument("--lengths", type=json.loads, default=[8192, 16384, 32768], help=what)
    parser.add_argument("--rounds", type=int, default=6, help="prompts per task and length, at most")
    parser.add_argument("--max-tokens", type=int, default=48, help="of an answer")
    parser.add_argument("--minutes", type=float, default=5.0, help="no new prompt after so long")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--gigabytes", type=float, default=9.0, help="GPU memory of each process")
    parser.add_argument("--counted", type=int, default=1, help="rounds in which what is kept is counted")
    parser.add_argument("--least", type=float, default=0.5, help="--join: share of dense's prompts")
    parser.add_argument("--join", action="store_true", help="only join what is in the folder")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.join:
        return join(options)
    if options.worker is not None:
        return work(options, options.worker)
    (options.out / "claims").mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "bench/eval_budgets.py", *sys.argv[1:]])
    text = "licences and Python's source on this machine" if options.text is None else options.text.name
    settings = {"max_tokens": options.max_tokens, "text": text, "beside": options.processes}
    started = json.dumps({"command": command, "settings": settings})
    (options.out / "settings.json").write_text(started + "\n", encoding="utf-8")
    until = ["--until", str(time.time() + 60 * options.minutes)]
    environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    running = []
    for number in range(options.processes):
        with (options.out / f"worker-{number}.log").open("a") as log:
            arguments = [sys.executable, *sys.argv, "--worker", str(number), *until]
            running.append(subprocess.Popen(arguments, stdout=log, stderr=log, env=os.environ | environment))
    failed = [process.wait() for process in running]
    join(options)
    sys.exit(max(failed))


if __name__ == "__main__":
    main()
