"""The tables of `flashprefill eval` in docs/quality.md; tools/quality.py calls this."""

from __future__ import annotations

import textwrap
from typing import Any

from flashprefill.apps.eval import figures, run

PREFIX = "eval-"  # of the files in bench/results
INTRO = """
## RULER, every policy on the same prompts

![Scores against dense attention's over the density, by length](images/ruler.png)

Scores of `flashprefill eval` ([evaluation.md](evaluation.md)), in per cent. *Kept of dense* is the
score over the prompts that dense attention answers fully; *worse* and *better* count prompts whose
score is below and above dense attention's; *p* is McNemar's exact test on the two. *First token*
is the median of the time to it. SmolLM2-135M is a small model: what dense attention scores near
zero says nothing about a policy. Where a density is 1 the policy kept everything, and what differs
from dense attention is rounding: what a difference must exceed to mean anything.
"""
LABELS = (
    "",
    "score",
    "kept of dense",
    "worse",
    "better",
    "p",
    "same answer",
    "density",
    "first token, s",
    "speed-up",
)


def slim(results: dict[str, Any]) -> dict[str, Any]:
    """What the repository keeps of a run: every figure and every score, but not what was said."""
    labels = list(results["methods"])
    cases = [
        [case["task"], case["length"], case["index"], [case["answers"][label]["score"] for label in labels]]
        for case in results["cases"]
    ]
    dropped = ("cases", "table", "files")
    return {key: value for key, value in results.items() if key not in dropped} | {"cases": cases}


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _header(cells: list[str]) -> list[str]:
    return [_row(cells), "|" + "---|" * len(cells)]


def section(found: list[dict[str, Any]], ran: Any) -> list[str]:
    """The section: per run and length a table of all methods, then the scores by task."""
    lines = [INTRO]
    for results in found:
        labels, rows, settings = list(results["methods"]), results["rows"], results["settings"]
        lines += [f"### {results['title']}\n"] if "title" in results else []
        cut = f", answers of at most {settings['max_tokens']} tokens" if settings["max_tokens"] else ""
        model, prompts = results["model"], f"{settings['samples']} prompts per task and length"
        hashed = f"seed {settings['seed']}, prompts {results['prompts_hash'][:16]}"
        lines.append(f"{model['name']}, {model['dtype']}; {prompts}{cut}, {hashed}; " + ran(results))
        if settings.get("beside"):
            lines.append(f"{settings['beside']} processes shared the machine, so there are no times.")
        if settings.get("unanswered"):
            lines.append(f"{settings['unanswered']} prompts had no answer yet when the run's time was up.")
        if lines[-1][-1] == ".":
            lines.append("")
        for length in settings["lengths"]:
            prompts = figures.one(rows, figures.DENSE, length, None)["prompts"]
            lines += _header([f"{length:,} tokens, {prompts} prompts", *LABELS[1:]])
            for label in labels:
                lines.append(_row([f"`{label}`", *run.cells_of(figures.one(rows, label, length, None))]))
            lines.append("")
        tasks = list(dict.fromkeys(row["task"] for row in rows if row["task"]))
        lines += _header(["score by task", "tokens", *(f"`{label}`" for label in labels)])
        for task in tasks:
            for row in rows:
                if row["task"] == task and row["method"] == figures.DENSE and row["length"]:
                    scores = [figures.one(rows, label, row["length"], task)["score"] for label in labels]
                    shown = ["-" if score is None else f"{100 * score:.0f}" for score in scores]
                    lines.append(_row([task, f"{row['length']:,}", *shown]))
        lines += ["", *(f"{line}." for line in results["verdict"].splitlines()), ""]
        lines += (
            [*textwrap.wrap(results["note"], 100, break_on_hyphens=False), ""] if "note" in results else []
        )
    return lines
