"""The guard: how much of the attention a mask keeps, measured while a prompt is read.

    out, stats = fp.prefill_attention(q, k, v, policy, guard="repair", return_stats=True)
    print(stats.guard)                # recall 0.957, at least 0.951; 3 of 32 heads repaired

It computes the softmax of a few rows of each head exactly, by their queries and keys, and may give heads that
keep too little a larger budget before anything is attended to. docs/guard.md says what follows from so few
rows, and with which probability.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from .errors import (
    ArgumentTypeError,
    InvalidArgumentError,
    UnsupportedError,
    refuse,
    refuse_type,
    shown,
)

__all__ = ["Guard", "GuardReport", "GuardState"]

MODES = ("observe", "repair", "strict")  # fp_guard_mode
WHOLE, HELD, REPAIRED, DENSE, LOW = range(5)  # fp_guard_outcome
OUTCOMES = ("whole", "held", "repaired", "dense", "low")
HIGHEST_LEVEL = 4.0
NO_STATE = "on a GPU, where all heads are selected for by one budget"


class GuardState:
    """What the guard has learned of a model's heads: a level for each layer and head, from 0 on.

    A head at level x is selected for with 4**x times the budget. One that keeps too little rises by 1, up to
    4; one that keeps enough sinks by a tenth. So prompts after the first few are rarely repaired. Hand the
    same object to all calls: they change it.

    Attributes:
        levels: float32 [query heads] by number of the layer.
    """

    def __init__(self) -> None:
        self.levels: dict[int, np.ndarray] = {}

    def of(self, layer: int, heads: int) -> np.ndarray:
        """Return the levels of a layer, float32 [heads]; zeros if nothing is known of it."""
        levels = self.levels.setdefault(layer, np.zeros(heads, np.float32))
        if len(levels) != heads:
            refuse("guard's state", f"of {len(levels)} heads in layer {layer}", f"of q's ({heads})")
        return levels

    def save(self, path: str | Path) -> None:
        """Write the state as JSON."""
        levels = {str(layer): [round(float(x), 4) for x in row] for layer, row in sorted(self.levels.items())}
        Path(path).write_text(json.dumps({"version": 1, "levels": levels}) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> GuardState:
        """Read what `save` wrote.

        Raises:
            InvalidArgumentError: the file holds something else.
        """
        state = cls()
        try:
            read = json.loads(Path(path).read_text(encoding="utf-8"))
            for layer, row in read["levels"].items():
                state.levels[int(layer)] = levels = np.asarray(row, np.float32)
                if levels.ndim != 1 or not ((levels >= 0) & (levels <= HIGHEST_LEVEL)).all():
                    raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError):
            refuse("guard's state", path, f"a JSON file of levels from 0 to {HIGHEST_LEVEL:g}, by layer")
        return state

    def __repr__(self) -> str:
        raised = sum(int((row > 0).sum()) for row in self.levels.values())
        heads = sum(len(row) for row in self.levels.values())
        return f"GuardState({len(self.levels)} layers, {raised} of {heads} heads raised)"


@dataclass(frozen=True)
class Guard:
    """What to measure, and what to do about heads that keep too little of the attention.

    Attributes:
        mode: "observe" measures; "repair" gives a head that keeps too little a larger budget, once; "strict"
            lets it keep everything.
        target: a head keeps too little if the lower bound of its recall is below this, or if more than 1 in
            20 of its audited rows keep less than half.
        rows: audited rows per sequence and head; 0: one in 2048, at least 32 per prompt and 8 per chunk.
        seed: of the rows that are drawn.
        risk: the probability with which a certificate may be wrong.
        layer: number of the layer, part of the seed and of the state's keys. `patch_model` sets it.
        state: what is learned from call to call (repair and strict); None: nothing.
        text: the settings as the operators take them, JSON of what is no state.
    """

    mode: str = "observe"
    target: float = 0.9
    rows: int = 0
    seed: int = 0
    risk: float = 1e-3
    layer: int = 0
    state: GuardState | None = None
    text: str = field(init=False, repr=False, compare=False)
    _numbers: ClassVar[tuple[str, ...]] = ("target", "rows", "seed", "risk", "layer")

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            refuse("guard's mode", shown(self.mode), f"one of {', '.join(MODES)}")
        for name in ("rows", "seed", "layer"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                refuse_type(f"guard's {name}", shown(value), "an integer")
            most = 2**63 - 1 if name == "seed" else 2**31 - 1
            if not 0 <= value <= most:
                refuse(f"guard's {name}", value, f"from 0 to {most}")
        for name in ("target", "risk"):
            value = getattr(self, name)
            if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
                refuse_type(f"guard's {name}", shown(value), "a number")
        if not 0 < self.target <= 1:
            refuse("guard's target", self.target, "above 0 and at most 1")
        if not 0 < self.risk < 1:
            refuse("guard's risk", self.risk, "above 0 and below 1")
        if self.state is not None and not isinstance(self.state, GuardState):
            refuse_type("guard's state", shown(self.state), "a GuardState or None")
        settings = {"mode": MODES.index(self.mode), **{name: getattr(self, name) for name in self._numbers}}
        object.__setattr__(self, "text", json.dumps(settings, default=float))  # here: no graph holds it

    def at_layer(self, layer: int) -> Guard:
        """Return the same guard for a layer."""
        return dataclasses.replace(self, layer=layer)

    @property
    def call(self) -> str:
        """The guard as a text that every argument "guard" takes, without its state and layer."""
        stock = Guard(self.mode)
        given = [n for n in self._numbers if n != "layer" and getattr(self, n) != getattr(stock, n)]
        fields = ", ".join(f"{name}={getattr(self, name)!r}" for name in given)
        return f"{self.mode}({fields})" if fields else self.mode


def guard_of(guard: Any) -> Guard | None:
    """Return the guard that an argument stands for: None, a Guard, or text ("repair(target=0.95)")."""
    if guard is None or isinstance(guard, Guard):
        return guard
    if not isinstance(guard, str):
        refuse_type("guard", shown(guard), "a Guard, a text of one, or None")
    return _parsed(guard)


@functools.lru_cache(maxsize=256)
def _parsed(guard: str) -> Guard:
    try:
        call = ast.parse(guard.strip(), mode="eval").body
        name, fields = call, {}
        if isinstance(call, ast.Call):
            name = call.func
            fields = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
            if call.args:
                raise ValueError
        if not isinstance(name, ast.Name) or "state" in fields:
            raise ValueError
        return Guard(name.id.lower(), **fields)
    except (InvalidArgumentError, ArgumentTypeError):
        raise
    except TypeError:
        refuse_type("guard", shown(guard), f"made of {', '.join(Guard._numbers)}")
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        refuse("guard", shown(guard), f"one of {', '.join(MODES)}, with fields in brackets if any")


def certificate(moments: Iterable[float], risk: float) -> float:
    """Return a lower bound of the mean of recalls that holds with probability 1 - risk.

    By the empirical Bernstein bound of Maurer and Pontil (COLT 2009): values are independent, in [0, 1].

    Args:
        moments: number, sum and sum of squares of the values, [3].
        risk: the probability of being wrong.
    """
    count, total, squares = map(float, moments)
    if count < 2:
        return 0.0 if count else 1.0
    mean = total / count
    variance = max(0.0, squares - total * mean) / (count - 1)
    log = math.log(2 / risk)
    return max(0.0, mean - math.sqrt(2 * variance * log / count) - 7 * log / (3 * (count - 1)))


class GuardReport:
    """What a guard found in one call. Arrays are of the call's array library, where q is.

    On a GPU they are filled in on the call's stream, so that making a report waits for nothing; printing it,
    `summary` and `certificate` copy them to the host.

    Attributes:
        guard: its settings.
    """

    def __init__(self, ops: Any, guard: Guard, q: Any, batch: int) -> None:
        heads = q.shape[-2]
        self.guard = guard
        self._ops = ops
        self._shares = ops.zeros(q, (3, batch, heads), "float32")
        self._numbers = ops.zeros(q, (3, batch, heads), "int32")
        self._moments = ops.zeros(q, (batch, 3), "float64")
        if guard.state is not None and ops.on_gpu(q):
            raise UnsupportedError(f"guard's state is given; it must be None {NO_STATE}")
        levels = guard.state.of(guard.layer, heads) if guard.state is not None else None
        self._levels = None if levels is None else ops.from_host(levels)

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the operators, by their names in _calls.py."""
        return {
            "guard": self.guard.text,
            "guard_shares": self._shares,
            "guard_numbers": self._numbers,
            "guard_moments": self._moments,
            "guard_levels": self._levels,
        }

    @property
    def results(self) -> tuple[Any, Any, Any]:
        """All that the library writes: shares and numbers [3, batch, heads], moments [batch, 3]."""
        return self._shares, self._numbers, self._moments

    @property
    def recall(self) -> Any:
        """Share of the softmax that lies on kept keys, float32 [batch, query heads].

        The mean over the rows whose tile leaves something out; 1 where there are none. The mean correction is
        not part of it.
        """
        return self._shares[0]

    @property
    def recall_low(self) -> Any:
        """One-sided lower bound of the recall at 95 %, approximate, float32 [batch, query heads]."""
        return self._shares[1]

    @property
    def recall_p05(self) -> Any:
        """5th percentile of the audited rows, float32 [batch, query heads]."""
        return self._shares[2]

    @property
    def rows_audited(self) -> Any:
        """Audited rows, int32 [batch, query heads]; 0 where nothing is left out."""
        return self._numbers[0]

    @property
    def missed_block(self) -> Any:
        """The heaviest block of keys that is left out, int32 [batch, query heads]; -1: none."""
        return self._numbers[1]

    @property
    def outcome(self) -> Any:
        """What became of heads, int32 [batch, query heads]: an index into `OUTCOMES`."""
        return self._numbers[2]

    @property
    def certificate(self) -> Any:
        """Lower bound of the mean recall of all heads, float64 [batch]; holds with probability 1 - risk."""
        rows = np.asarray(self._ops.to_host(self._moments))
        return self._ops.from_host(np.array([certificate(row, self.guard.risk) for row in rows], np.float64))

    def summary(self) -> GuardSummary:
        """Return the report in figures."""
        return GuardSummary.of([self])

    def __repr__(self) -> str:
        return f"GuardReport({self.summary()})"

    def __str__(self) -> str:
        return str(self.summary())


@dataclass
class GuardSummary:
    """What guards found in one call or several: of a model's layers, of a prompt's chunks.

    Attributes:
        recall: mean over all audited rows, of which `certificate` is the bound; 1 if there are none. Chunks
            of a prompt have unequal numbers of rows.
        recall_p05: 5th percentile of the recalls of heads that leave something out.
        certificate: lower bound of the mean of all audited rows' strata, holding with probability 1 - risk.
        heads: heads of all calls.
        outcomes: how many of them were whole, held, repaired, dense or low.
    """

    recall: float
    recall_p05: float
    certificate: float
    heads: int
    outcomes: dict[str, int]

    @classmethod
    def of(cls, reports: Iterable[GuardReport]) -> GuardSummary:
        """Sum up reports."""
        recalls, outcomes, moments, risk = [np.empty(0)], [np.empty(0, int)], np.zeros(3), 1.0
        for report in reports:
            shares, numbers, here = (
                np.asarray(report._ops.to_host(x)) for x in (report._shares, report._numbers, report._moments)
            )
            recalls.append(shares[0][numbers[0] > 0])
            outcomes.append(numbers[2].ravel())
            moments += here.sum(axis=0)
            risk = min(risk, report.guard.risk)
        recall, outcome = np.concatenate(recalls), np.concatenate(outcomes)
        counts = np.bincount(outcome.astype(int), minlength=len(OUTCOMES))
        return cls(
            float(moments[1] / moments[0]) if moments[0] else 1.0,
            float(np.quantile(recall, 0.05)) if len(recall) else 1.0,
            certificate(moments, risk),
            len(outcome),
            {name: int(count) for name, count in zip(OUTCOMES, counts, strict=True)},
        )

    def figures(self) -> dict[str, Any]:
        """Return the summary for a file of results."""
        numbers = {"recall": self.recall, "recall_p05": self.recall_p05, "at_least": self.certificate}
        return {**{n: round(x, 5) for n, x in numbers.items()}, "heads": self.heads, **self.outcomes}

    def __str__(self) -> str:
        if self.outcomes["whole"] == self.heads:
            return "recall 1.000: nothing was left out"
        done = {"repaired": "repaired", "dense": "made dense", "low": "below the target"}
        parts = [f"{self.outcomes[name]} {words}" for name, words in done.items() if self.outcomes[name]]
        what = ", ".join(parts).replace(" ", f" of {self.heads} heads ", 1) if parts else "all heads hold"
        return f"recall {self.recall:.3f}, at least {self.certificate:.3f}; {what}"
