"""Checks rules of the source tree that no linter knows; `make check` runs it.

    python tools/check_structure.py

Includes point one way: a backend includes nothing of another, core includes no backend and no method, and a
method's headers are included in its folder alone. No file of the library is over 500 lines. Nothing outside
src/core asks which method a policy is of. Names and comments say "per".
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST_LINES = 500
CODE = (".h", ".hpp", ".cc", ".c", ".cu", ".cuh", ".inc", ".py")
# What the files of a folder may include of src/, besides their own folder. Longer folders come first.
MAY_INCLUDE = {
    "src/core": (),
    "src/reference": ("core",),
    "src/cpu": ("core",),
    "src/cuda/common": ("core",),
    "src/cuda": ("core",),
    "src/methods": ("core", "reference", "cpu", "cuda"),
    "integrations": (),
}
# A file of a method may include its own backend alone.
BACKENDS = {"method.cc": (), "reference.cc": ("reference",), "cpu.cc": ("cpu",), "cuda.cc": ("cuda",)}
INCLUDE = re.compile(r'^#include "((?:core|reference|cpu|cuda|methods)/[^"]+)"', re.MULTILINE)
BY_KIND = re.compile(r"\bkind *(?:==|!=|<|>)|switch *\([^)]*\bkind\b")
X_A_Y = re.compile(
    r"\b(?:keys|rows|tokens|tiles|blocks|heads|bytes|bits|cycles|steps) an? "
    r"(?:tile|block|head|step|row|warp|thread|lane|sequence|page|item|unit)\b|\b[a-z]+s_an?_[a-z]+\b(?!\()"
)


def files() -> list[Path]:
    """Return all tracked files, as paths from the root."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [Path(name) for name in listed.splitlines() if (ROOT / name).is_file()]


def includes(path: Path, text: str) -> Iterator[str]:
    """Yield includes that point the wrong way."""
    folder = next((name for name in MAY_INCLUDE if path.as_posix().startswith(name + "/")), None)
    if folder is None:
        return
    own = folder.removeprefix("src/").split("/")[0]
    allowed = MAY_INCLUDE[folder]
    if own == "methods":
        allowed = ("core", *BACKENDS.get(path.name, ("reference", "cpu", "cuda")))
    for header in INCLUDE.findall(text):
        top = header.split("/")[0]
        if top == "methods":
            if path.parent.as_posix() != "src/" + header.rsplit("/", 1)[0]:
                yield f"{path}: includes {header}, a header of a method, outside of its folder"
        elif top != own and top not in allowed:
            yield f"{path}: includes {header}; it may include {', '.join(allowed) or 'nothing'} of src/"


def faults() -> Iterator[str]:
    """Yield one line for each fault."""
    for path in files():
        name = path.as_posix()
        if path.suffix not in CODE or name.startswith("bench/results"):
            continue
        text = (ROOT / path).read_text()
        if (
            name.startswith(("src/", "python/", "include/", "integrations/"))
            and text.count("\n") > MOST_LINES
        ):
            yield f"{path}: {text.count(chr(10))} lines, more than {MOST_LINES}"
        yield from includes(path, text)
        for number, line in enumerate(text.splitlines(), 1):
            asks = name.startswith(("src/", "integrations/")) and not name.startswith("src/core/")
            if asks and BY_KIND.search(line):
                yield f"{path}:{number}: asks for a policy's kind: {line.strip()}"
            if path.name != "check_structure.py" and X_A_Y.search(line):
                yield f'{path}:{number}: "per" is meant: {line.strip()}'


def main() -> int:
    """Print the faults; return 1 if there are any."""
    found = list(faults())
    print("\n".join(found) or "structure: clean")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
