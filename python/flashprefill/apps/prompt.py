"""A long prompt made of real text that every machine has, with a needle in it.

Random tokens would make attention look nothing like it does in use, and a downloaded book needs a network.
Every Debian has its licences, every Python its own source: prose and code. Somewhere in that text stands
one sentence that does not belong there (the needle), and the prompt ends by asking for it. The model's own
chat template is used where it has one. The text is tokenised once and cut between lines, so that a prompt
has exactly the asked number of tokens.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UsageError

LICENCES = Path("/usr/share/common-licenses")
LICENCE_NAMES = (
    "GPL-3",
    "Apache-2.0",
    "MPL-2.0",
    "GFDL-1.3",
    "LGPL-2.1",
    "GPL-2",
    "Artistic",
    "GPL-1",
    "LGPL-3",
)
STDLIB_NAMES = (
    "argparse.py",
    "textwrap.py",
    "statistics.py",
    "heapq.py",
    "shutil.py",
    "subprocess.py",
    "inspect.py",
)

NEEDLE = "The secret number of the lighthouse is {answer}."
QUESTION = "What is the secret number of the lighthouse mentioned in the text above?"
OPENING = "The secret number of the lighthouse is"
ANSWER = "48213"
PLACEHOLDER = "@@flashprefill-content@@"


@dataclass
class Prompt:
    """Token ids and what they were made of. `answer` is None when no needle was hidden."""

    ids: list[int]
    source: str
    depth: float | None = None
    needle: str | None = None
    needle_at: int | None = None
    question: str | None = None
    answer: str | None = None

    def found_in(self, continuation: str) -> bool | None:
        """Whether a continuation gives the needle's answer; None if there is nothing to find."""
        return None if self.answer is None else self.answer in continuation.replace(",", "").replace(" ", "")


def local_texts() -> Iterator[tuple[str, str]]:
    """(name, text) of real text on this machine: one licence, one module, and so on by turns."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    licences = [LICENCES / name for name in LICENCE_NAMES]
    modules = [stdlib / name for name in STDLIB_NAMES]
    turns = [path for pair in zip(licences, modules, strict=False) for path in pair] + licences[
        len(modules) :
    ]
    seen = {path for path in turns}
    turns += [path for path in sorted(stdlib.glob("*.py")) if path not in seen]
    for path in turns:
        try:
            yield path.name, path.read_text(encoding="utf-8", errors="ignore")
        except OSError:
            continue


def text_of(tokenizer: Any, tokens: int, file: Path | None) -> tuple[list[int], str]:
    """Return at least `tokens` tokens of text, or all there are, and their source."""
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8", errors="ignore")
        except OSError as error:
            raise UsageError(f"--prompt {file}: {error.strerror or error}") from error
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise UsageError(f"--prompt {file}: the file holds no text")
        return ids, file.name
    ids, names = [], []
    for name, text in local_texts():
        ids += tokenizer(text.strip() + "\n\n", add_special_tokens=False)["input_ids"]
        names.append(name)
        if len(ids) >= tokens:
            break
    if not ids:
        raise UsageError("found no text on this machine to make a prompt of; give one with --prompt FILE")
    return ids, ", ".join(names)


def frame(tokenizer: Any, question: str) -> tuple[list[int], list[int]]:
    """What comes before and after the text: the chat template's, or nothing and the start of a sentence."""

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    if getattr(tokenizer, "chat_template", None):
        content = f"{PLACEHOLDER}\n\n{question}"
        message = [{"role": "user", "content": content}]
        rendered = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        before, _, after = rendered.partition(PLACEHOLDER)
        return encode(before), encode(after)
    bos = tokenizer.bos_token_id
    return ([] if bos is None else [bos]), encode(f"\n\n{OPENING}")


def cut_between_lines(tokenizer: Any, ids: list[int], at: int) -> int:
    """The place nearest to `at` where a line ends; `at` itself where none does."""
    reach = min(400, len(ids))
    for step in range(reach):
        for place in (at - step, at + step):
            if 0 < place <= len(ids) and tokenizer.decode([ids[place - 1]]).endswith("\n"):
                return place
    return at


def build(tokenizer: Any, tokens: int, depth: float | None, file: Path | None = None) -> Prompt:
    """A prompt of `tokens` tokens (fewer if the text is short), the needle at `depth` of it, or no needle."""
    if depth is None:
        ids, source = text_of(tokenizer, tokens, file)
        return Prompt(ids=ids[:tokens], source=source)
    needle = NEEDLE.format(answer=ANSWER)
    middle = list(tokenizer(f"\n\n{needle}\n\n", add_special_tokens=False)["input_ids"])
    before, after = frame(tokenizer, QUESTION)
    room = tokens - len(before) - len(middle) - len(after)
    if room < 1:
        raise UsageError(
            f"--tokens {tokens}: must be at least {tokens - room + 1} to hold the needle and the question"
        )
    ids, source = text_of(tokenizer, room, file)
    ids = ids[:room]
    at = cut_between_lines(tokenizer, ids, round(depth * len(ids)))
    return Prompt(
        ids=before + ids[:at] + middle + ids[at:] + after,
        source=source,
        depth=depth,
        needle=needle,
        needle_at=len(before) + at,
        question=QUESTION,
        answer=ANSWER,
    )
