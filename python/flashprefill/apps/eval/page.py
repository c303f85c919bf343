"""eval's report.html: tables, pictures, the prompts that a policy lost, and how it was measured."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from .. import machine, report
from . import figures, ruler, run

LOST = 12  # lost answers that are shown

INTRO = """
<p>Every method answered the same prompts. <i>Score</i> is the mean of the tasks' scores, in per cent.
<i>Kept of dense</i> is the score over the prompts that dense attention answers fully. <i>Worse</i> and
<i>better</i> count prompts whose score is below and above dense attention's; <i>p</i> is McNemar's exact
test on the two: how likely so uneven a split is if the policy were as good as dense attention. <i>Same
answer</i> is the share of answers that are dense attention's letter by letter. <i>Density</i> is kept blocks
over causal ones.</p>
"""

TASKS = "Scores in per cent: tasks down, methods across, a panel per length."
LENGTHS = "All tasks together. Dashed: dense attention."
NEEDLES = """Tasks with exactly one needle: where in the prompt it stands (down), and the prompt's length
(across); per cent of needles found. Grey: no needle stood there."""


def _table(results: dict[str, Any], length: int) -> str:
    rows = ["<tr>" + "".join(f"<th>{head.replace(chr(10), '<br>')}</th>" for head in run.HEADER) + "</tr>"]
    for label in results["methods"]:
        cells = run.cells_of(figures.one(results["rows"], label, length, None))
        about = "the baseline: the model's own attention" if label == figures.DENSE else ""
        rows.append(
            f"<tr><td>{escape(label)}<small>{about}</small></td>"
            + "".join(f"<td>{c}</td>" for c in cells)
            + "</tr>"
        )
    return f'<div class="card"><table>{"".join(rows)}</table></div>'


def _tiles(results: dict[str, Any]) -> str:
    tiles = []
    for label in results["methods"]:
        row = figures.one(results["rows"], label, None, None)
        if row["score"] is None:
            continue
        if label == figures.DENSE:
            words = f"dense attention's score, over {row['prompts']} prompts"
            tiles.append((f"{100 * row['score']:.1f}", words))
        else:
            points = 100 * (row["score"] - row["dense_score"])
            density = "" if row["density"] is None else f", at a density of {row['density']:.2f}"
            tiles.append((f"{points:+.1f}", f"points with {escape(label)}{density}"))
    made = "".join(f"<div class=tile><b>{figure}</b><span>{words}</span></div>" for figure, words in tiles)
    return f'<div class="tiles">{made}</div>'


def _short(said: str, most: int = 160) -> str:
    words = " ".join(said.split())
    return escape(words if len(words) <= most else words[: most - 3] + "...") or "(nothing)"


def _lost(results: dict[str, Any]) -> str:
    """Prompts that dense attention answers fully and a policy does not."""
    rows = []
    for case in results["cases"]:
        dense = case["answers"][figures.DENSE]
        for label, own in case["answers"].items():
            if dense["score"] >= figures.FULL and own["score"] < figures.FULL:
                depth = "-" if case["depth"] is None else f"{case['depth']:.2f}"
                about = f"{escape(case['task'])}, {case['length']} tokens, depth {depth}"
                said = (_short(str(case["expected"]), 80), _short(dense["text"]), _short(own["text"]))
                cells = "".join(f"<td class=words>{words}</td>" for words in said)
                rows.append(f"<tr><td>{escape(label)}<small>{about}</small></td>{cells}</tr>")
    if not rows:
        return "<h2>What was lost</h2><p>Every policy answered all that dense attention answers fully.</p>"
    heads = "".join(f"<th class=words>{name}</th>" for name in ("expected", "dense", "the policy"))
    head = f"<tr><th></th>{heads}</tr>"
    more = f"<p>{len(rows)} answers in all; the first {LOST} are shown.</p>" if len(rows) > LOST else ""
    shown = "".join(rows[:LOST])
    return f'<h2>What was lost</h2>{more}<div class="card"><table>{head}{shown}</table></div>'


def _facts(results: dict[str, Any]) -> str:
    settings, model = results["settings"], results["model"]
    read = (
        "the prompt's last token and the answer are dense"
        if settings["last_token"] == "dense"
        else "the policy reads the whole prompt; the answer is dense"
    )
    prompts = (
        f"{len(results['cases'])}, {settings['samples']} per task and length at most, seed {settings['seed']}"
    )
    facts = {
        **report.where_it_ran(results),
        "Model": escape(f"{model['name']}, {model['dtype']}, context {model['context']}"),
        "Prompts": f"{prompts}, hash <code>{results['prompts_hash'][:16]}</code>",
        "Text": escape(settings["text"]),
        "Reading": read,
        **report.how_it_ran(results),
    }
    notes = "".join(f"<p>Left out: {escape(reason)}</p>" for reason in settings["left_out"].values())
    if settings["max_tokens"]:
        notes += f"<p class=no>Careful: answers were cut at {settings['max_tokens']} tokens.</p>"
    cut = sum(case["cut"] > 0 for case in results["cases"])
    if cut:
        notes += f"<p class=no>{cut} prompts were longer than their length and lost their middle.</p>"
    if settings["busy"]:
        notes += f"<p class=no>Careful: {escape(settings['busy'])}.</p>"
    if settings["from_disk"]:
        notes += f"<p>{settings['from_disk']} answers are of earlier runs, with their times.</p>"
    closing = (
        "<p class=soft>All figures are in results.json, all answers in answers.jsonl, next to this page.</p>"
    )
    return f"<h2>How it was measured</h2>{notes}{report.definitions(facts)}{closing}"


def page(results: dict[str, Any], out: Path) -> str:
    """Return the whole page; the pictures are read from `out`."""
    body = [_tiles(results), INTRO]
    for length in results["settings"]["lengths"]:
        prompts = figures.one(results["rows"], figures.DENSE, length, None)["prompts"]
        body += [f"<h2>{length:,} tokens, {prompts} prompts</h2>", _table(results, length)]
    body += [
        "<h2>By length</h2>",
        report.image(out / "lengths.png", "Score, density and time by length", LENGTHS),
        "<h2>By task</h2>",
        report.image(out / "tasks.png", "Scores by task and method", TASKS),
    ]
    if "needles.png" in results["files"]:
        body += [
            "<h2>Needles</h2>",
            report.image(out / "needles.png", "Needles found by depth and length", NEEDLES),
        ]
    body += [_lost(results), _facts(results)]
    suites = ", ".join(
        "RULER" if name in ("ruler", *ruler.TASKS) else name for name in results["settings"]["suites"]
    )
    title = f"{results['model']['name']}: {suites}"
    subtitle = f"Dense attention against flashprefill's policies, on {machine.computed_on(results)}"
    return report.document(title, subtitle, "\n".join(body))
