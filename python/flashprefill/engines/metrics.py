"""Counters of sparse and dense rows, in the process that computes them.

One line in the engine's log now and then, and the same numbers as a dict for whoever wants them: from inside
the process (`snapshot`), by whatever way an engine has to ask its workers, or by a hook that is called
whenever a line is due.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from ..guard import Guard
from .findings import summary
from .options import Options
from .reading import Reading
from .rows import Split


class Metrics:
    """Counters of a process since it began. Only the thread that runs the model writes them.

    Args:
        logger: where lines go.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self.logger = logger
        self.steps = 0
        self.sparse_rows = 0
        self.sparse_chunks = 0
        self.dense_rows: Counter[str] = Counter()
        self.calls = 0
        self.fallbacks: Counter[str] = Counter()
        self._step: Any = None
        self._possible = 0
        self._kept = 0
        self._pending: list[Any] = []  # tensors of counts that are not summed up yet
        self._device_kept: Any = None  # summed up on a GPU
        self._guard: Guard | None = None
        self._pending_findings: list[Callable[[], Any]] = []
        self._findings: Any = None  # sums of them, on the device that computes
        self._paused = 0
        self._next_line = 0.0
        self._shown: dict[str, Any] | None = None
        self._reading: Reading | None = None  # what the next line says, on its way from a GPU
        self._hooks: dict[str, Callable[[dict[str, Any]], None] | None] = {}

    def begins(self, step: Any) -> bool:
        """Return whether a step is new: models with several kinds of layers prepare each batch several times.

        Args:
            step: an object of the step's own; None: every time counts.
        """
        new = step is None or step is not self._step
        self._step = step
        return new

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Count no rows and blocks inside the block: batches that an engine makes up to warm itself up."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def count_batch(self, split: Split) -> None:
        """Count a batch, once per step."""
        self._settle()
        if self._paused:
            return
        self.steps += 1
        self.sparse_rows += split.sparse_rows
        self.sparse_chunks += sum(len(span.rows) for span in split.spans)
        self.dense_rows += split.dense_rows

    def count_dense(self, reason: str, rows: int) -> None:
        """Count rows of a batch that has no others."""
        if not self._paused:
            self.dense_rows[reason] += rows

    def count_call(self, causal_blocks: int) -> None:
        """Count a layer's call of the kernel, which could keep so many blocks."""
        if not self._paused:
            self.calls += 1
            self._possible += causal_blocks

    def count_later(self, counts: Any) -> None:
        """Sum a tensor of numbers of kept blocks up when the next step begins, or somebody asks."""
        if not self._paused:
            self._pending.append(counts)

    def count_findings(self, sums: Callable[[], Any], guard: Guard) -> None:
        """Add up what a guard finds when the next step begins, or somebody asks.

        Args:
            sums: returns `findings.sums_of` what was found by then.
            guard: its settings, the same for all of a process.
        """
        if not self._paused:
            self._guard = guard
            self._pending_findings.append(sums)

    def _settle(self) -> None:
        """Sum up what layers counted. A GPU is not synchronised with."""
        for sums in self._pending_findings:
            found = sums()
            self._findings = found if self._findings is None else self._findings + found
        self._pending_findings.clear()
        for counts in self._pending:
            kept = counts.sum()
            if kept.device.type == "cpu":
                self._kept += int(kept)
            elif self._device_kept is None:
                self._device_kept = kept
            else:  # not in place: a tensor of inference mode may not be written to outside of it
                self._device_kept = self._device_kept + kept
        self._pending.clear()

    def _read(self) -> Reading:
        """Begin to read the counters."""
        self._settle()
        numbers = {
            "steps": self.steps,
            "sparse_rows": self.sparse_rows,
            "sparse_chunks": self.sparse_chunks,
            "dense_rows": dict(self.dense_rows),
            "calls": self.calls,
            "kept_blocks": self._kept,
            "causal_blocks": self._possible,
            "fallbacks": dict(self.fallbacks),
        }
        return Reading(numbers, self._device_kept, self._findings, self._guard.risk if self._guard else 0.0)

    def snapshot(self) -> dict[str, Any]:
        """Return the counters. Waits for the GPU where one has counted.

        Returns:
            steps: batches with something to split; sparse_rows, sparse_chunks: rows and pieces of prompts
            that went sparse; dense_rows: rows that did not, by reason; calls: of the kernel, by all layers
            together; kept_blocks, causal_blocks, density: over all layers and heads; fallbacks: calls that
            failed and ran dense, by message; guard: None, or what it found in all of these calls: recall,
            at_least (a lower bound that holds with probability 1 - risk), heads, how many of them were whole,
            held, repaired, dense or low, and sums, of which two snapshots' difference may be taken
            (`findings.summary`).
        """
        return self._read().numbers()

    def tick(self, options: Options) -> None:
        """Write a line if one is due and there is news. Called between steps; waits for nothing."""
        if self._reading is None:
            now = time.monotonic()
            if self.calls == (self._shown or {}).get("calls", 0) or now < self._next_line:
                return
            self._next_line = now + options.log_seconds
            self._reading = self._read()
        if not self._reading.is_there():
            return
        after, self._reading = self._reading.numbers(), None
        self.logger.info("%s", line(self._shown, after))
        self._shown = after
        hook = self.hook(options.metrics_hook)
        if hook is not None:
            try:
                hook(after)
            except Exception:
                self.logger.exception("flashprefill: metrics_hook %s failed, and is not called again", hook)
                self._hooks[options.metrics_hook or ""] = None

    def hook(self, name: str | None) -> Callable[[dict[str, Any]], None] | None:
        """Return the function of a "module:function". Raises what importing it does."""
        if name is None:
            return None
        if name not in self._hooks:
            module, _, function = name.partition(":")
            self._hooks[name] = getattr(importlib.import_module(module), function)
        return self._hooks[name]


def line(before: dict[str, Any] | None, after: dict[str, Any]) -> str:
    """Say what happened between two snapshots."""
    before = before or {}

    def news(name: str) -> int:
        return int(after[name] - before.get(name, 0))

    dense = Counter(after["dense_rows"])
    dense.subtract(before.get("dense_rows", {}))
    reasons = ", ".join(f"{rows} {reason}" for reason, rows in dense.most_common() if rows)
    possible = news("causal_blocks")
    density = f"{news('kept_blocks') / possible:.3f}" if possible else "-"
    guard = after.get("guard")
    found = ""
    if guard is not None:
        earlier = (before.get("guard") or {}).get("sums", [0.0] * len(guard["sums"]))
        new = [x - y for x, y in zip(guard["sums"], earlier, strict=True)]
        found = f"; {summary(new, guard['risk'])}"
    return (
        f"flashprefill: {news('sparse_rows')} rows in {news('sparse_chunks')} chunks sparse at density "
        f"{density}, {sum(dense.values())} rows dense" + (f" ({reasons})" if reasons else "") + found
    )
