"""Answers on disk, so that a run that was stopped goes on, and one with another policy asks only that one.

One JSON line per answer, appended and flushed as it is given. The key is a hash of all that an answer depends
on: the model's weights, how it is run, the policy and the library that selects for it, the prompt, how it is
to be continued. A line that was cut off by a crash is skipped.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ... import library_path

_SAMPLE = 1 << 20  # bytes of a file's beginning and end that stand for it
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".json")


def digest(value: Any) -> str:
    """A hash of anything that is JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _of_file(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        taken = hashlib.sha256(file.read(_SAMPLE))
        file.seek(max(0, size - _SAMPLE))
        taken.update(file.read(_SAMPLE))
    return f"{path.name} {size} {taken.hexdigest()}"


def of_model(path: Path, adapter: Path | None = None) -> str:
    """A hash of a model's files, and of an adapter's: their names, sizes, beginnings and ends."""
    files: list[Path] = []
    for one in (path, adapter):
        if one is not None:
            one = one.expanduser()
            files += [one] if one.is_file() else sorted(p for p in one.iterdir() if p.suffix in _WEIGHTS)
    return digest([_of_file(file) for file in files])


def of_library() -> str:
    """A hash of the library that selects: other code may select otherwise."""
    return hashlib.sha256(Path(library_path()).read_bytes()).hexdigest()


class Answers:
    """The answers of a folder, by key."""

    def __init__(self, path: Path, fresh: bool = False) -> None:
        self.path = path
        self.known: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if fresh:
            path.unlink(missing_ok=True)
        elif path.exists():
            self._read()
        self._file = path.open("a", encoding="utf-8")

    def _read(self) -> None:
        text = self.path.read_text(encoding="utf-8")
        for line in text.splitlines():
            try:
                record = json.loads(line)
                self.known[record["key"]] = record
            except (ValueError, KeyError, TypeError):
                continue
        if text and not text.endswith("\n"):  # a line was cut off: the next one begins on its own
            self.path.write_text(text + "\n", encoding="utf-8")

    def get(self, key: str) -> dict[str, Any] | None:
        """The answer of a key, if it was given."""
        return self.known.get(key)

    def put(self, key: str, record: dict[str, Any]) -> dict[str, Any]:
        """Keep an answer."""
        record = {"key": key, **record}
        self.known[key] = record
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()
        return record

    def close(self) -> None:
        """Close the file."""
        self._file.close()
