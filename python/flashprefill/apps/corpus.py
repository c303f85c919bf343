"""Texts to learn or to plan from, and one that is kept aside: the user's, or what every machine has.

The lab's own texts, and what is much like them, are among neither: what is learnt is judged there.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import prompt
from .errors import UsageError
from .eval.text import files_of

HELD_OUT = "argparse.py"  # the lab's text "code"
LIKE_THE_LABS = ("GPL-", "LGPL-")  # its other texts


def texts(path: Path | None) -> list[tuple[str, str]]:
    """(name, text) of what is learnt from: the user's files, or what this machine has but the held-out."""
    if path is not None:
        return [(file.name, file.read_text(encoding="utf-8", errors="ignore")) for file in files_of(path)]
    return [
        (name, text)
        for name, text in prompt.local_texts()
        if name != HELD_OUT and not name.startswith(LIKE_THE_LABS)
    ]


class Texts:
    """Token ids of texts, one after the other until they are `most`, cut into sequences."""

    def __init__(self, tokenizer: Any, found: Sequence[tuple[str, str]], tokens: int, most: int) -> None:
        self.names: list[str] = []
        self.ids: list[int] = []
        for name, text in found:
            self.ids += tokenizer(text.strip() + "\n\n", add_special_tokens=False)["input_ids"]
            self.names.append(name)
            if len(self.ids) >= most:
                break
        if len(self.ids) < tokens:
            raise UsageError(
                f"--text: {len(self.ids)} tokens are too few for a sequence of {tokens}; "
                "give more, or --tokens N"
            )

    def cut(self, number: int, seed: int, tokens: int) -> list[int]:
        """So many ids from a place that the number decides."""
        begin = random.Random(f"{seed}/{number}").randrange(len(self.ids) - tokens + 1)
        return self.ids[begin : begin + tokens]


def held_out(tokenizer: Any, path: Path | None, tokens: int) -> list[int]:
    """The first ids of the user's file, or of Python's argparse: as many as there are, up to `tokens`."""
    if path is not None:
        found = texts(path)
    else:
        found = [pair for pair in prompt.local_texts() if pair[0] == HELD_OUT]
    return Texts(tokenizer, found, min(tokens, 128), tokens).ids[:tokens]
