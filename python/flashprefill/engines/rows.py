"""Which rows of a batch are sparse: each request is treated by its kind.

An engine packs the new tokens of all its running requests into one batch: whole prompts, chunks of prompts
over what the cache already holds, single tokens of requests that generate, drafts to be verified. Pieces of
prompts of at least `min_chunk` rows go to our kernel, all else to the engine's own. Nothing here knows torch
or an engine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from .options import Options


@dataclass
class Span:
    """Neighbouring requests that go sparse together: their rows are one piece of the batch.

    Attributes:
        first: number of the first of these requests.
        begin: row of the batch where they begin.
        rows: new tokens of each.
        keys: tokens of each in the cache, the new ones included.
        final: whether each one's rows end its prompt.
    """

    first: int
    begin: int
    rows: list[int] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    final: list[bool] = field(default_factory=list)

    @property
    def past(self) -> int:
        """The request after the last."""
        return self.first + len(self.rows)

    @property
    def end(self) -> int:
        """The row after the last."""
        return self.begin + sum(self.rows)


@dataclass
class Split:
    """A batch, divided into sparse and dense requests.

    Attributes:
        spans: the sparse requests.
        dense: numbers of the others, in their order.
        dense_rows: rows of the others by reason: "decode", "speculative", "short".
    """

    spans: list[Span]
    dense: list[int]
    dense_rows: Counter[str]

    @property
    def sparse_rows(self) -> int:
        """Rows that go sparse."""
        return sum(sum(span.rows) for span in self.spans)

    def dense_range(self, starts: Sequence[int]) -> tuple[int, int] | None:
        """Return the rows of the dense requests if they are one piece of the batch, else None."""
        if not self.dense or self.dense[-1] - self.dense[0] + 1 != len(self.dense):
            return None
        return starts[self.dense[0]], starts[self.dense[-1] + 1]


def split(
    starts: Sequence[int],
    keys: Sequence[int],
    prefilling: Sequence[bool],
    final: Sequence[bool] | None,
    options: Options,
    short_keys: int = 0,
) -> Split:
    """Divide a batch into sparse and dense requests.

    Args:
        starts: rows before each request, and in all: [requests + 1].
        keys: tokens of each request in the cache, the batch's included: [requests].
        prefilling: whether each request was still within its prompt before this batch: [requests].
        final: whether each request's rows end what there is to read; None if unknown: then each counts
            as ending, which costs a dense tail more and no quality.
        options: what the user asked for.
        short_keys: keys up to which our kernel would keep everything, so that the engine's own does as well.
    """
    result = Split([], [], Counter())
    short_keys = max(short_keys, options.forced_keys)
    for request in range(len(keys)):
        rows = starts[request + 1] - starts[request]
        if not prefilling[request]:
            reason = "decode" if rows <= 1 else "speculative"
        elif rows < options.least_rows or keys[request] <= short_keys:
            reason = "short"
        else:
            spans = result.spans
            if not spans or spans[-1].past != request:
                spans.append(Span(request, starts[request]))
            spans[-1].rows.append(rows)
            spans[-1].keys.append(keys[request])
            spans[-1].final.append(final is None or bool(final[request]))
            continue
        result.dense.append(request)
        if rows:
            result.dense_rows[reason] += rows
    return result
