"""Mutations of bytes, and runs of a reader over them: by chance from a seed, or led by coverage (atheris)."""

from __future__ import annotations

import random
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

MAX_SIZE = 4096


class Count(NamedTuple):
    """How many inputs a run had, and how many of them were read."""

    inputs: int
    read: int


class Finding(Exception):  # noqa: N818 (no error of the code under test)
    """What came out of a reader and must not."""

    def __init__(self, target: str, data: bytes, cause: BaseException) -> None:
        super().__init__(f"{target}: {type(cause).__name__}: {str(cause)[:200]} from {data!r}")
        self.data = data


@dataclass
class Target:
    """A reader.

    Attributes:
        read: reads the bytes, with a folder for files. Returns False for those that it leaves alone.
        refusals: what it may raise.
        seeds: inputs to begin with: good ones, and cases that were findings.
        words: what may be put in.
    """

    read: Callable[[bytes, Path], bool | None]
    refusals: tuple[type[Exception], ...]
    seeds: list[bytes]
    words: list[bytes]


# ---------------------------------------------------------------- mutations

NUMBERS = (
    b"0",
    b"-1",
    b"1",
    b"128",
    b"1e400",
    b"-0.0",
    b"0.5",
    b"NaN",
    b"Infinity",
    b"2147483648",
    b"9" * 25,
)
NUMBERS += (b"0x" + b"f" * 4000, b"1e-320", b"true", b"null", b"None")
ANYTHING = (
    b"",
    b"\x00",
    b"\xff",
    b"\xed\xa0\x80",
    b'"',
    b"'",
    b"\\",
    b"\n",
    b"[" * 3000,
    b"(" * 300,
    b"-" * 2500,
)


def mutate(data: bytes, target: Target, draw: random.Random, most: int = MAX_SIZE) -> bytes:
    """Change one thing to a few things."""
    text = bytearray(data)
    for _ in range(1 + int(draw.expovariate(0.7))):
        begin = draw.randint(0, len(text))
        end = min(len(text), begin + draw.choice((1, 1, 2, 4, 8, 32)))
        kind = draw.randrange(9)
        if kind == 0:
            text[begin:end] = b""
        elif kind == 1:
            text[begin:begin] = draw.choice(target.words)
        elif kind == 2:
            text[begin:end] = draw.choice(target.words)
        elif kind == 3:
            text[begin:end] = draw.choice(NUMBERS)
        elif kind == 4:
            text[begin:begin] = text[begin:end] * draw.choice((1, 2, 50))
        elif kind == 5:
            text[begin:end] = draw.randbytes(end - begin)
        elif kind == 6 and begin < len(text):
            text[begin] ^= 1 << draw.randrange(8)
        elif kind == 7:
            other = draw.choice(target.seeds)
            at = draw.randint(0, len(other))
            text[begin:] = other[at:]
        elif kind == 8 and draw.random() < 0.1:
            text[begin:begin] = draw.choice(ANYTHING)
    return bytes(text[:most])


# ---------------------------------------------------------------- running


def read(name: str, target: Target, data: bytes, folder: Path) -> bool:
    """Read one input. Returns whether it was accepted; any exception but a refusal is a finding."""
    try:
        return target.read(data, folder) is not False
    except target.refusals as refusal:
        if data and not str(refusal):
            raise Finding(name, data, refusal) from refusal
        return False
    except Exception as error:
        raise Finding(name, data, error) from error


def run(
    name: str, target: Target, folder: Path, seconds: float, most: int | None = None, seed: int = 0
) -> Count:
    """Read the seeds, then mutations of them and of what was read, for so long or so many inputs."""
    draw = random.Random(seed)
    pool = list(target.seeds)
    inputs = good = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read(name, target, target.seeds[0], folder)  # imports what it takes
        end = time.monotonic() + seconds
        while time.monotonic() < end and (most is None or inputs < most):
            data = (
                target.seeds[inputs]
                if inputs < len(target.seeds)
                else mutate(draw.choice(pool), target, draw)
            )
            accepted = read(name, target, data, folder)
            inputs += 1
            good += accepted
            if accepted and len(pool) < 1000:
                pool.append(data)
    return Count(inputs, good)


def run_atheris(name: str, target: Target, folder: Path, options: list[str]) -> None:
    """The same, led by the coverage of our modules; does not return. The last option is the corpus."""
    import atheris

    for number, seed in enumerate(target.seeds):
        (Path(options[-1]) / f"seed-{number}").write_bytes(seed)

    def change(data: bytes, most: int, seed: int) -> bytes:
        draw = random.Random(seed)
        return mutate(data, target, draw, most) if draw.random() < 0.7 else atheris.Mutate(data, most)

    def once(data: bytes) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(name, target, data, folder)

    atheris.Setup([sys.argv[0], *options], once, custom_mutator=change)
    atheris.Fuzz()
