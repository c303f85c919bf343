"""Scores, and pairs of answers to the same prompt.

A mean hides what a policy does to single prompts: two policies with one mean may lose different prompts, and
the spread over prompts is much wider than the difference between policies. On pairs it cancels. *Kept of
dense* is the policy's mean score over the prompts that dense attention answers fully; *worse* and *better*
count prompts whose score is below and above dense attention's, and the p-value is that of McNemar's exact
test on the two (McNemar 1947; on scores that are shares, the sign test): the chance of a split at least as
uneven if the policy were as good as dense attention.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

FULL = 1.0 - 1e-9  # a score that counts as right

DENSE = "dense"
Case = dict[str, Any]


def mcnemar(worse: int, better: int) -> float:
    """Two-sided p-value of the exact test: a fair coin thrown `worse + better` times."""
    thrown, least = worse + better, min(worse, better)
    tail = sum(math.comb(thrown, k) for k in range(least + 1)) / 2**thrown
    return float(min(1.0, 2.0 * tail))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def pairs(cases: Sequence[Case], method: str) -> dict[str, Any]:
    """One method's figures over prompts that it and dense attention have answered."""
    both = [(case["answers"][DENSE], case["answers"][method]) for case in cases if method in case["answers"]]
    both = [pair for pair in both if pair[0] is not None and pair[1] is not None]
    right = [own["score"] for dense, own in both if dense["score"] >= FULL]
    worse = sum(own["score"] < dense["score"] - 1e-9 for dense, own in both)
    better = sum(own["score"] > dense["score"] + 1e-9 for dense, own in both)
    first = (
        [statistics.median(pair[side]["ttft_seconds"] for pair in both) for side in (0, 1)] if both else None
    )
    return {
        "prompts": len(both),
        "score": _mean([own["score"] for _, own in both]),
        "dense_score": _mean([dense["score"] for dense, _ in both]),
        "dense_right": len(right),
        "kept_of_dense": _mean(right),
        "worse": worse,
        "better": better,
        "mcnemar_p": mcnemar(worse, better),
        "same_answer": _mean([float(own["text"] == dense["text"]) for dense, own in both]),
        "density": _mean([own["density"] for _, own in both]),
        "ttft_seconds": first[1] if first else None,
        "ttft_speedup": first[0] / first[1] if first and first[1] else None,
    }


def summaries(cases: Sequence[Case], methods: Sequence[str]) -> list[dict[str, Any]]:
    """The figures of every method: per length and task, per length over all tasks, and over everything.

    A score over several tasks is the mean of the tasks' means, as RULER reports it; with as many prompts per
    task it is the mean over prompts too.
    """
    lengths = sorted({case["length"] for case in cases})
    tasks = list(dict.fromkeys(case["task"] for case in cases))
    rows = []
    for method in methods:
        for length in [*lengths, None]:
            here = [case for case in cases if length in (None, case["length"])]
            parts = []
            for task in tasks:
                some = [case for case in here if case["task"] == task]
                if some:
                    parts.append({"method": method, "length": length, "task": task, **pairs(some, method)})
            whole = {"method": method, "length": length, "task": None, **pairs(here, method)}
            whole["score"] = _mean([part["score"] for part in parts])
            whole["dense_score"] = _mean([part["dense_score"] for part in parts])
            rows += [*parts, whole]
    return rows


def one(rows: Sequence[dict[str, Any]], method: str, length: int | None, task: str | None) -> dict[str, Any]:
    """The row of a method, a length and a task; None is all of them."""
    return next(row for row in rows if (row["method"], row["length"], row["task"]) == (method, length, task))


def depth_bins(
    cases: Sequence[Case], method: str, lengths: Sequence[int], bins: int = 5
) -> list[list[float | None]]:
    """Mean score of one needle by depth (down) and length (across); None where there was no such prompt."""
    table: list[list[list[float]]] = [[[] for _ in lengths] for _ in range(bins)]
    for case in cases:
        said = case["answers"].get(method)
        if case["depth"] is not None and said is not None:
            place = min(bins - 1, int(case["depth"] * bins))
            table[place][lengths.index(case["length"])].append(said["score"])
    return [[_mean(cell) for cell in row] for row in table]
