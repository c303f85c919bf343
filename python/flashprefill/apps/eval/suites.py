"""What a name on the command line means, and the prompts of a task as lm-eval builds them.

lm-eval's own task objects make the prompt of a document and score its answer; what happens between the two is
ours, so that every policy answers a prompt before the next one comes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from . import answers, files, harness, ruler

LONGBENCH2 = ("longbench2", *files.LONGBENCH2)
SUITES = {
    "ruler": ruler.TASKS,
    "infinitebench": tuple(files.INFINITEBENCH),
    "longbench2": tuple(files.LONGBENCH2),
}
TASKS_PATH = Path(__file__).parent / "tasks"
SUITE_OF = {task: suite for suite, tasks in SUITES.items() for task in tasks}


@dataclass
class Source:
    """Where prompts come from."""

    tokenizer: Any
    name: str  # of the tokenizer, in lm-eval's metadata
    samples: int
    seed: int
    text: Path | None
    data: Path | None


@dataclass
class Prompt:
    """One document of a task, as lm-eval asks it."""

    task: str
    length: int
    index: int
    requests: list[Any]  # lm-eval's instances: one, or one per choice
    doc: dict[str, Any]
    scorer: Any  # the task
    depth: float | None

    @functools.cached_property
    def hash(self) -> str:
        """A hash of the text and of how it is to be continued."""
        return answers.digest([list(request.args) for request in self.requests])

    def score(self, said: Sequence[Any]) -> float:
        """The score of the answers to the requests, from 0 to 1."""
        metrics = self.scorer.process_results(self.doc, list(said))
        return float(metrics["score"] if "score" in metrics else metrics["acc"])


def chosen(names: Sequence[str], data: Path | None) -> tuple[list[str], dict[str, str]]:
    """The tasks that names stand for, and those of a suite that are left out, with the reason.

    A task that is named itself must have its file; of RULER's suite the two with questions are left out
    without.
    """
    tasks: list[str] = []
    left_out: dict[str, str] = {}
    for name in names:
        if name in SUITE_OF:
            missing_file(name, data)
            tasks.append(name)
        elif name == "ruler":
            for task in SUITES[name]:
                try:
                    missing_file(task, data)
                    tasks.append(task)
                except UsageError as error:
                    left_out[task] = str(error)
        elif name == "longbench2":
            tasks += files.domains(data)
        elif name in SUITES:
            for task in SUITES[name]:
                missing_file(task, data)
            tasks += SUITES[name]
        else:
            known = ", ".join([*SUITES, *SUITE_OF])
            raise UsageError(f"{name}: there is no such suite or task; known are {known}")
    return list(dict.fromkeys(tasks)), left_out


def missing_file(task: str, data: Path | None) -> None:
    """Refuse a task whose file is not there, with its name."""
    if task in ruler.QA:
        ruler.file_of(task, data)
    elif task in files.INFINITEBENCH:
        files.find(task, files.INFINITEBENCH[task], data)
    elif task in files.LONGBENCH2:
        files.find(task, files.LONGBENCH2_FILES, data)


@functools.cache
def _manager(folder: str) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder, include_defaults=False)


def _spec(task: str, length: int, source: Source) -> tuple[str, dict[str, Any]]:
    """The folder of a task's YAML and what is changed of it."""
    if task in ruler.TASKS:
        ruler.remember(source.name, source.tokenizer)
        docs: Any = functools.partial(
            ruler.samples_of,
            task,
            source.tokenizer,
            length,
            source.samples,
            source.seed,
            source.text,
            source.data,
        )
        return str(TASKS_PATH), {"task": ruler.PREFIX + task, "custom_dataset": _dataset(docs)}
    if task in files.LONGBENCH2:
        docs = functools.partial(files.longbench2, task, source.data, source.samples, source.seed)
        return str(TASKS_PATH), {"task": "fp_longbench2", "custom_dataset": _dataset(docs)}
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent / "infinitebench"
    docs = functools.partial(files.infinitebench, task, source.data, source.samples, source.seed)
    test = {"test_split": "test", "dataset_kwargs": None, "custom_dataset": _dataset(docs)}
    return str(folder), {"task": f"infinitebench_{task}", **test}


def _dataset(docs: Any) -> Any:
    def make(**_metadata: Any) -> dict[str, Any]:
        import datasets

        return {"test": datasets.Dataset.from_list(docs(), split=datasets.Split.TEST)}

    return make


def prompts_of(task: str, length: int, source: Source, chat: Any = None) -> list[Prompt]:
    """All prompts of a task at a length.

    Args:
        task: one of a suite's.
        length: tokens of prompt and answer; the suites from files are not made to it, but cut to it.
        source: tokenizer, seed, files.
        chat: a model's apply_chat_template, or None to give the text as it is.
    """
    folder, changed = _spec(task, length, source)
    with harness.without_downloads(), harness.quiet():
        # A task's YAML with changes is what lm-eval takes as a member of a group.
        (scorer,) = _manager(folder).load([{"group": "flashprefill", "task": [changed]}])["tasks"].values()
        scorer.build_all_requests(
            rank=0,
            world_size=1,
            apply_chat_template=chat is not None,
            chat_template=chat,
            fewshot_as_multiturn=False,
        )
    by_doc: dict[int, list[Any]] = {}
    for request in scorer.instances:
        by_doc.setdefault(request.doc_id, []).append(request)
    return [
        Prompt(
            task,
            length,
            number,
            sorted(requests, key=lambda request: request.idx),
            requests[0].doc,
            scorer,
            ruler.depth_of(task, requests[0].doc) if task in ruler.NIAH else None,
        )
        for number, requests in sorted(by_doc.items())
    ]
