"""The haystack: words of real text on this machine, or of the user's, in their order.

RULER hides its needles in Paul Graham's essays, which have to be downloaded. Any prose does as well: the
licences that the demo reads, then Python's source if they are not enough; or `--text`. Needles stand between
sentences, and sentences are found by a rule, not by a model that has to be downloaded either.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from .. import prompt
from ..errors import UsageError

SUFFIXES = (".txt", ".md", ".rst")
LOCAL = "licences and Python's source on this machine"
# A sentence ends with a mark, perhaps a closing quote or bracket, before spaces and what begins another.
_END = re.compile(r"""(?:(?<=[.!?])|(?<=[.!?]["')\]])) +(?=["'(\[]?[A-Z0-9])""")
_SPACES = re.compile(r"\s+")


def sentences(text: str) -> list[str]:
    """Cut a text into sentences; joined by spaces they are the text again."""
    return _END.split(text) if text else []


def _local() -> Iterator[str]:
    texts = dict(prompt.local_texts())
    prose = [texts[name] for name in prompt.LICENCE_NAMES if name in texts]
    yield from prose
    yield from (text for name, text in texts.items() if name not in prompt.LICENCE_NAMES)


def files_of(path: Path) -> list[Path]:
    """The text files of `--text`: itself, or all .txt, .md and .rst below a folder, by name."""
    path = path.expanduser()
    if not path.exists():
        raise UsageError(f"--text {path}: there is no such file or directory")
    found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES)
    if not found:
        raise UsageError(f"--text {path}: holds no {', '.join(SUFFIXES)} files")
    return found


def words(count: int, path: Path | None = None) -> list[str]:
    """Return the first words of the text, at least `count` of them.

    Args:
        count: words. A word is at least one token, so as many words as tokens are always enough.
        path: the user's file or folder; None for what is on this machine.

    Raises:
        UsageError: the user's text has fewer words than half of that: prompts would be shorter than asked
        for.
    """
    found: list[str] = []
    texts = (
        _local() if path is None else (p.read_text(encoding="utf-8", errors="ignore") for p in files_of(path))
    )
    for text in texts:
        found += _SPACES.sub(" ", text).strip().split(" ")
        if len(found) >= count:
            return found
    if len(found) < count // 2:
        where = f"--text {path}" if path is not None else "the text on this machine"
        raise UsageError(
            f"{where}: {len(found)} words are too few for prompts of {count} tokens; give more with --text"
        )
    return found
