"""Statistics of a model's attention: density by layer and head, seconds, and why calls ran dense.

Nothing is measured outside of `collect_stats`. Inside, each call of an attention layer adds a row; its counts
stay where the kernel wrote them until they are read.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .._timings import Timings
from ..guard import GuardSummary
from ..stats import Stats
from .fallback import LOUD, QUIET

__all__ = ["Call", "ModelStats", "collect_stats"]


class Measured(NamedTuple):
    """One call of the kernel."""

    stats: Stats
    select_seconds: float
    attend_seconds: float
    guard_seconds: float = 0.0

    @classmethod
    def of(cls, stats: Stats, timings: Timings) -> Measured:
        """Return a call's statistics with its seconds."""
        return cls(stats, timings.select_seconds, timings.attend_seconds, timings.guard_seconds)


@dataclass(frozen=True)
class Call:
    """One call of an attention layer.

    Attributes:
        layer: the layer's number.
        rows: queries, padding included.
        keys: keys, padding and a static cache's unused slots included.
        heads: query heads.
        reason: "" if the call was sparse, else why it ran dense, in one or two words.
        seconds: of the whole call. On a GPU of the host's part only.
        select_seconds: of it in selection. CPU only.
        attend_seconds: of it in attention over the selection. CPU only.
        guard_seconds: of it in the guard. CPU only.
        parts: the statistics of the kernel's calls: one, or several for a padded batch.
    """

    layer: int
    rows: int
    keys: int
    heads: int
    reason: str
    seconds: float
    select_seconds: float
    attend_seconds: float
    parts: tuple[Stats, ...]
    guard_seconds: float = 0.0

    def counts(self) -> tuple[np.ndarray, int]:
        """Return kept blocks by query head, and how many one head could have kept."""
        kept, total = np.zeros(self.heads, np.int64), 0
        for part in self.parts:
            here = np.asarray(part.kept).sum(axis=0)
            kept += np.repeat(here, self.heads // here.shape[0])  # lists that a KV head's group shares
            total += int(np.asarray(part.total).sum())
        return kept, total


class ModelStats:
    """The calls of a model's attention layers inside a :func:`collect_stats` block. Printed, a table."""

    def __init__(self, modules: dict[int, int]) -> None:
        self._layers = modules  # id of an attention layer -> its number
        self.calls: list[Call] = []

    def add(
        self, module: Any, rows: int, keys: int, heads: int, seconds: float, outcome: list[Measured] | str
    ) -> None:
        """Add a call: the kernel's measurements, or why the call ran dense."""
        parts = [] if isinstance(outcome, str) else outcome
        self.calls.append(
            Call(
                self._layers[id(module)],
                rows,
                keys,
                heads,
                outcome if isinstance(outcome, str) else "",
                seconds,
                sum(part.select_seconds for part in parts),
                sum(part.attend_seconds for part in parts),
                tuple(part.stats for part in parts),
                sum(part.guard_seconds for part in parts),
            )
        )

    @property
    def layers(self) -> int:
        """Layers of the model."""
        return max(self._layers.values(), default=-1) + 1

    @property
    def density(self) -> np.ndarray:
        """Kept over causal blocks of all sparse calls, float64 [layers, heads]; NaN where there were none."""
        heads = max((call.heads for call in self.calls), default=0)
        kept, total = np.zeros((self.layers, heads)), np.zeros((self.layers, heads))
        for call in self.calls:
            here, possible = call.counts()
            kept[call.layer, : call.heads] += here
            total[call.layer, : call.heads] += possible
        share = np.full(kept.shape, np.nan)
        np.divide(kept, total, out=share, where=total > 0)
        return share

    @property
    def mean_density(self) -> float:
        """Density over all layers and heads that were sparse; NaN if none was."""
        counts = [(call.counts(), call.heads) for call in self.calls]
        possible = sum(total * heads for (_, total), heads in counts)
        return float(sum(int(kept.sum()) for (kept, _), _ in counts) / possible) if possible else float("nan")

    @property
    def fallbacks(self) -> Counter[str]:
        """How many calls ran dense, by reason."""
        return Counter(call.reason for call in self.calls if call.reason)

    @property
    def sparse_calls(self) -> int:
        """How many calls were sparse."""
        return sum(not call.reason for call in self.calls)

    @property
    def seconds(self) -> float:
        """Seconds in attention, of all calls."""
        return sum(call.seconds for call in self.calls)

    @property
    def select_seconds(self) -> float:
        """Seconds in selection."""
        return sum(call.select_seconds for call in self.calls)

    @property
    def attend_seconds(self) -> float:
        """Seconds in attention over what was selected."""
        return sum(call.attend_seconds for call in self.calls)

    @property
    def guard_seconds(self) -> float:
        """Seconds in guards."""
        return sum(call.guard_seconds for call in self.calls)

    @property
    def guard(self) -> GuardSummary | None:
        """What guards found in all sparse calls; None where there was none."""
        reports = [part.guard for call in self.calls for part in call.parts if part.guard is not None]
        return GuardSummary.of(reports) if reports else None

    @property
    def recall(self) -> np.ndarray:
        """Audited recall of all sparse calls, float64 [layers, heads]; NaN where nothing was left out."""
        heads = max((call.heads for call in self.calls), default=0)
        total, rows = np.zeros((self.layers, heads)), np.zeros((self.layers, heads))
        for call in self.calls:
            for report in (part.guard for part in call.parts):
                if report is not None:
                    recall, audited = map(report._ops.to_host, (report.recall, report.rows_audited))
                    total[call.layer, : call.heads] += (recall * audited).sum(axis=0)
                    rows[call.layer, : call.heads] += audited.sum(axis=0)
        mean = np.full(rows.shape, np.nan)
        np.divide(total, rows, out=mean, where=rows > 0)
        return mean

    def __str__(self) -> str:
        density = self.density
        lines = ["layer sparse  dense  density    min    max    select    attend     total"]
        for layer in range(self.layers):
            calls = [call for call in self.calls if call.layer == layer]
            sparse = [call for call in calls if not call.reason]
            possible = sum(call.counts()[1] * call.heads for call in sparse)
            shares = "       -      -      -"
            if possible:
                mean = sum(int(call.counts()[0].sum()) for call in sparse) / possible
                shares = f"{mean:8.3f} {np.nanmin(density[layer]):6.3f} {np.nanmax(density[layer]):6.3f}"
            names = ("select_seconds", "attend_seconds", "seconds")
            times = [1e3 * sum(getattr(call, name) for call in calls) for name in names]
            lines.append(
                f"{layer:5d} {len(sparse):6d} {len(calls) - len(sparse):6d} {shares} "
                + " ".join(f"{time:6.1f} ms" for time in times)
            )
        for reason, count in self.fallbacks.most_common():
            lines.append(f"{count} calls dense, {reason}: {(QUIET | LOUD)[reason]}")
        if self.guard is not None:
            lines.append(f"{self.guard} ({1e3 * self.guard_seconds:.1f} ms)")
        return "\n".join(lines)


_active: list[ModelStats] = []


def recorders_of(module: Any) -> list[ModelStats]:
    """Return the statistics that collect a layer's calls."""
    return [stats for stats in _active if id(module) in stats._layers] if _active else []


@contextlib.contextmanager
def collect_stats(model: Any) -> Iterator[ModelStats]:
    """Collect what the attention layers of a model do inside the block.

    A model under torch.compile collects nothing: its graph has no place for it.

    Args:
        model: a model with ``attn_implementation="flashprefill"``, or one that patch_model has patched.
    """
    stats = ModelStats({id(module): module.layer_idx for module in attention_layers(model)})
    _active.append(stats)
    try:
        yield stats
    finally:
        _active.remove(stats)


def attention_layers(model: Any) -> list[Any]:
    """Return the modules that know which layer they are: attention layers do, for their cache."""
    return [module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int)]
