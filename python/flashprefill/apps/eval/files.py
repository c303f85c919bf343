"""InfiniteBench and LongBench v2, from files that the user downloads once and names with --data.

InfiniteBench (Zhang et al., 2402.13718) is one file of JSON lines per task, as its authors publish them;
prompts and scores are lm-eval's. LongBench v2 (Bai et al., 2412.15204) is one data.json. Nothing is fetched,
and the files are read as they are.
"""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

from ..errors import UsageError

# task -> the names that its file goes by
INFINITEBENCH = {
    "passkey": ("passkey.jsonl",),
    "number_string": ("number_string.jsonl",),
    "kv_retrieval": ("kv_retrieval.jsonl",),
    "code_run": ("code_run.jsonl",),
    "code_debug": ("code_debug.jsonl",),
    "math_find": ("math_find.jsonl",),
    "longdialogue_qa_en": ("longdialogue_qa_eng.jsonl", "longdialogue_qa_en.jsonl"),
    "longbook_qa_en": ("longbook_qa_eng.jsonl", "longbook_qa_en.jsonl"),
    "longbook_sum_en": ("longbook_sum_eng.jsonl", "longbook_sum_en.jsonl"),
    "longbook_choice_en": ("longbook_choice_eng.jsonl", "longbook_choice_en.jsonl"),
    "longbook_qa_chn": ("longbook_qa_chn.jsonl",),
}
LONGBENCH2 = {  # task -> how its domain begins in data.json
    "longbench2_single": "single-document",
    "longbench2_multi": "multi-document",
    "longbench2_incontext": "long in-context",
    "longbench2_history": "long-dialogue",
    "longbench2_code": "code repository",
    "longbench2_structured": "long structured",
}
LONGBENCH2_FILES = ("data.json", "longbench_v2.json")


def find(task: str, names: tuple[str, ...], data: Path | None) -> Path:
    """The file of a task, or a UsageError that names it."""
    if data is None:
        raise UsageError(f"{task}: it needs the file {names[0]}; download it and give its folder with --data")
    if not data.expanduser().is_dir():
        raise UsageError(f"--data {data}: there is no such directory")
    for name in names:
        if (data.expanduser() / name).is_file():
            return data.expanduser() / name
    raise UsageError(f"{task}: --data {data}: {' or '.join(names)} is missing")


def _some(docs: list[dict[str, Any]], samples: int, seed: int) -> list[dict[str, Any]]:
    """As many documents as are asked for, drawn by the seed, in the file's order."""
    if len(docs) <= samples:
        return docs
    chosen = sorted(random.Random(seed).sample(range(len(docs)), samples))
    return [docs[index] for index in chosen]


def _texts(values: Any) -> list[str]:
    return [str(value) for value in (values if isinstance(values, list) else [values])]


def infinitebench(task: str, data: Path | None, samples: int, seed: int) -> list[dict[str, Any]]:
    """The documents of an InfiniteBench task: context, input, answer, options."""
    path = find(task, INFINITEBENCH[task], data)
    docs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            doc = json.loads(line)
            docs.append(
                {
                    "id": int(doc.get("id", number - 1)),
                    "context": str(doc["context"]),
                    "input": str(doc.get("input", "")),
                    "answer": _texts(doc["answer"]),
                    "options": _texts(doc.get("options") or []),
                }
            )
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path}, line {number}: {type(error).__name__}: {error}") from None
    if not docs:
        raise UsageError(f"{path}: holds no documents")
    return _some(docs, samples, seed)


@functools.lru_cache(maxsize=1)  # half a gigabyte, read once for all domains
def _longbench2(path: Path) -> list[dict[str, Any]]:
    try:
        all_docs = json.loads(path.read_text(encoding="utf-8"))
        return [
            {
                "id": str(doc.get("_id", number)),
                "context": doc["context"],
                "question": doc["question"],
                "choices": [doc[f"choice_{letter}"] for letter in "ABCD"],
                "answer": "ABCD".index(doc["answer"]),
                "domain": doc["domain"],
            }
            for number, doc in enumerate(all_docs)
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: {type(error).__name__}: {error}") from None


def domains(data: Path | None) -> list[str]:
    """The tasks of LongBench v2 that a file has documents for."""
    docs = _longbench2(find("longbench2", LONGBENCH2_FILES, data))
    found = {doc["domain"].lower() for doc in docs}
    return [task for task, begin in LONGBENCH2.items() if any(name.startswith(begin) for name in found)]


def longbench2(task: str, data: Path | None, samples: int, seed: int) -> list[dict[str, Any]]:
    """The documents of a domain of LongBench v2, or of all of it: context, question, choices, answer."""
    path = find(task, LONGBENCH2_FILES, data)
    docs = _longbench2(path)
    begin = LONGBENCH2.get(task, "")
    docs = [doc for doc in docs if doc["domain"].lower().startswith(begin)]
    if not docs:
        raise UsageError(f"{path}: holds no documents whose domain begins with {begin!r}")
    return _some(docs, samples, seed)


def longbench2_dataset(
    name: str = "longbench2", data: str | None = None, samples: int = 503, seed: int = 42, **_model_args: Any
) -> dict[str, Any]:
    """What the YAML's `custom_dataset` calls. The arguments are lm-eval's metadata."""
    import datasets

    docs = longbench2(name, None if data is None else Path(data), int(samples), int(seed))
    return {"test": datasets.Dataset.from_list(docs, split=datasets.Split.TEST)}
