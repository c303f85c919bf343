"""RULER's thirteen tasks (Hsieh et al., 2404.06654): lm-eval's generators, our haystack, our seed.

lm-eval makes 500 samples per length from one running random state, so what a sample is depends on all before
it. Here a task and a length begin with a seed of their own and make as many samples as are asked for: the
same prompts whichever tasks run beside them. Eleven tasks need nothing but text; the two with questions read
files. Scores are lm-eval's: the share of the expected strings that the answer contains, whatever its case.

lm-eval's frequent-words generator fills the whole length with its prompt and adds the answer's room on top.
So that no prompt is ever cut, it gets the length less that room.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UsageError
from . import harness, text

NIAH: dict[str, dict[str, Any]] = {
    "niah_single_1": {"type_haystack": "repeat"},
    "niah_single_2": {"type_haystack": "essay"},
    "niah_single_3": {"type_haystack": "essay", "type_needle_v": "uuids"},
    "niah_multikey_1": {"type_haystack": "essay", "num_needle_k": 4},
    "niah_multikey_2": {"type_haystack": "needle"},
    "niah_multikey_3": {"type_haystack": "needle", "type_needle_k": "uuids", "type_needle_v": "uuids"},
    "niah_multivalue": {"type_haystack": "essay", "num_needle_v": 4},
    "niah_multiquery": {"type_haystack": "essay", "num_needle_q": 4},
}
QA = {  # task -> file, what it is
    "qa_squad": ("dev-v2.0.json", "SQuAD 2.0's development set"),
    "qa_hotpot": ("hotpot_dev_distractor_v1.json", "HotpotQA's development set with distractors"),
}
OFFLINE = (*NIAH, "vt", "cwe", "fwe")
TASKS = (*OFFLINE, *QA)
ONE_NEEDLE = tuple(name for name in NIAH if name not in ("niah_multivalue", "niah_multiquery"))
LEAST_TOKENS = 1024  # below, vt's worked example and the common words do not fit, and their loops don't end
VT_EXAMPLE, VT_ANSWER = 500, 30  # tokens of vt's worked example and of its answer, in lm-eval's generator
SAMPLES, SEED = 25, 42
PREFIX = "fp_ruler_"  # of the names that lm-eval knows the tasks by

_tokenizers: dict[str, Any] = {}


def remember(name: str, tokenizer: Any) -> None:
    """Let a name in lm-eval's metadata stand for a tokenizer that is loaded already."""
    _tokenizers[name] = tokenizer


def tokenizer_of(name: str) -> Any:
    """The tokenizer of a folder, a GGUF file or a name, loaded once."""
    if name not in _tokenizers:
        from transformers import AutoTokenizer

        path = Path(name).expanduser()
        where, options = (str(path.parent), {"gguf_file": path.name}) if path.is_file() else (str(name), {})
        _tokenizers[name] = AutoTokenizer.from_pretrained(where, **options)
    return _tokenizers[name]


def _niah(name: str, tokenizer: Any, length: int, samples: int, haystack: list[str]) -> list[dict[str, Any]]:
    niah, utils = harness.ruler("prepare_niah"), harness.ruler("niah_utils")
    fields = {"type_needle_k": "words", "type_needle_v": "numbers", **NIAH[name]}
    kind = fields["type_haystack"]
    hay = haystack if kind == "essay" else niah.get_haystack(type_haystack=kind)
    split = niah.cached_sent_tokenize
    niah.cached_sent_tokenize = text.sentences
    try:
        made: list[dict[str, Any]] = niah.generate_samples(
            hay,
            TOKENIZER=tokenizer,
            max_seq_length=length,
            template=utils.TEMPLATE,
            num_samples=samples,
            **fields,
        )
    finally:
        niah.cached_sent_tokenize = split
    return made


def _must_fit(name: str, tokens: int, room: int, length: int) -> None:
    """Refuse a length whose smallest prompt hardly fits: lm-eval's generators would try for ever."""
    if 1.1 * tokens > room:
        raise UsageError(
            f"--lengths {length}: {name}'s smallest prompt takes {tokens} tokens of this tokenizer, "
            f"and there are {room}"
        )


def _vt(tokenizer: Any, length: int, samples: int) -> list[dict[str, Any]]:
    utils = harness.ruler("vt_utils")
    make = utils.sys_vartrack_w_noise_random
    example_text, _ = utils.generate_input_output(
        5, 1, 4, is_icl=True
    )  # of 500 tokens with its answer, at most
    example_tokens = len(tokenizer(example_text).input_ids) + VT_ANSWER
    _must_fit("vt", example_tokens, VT_EXAMPLE, length)
    smallest, _ = utils.generate_input_output(10, 1, 4)
    _must_fit("vt", len(tokenizer(smallest).input_ids) + VT_EXAMPLE + VT_ANSWER, length, length)
    example = make(tokenizer=tokenizer, num_samples=1, max_seq_length=500, incremental=5)[0]
    made: list[dict[str, Any]] = make(
        tokenizer=tokenizer, num_samples=samples, max_seq_length=length, icl_example=example
    )
    return made


def _cwe(tokenizer: Any, length: int, samples: int, seed: str) -> list[dict[str, Any]]:
    utils = harness.ruler("cwe_utils")
    utils.RNG.seed(seed)  # its own generator shuffles the list of words
    _, smallest, _ = utils.generate_input_output(20, length)
    room = length - utils.CONFIG["tokens_to_generate"]
    _must_fit("cwe", len(tokenizer(smallest).input_ids), room, length)
    made: list[dict[str, Any]] = utils.sys_word_pair_random(
        num_samples=samples, max_seq_length=length, tokenizer=tokenizer
    )
    return made


def _fwe(tokenizer: Any, length: int, samples: int) -> list[dict[str, Any]]:
    utils = harness.ruler("fwe_utils")
    room = length - utils.CONFIG["tokens_to_generate"]
    made: list[dict[str, Any]] = utils.sys_kwext(
        tokenizer=tokenizer, max_seq_length=room, num_samples=samples
    )
    return [{**one, "max_length": length} for one in made]


@contextlib.contextmanager
def _read_from_disk(utils: Any) -> Iterator[None]:
    download = utils.download_json
    utils.download_json = lambda path: json.loads(Path(path).read_text(encoding="utf-8"))
    try:
        yield
    finally:
        utils.download_json = download


def file_of(name: str, data: Path | None) -> Path:
    """The file that a task with questions reads, or a UsageError that says what it is."""
    wanted, what = QA[name]
    path = (data or Path()).expanduser() / wanted
    if data is None or not path.is_file():
        where = f"--data {data}: {wanted} is missing" if data is not None else f"it needs the file {wanted}"
        raise UsageError(f"{name}: {where} ({what}); download it and give its folder with --data")
    return path


def _qa(name: str, tokenizer: Any, length: int, samples: int, data: Path | None) -> list[dict[str, Any]]:
    path, utils = file_of(name, data), harness.ruler("qa_utils")
    with _read_from_disk(utils):
        read = utils.read_squad if name == "qa_squad" else utils.read_hotpotqa
        questions, documents = read(url=str(path))
    made: list[dict[str, Any]] = utils.generate_samples(
        tokenizer,
        docs=documents,
        qas=questions,
        max_seq_length=length,
        num_samples=min(samples, len(questions)),
    )
    return made


def samples_of(
    name: str,
    tokenizer: Any,
    length: int,
    samples: int = SAMPLES,
    seed: int = SEED,
    text_path: Path | None = None,
    data: Path | None = None,
) -> list[dict[str, Any]]:
    """Make the samples of one task at one length.

    Args:
        name: one of TASKS.
        tokenizer: called with a text it returns an object with input_ids.
        length: tokens of a prompt and its answer together, at most.
        samples: how many.
        seed: the same prompts for the same seed, tokenizer and text.
        text_path: the haystack's text, for the tasks whose haystack is prose; None for text on this machine.
        data: the folder of the files with questions.

    Returns:
        lm-eval's samples: index, input, gen_prefix (what the answer begins with), outputs (the strings that
        the answer must contain), length, max_length.

    Raises:
        UsageError: the length is too short for the task, or its file is missing.
    """
    if length < LEAST_TOKENS:
        raise UsageError(f"--lengths {length}: RULER's tasks need at least {LEAST_TOKENS} tokens")
    begin = f"{name} {length} {seed}"
    with harness.seeded(begin), harness.quiet():
        if name in NIAH:
            prose = NIAH[name]["type_haystack"] == "essay"
            return _niah(name, tokenizer, length, samples, text.words(length, text_path) if prose else [])
        if name == "vt":
            return _vt(tokenizer, length, samples)
        if name == "cwe":
            return _cwe(tokenizer, length, samples, begin)
        if name == "fwe":
            return _fwe(tokenizer, length, samples)
        return _qa(name, tokenizer, length, samples, data)


def dataset(
    name: str,
    max_seq_lengths: Any = (4096,),
    samples: int = SAMPLES,
    seed: int = SEED,
    text: str | None = None,
    data: str | None = None,
    **model_args: Any,
) -> dict[str, Any]:
    """What a YAML's `custom_dataset` calls with lm-eval's metadata: a task's samples at all lengths."""
    import datasets

    tokenizer_name = next(
        (model_args[key] for key in ("tokenizer", "pretrained", "model") if model_args.get(key)), ""
    )
    if not tokenizer_name:
        raise UsageError('RULER measures prompts in tokens: give --metadata \'{"tokenizer": "PATH"}\'')
    tokenizer = tokenizer_of(str(tokenizer_name))
    paths = [None if path is None else Path(path) for path in (text, data)]
    made = [
        sample
        for length in max_seq_lengths
        for sample in samples_of(name, tokenizer, int(length), int(samples), int(seed), *paths)
    ]
    return {"test": datasets.Dataset.from_list(made, split=datasets.Split.TEST)}


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The share of the expected strings that the answer contains; also under the length's name."""
    utils = harness.ruler("common_utils")
    value = float(utils.string_match_all(utils.postprocess_pred(results), [doc["outputs"]]))
    return {"score": value, str(doc["max_length"]): value}


def score_any(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 if the answer contains one of the expected strings: the questions have several right answers."""
    said = harness.ruler("common_utils").postprocess_pred(results)[0].lower()
    value = float(any(expected.lower() in said for expected in doc["outputs"]))
    return {"score": value, str(doc["max_length"]): value}


def depth_of(name: str, doc: dict[str, Any]) -> float | None:
    """Where the needle stands in the prompt, from 0 to 1; None where there is not exactly one."""
    if name not in ONE_NEEDLE or len(doc["outputs"]) != 1:
        return None
    return float(doc["input"].find(doc["outputs"][0]) / max(1, len(doc["input"])))
