"""lm-eval, imported without its downloads and without its chatter.

Its RULER module asks nltk for a sentence splitter when it is imported, which without a network takes half a
minute of time-outs, and its generators print what they do. Our haystack is cut into sentences by a rule of
our own (text.py), so nothing is asked for, and what is printed goes nowhere.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import random
from collections.abc import Iterator
from typing import Any

import numpy as np

PACKAGES = ("lm_eval", "wonderwords", "nltk", "scipy", "html2text", "httpx", "bs4")  # as modules


@contextlib.contextmanager
def without_downloads() -> Iterator[None]:
    """Inside the block nltk downloads nothing."""
    import nltk

    download = nltk.download
    nltk.download = lambda *_args, **_kw: False
    try:
        yield
    finally:
        nltk.download = download


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside the block nothing is printed, and lm-eval logs errors alone."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def seeded(text: str) -> Iterator[None]:
    """Inside the block Python's and NumPy's global generators begin with this text; afterwards they go on."""
    before, numpy_before = random.getstate(), np.random.get_state()
    random.seed(text)
    np.random.seed(random.getrandbits(32))
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(numpy_before)


def ruler(name: str) -> Any:
    """A module of lm-eval's RULER: prepare_niah, vt_utils, cwe_utils, fwe_utils, qa_utils, common_utils."""
    with without_downloads(), quiet():
        return importlib.import_module(f"lm_eval.tasks.ruler.{name}")
