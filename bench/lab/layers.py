"""The lab's lines on dumped layers, many at a time: a process per layer and line, and it may be interrupted.

    flashprefill lab --text gpl --text code --text long --text long-code --layers 0,1,...,29 --dump out/qkv
    python bench/lab/layers.py out/qkv --jobs 16

Figures and lines are the lab's own (`apps/lab/figures.py`, `lines.py`), on one thread each. The tiles of one
point (a line at a value on a layer of a text) are one file under --parts; what is there is not measured
again. First come all lines on the lab's six layers, then the lines of MAIN on all other layers that were
dumped. A line's row is written for the layers that have all its values.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flashprefill.apps import dump, machine
from flashprefill.apps.lab import figures, lines
from flashprefill.apps.lab.run import FORCED, Curve, Point, selected

SIX = (2, 7, 13, 19, 25, 29)
MAIN = (
    "Gather, gain",
    "Sketch, gain, query metric, pool 64",
    "FlashPrefill (V1)",
    "Gather, gain, window of 512",
    "Oracle, share",
)
MORE = {  # values between the lab's, where long texts need them
    "gather": (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03),
    "sketch gain": (0.0005, 0.0015, 0.004, 0.012, 0.03, 0.06),
}
DENSITIES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
TEXTS = ("long", "long-code", "gpl", "code")


@dataclass(frozen=True)
class Job:
    """One line on one layer of one text."""

    text: str
    layer: int
    label: str


def known(indexer: Path | None) -> dict[str, lines.Line]:
    """The lines by their labels."""
    found = {line.label: line for line in lines.methods((), indexer) if line.values}
    for label, line in found.items():
        more = MORE.get(line.method if line.method == "gather" else f"{line.method} {line.parameter}")
        if more and line.parameter == "gain":
            found[label] = dataclasses.replace(line, values=more)
    return found


def part(folder: Path, job: Job, value: float) -> Path:
    """Where a point is kept."""
    return folder / f"{job.text}-{job.layer}-{job.label}-{value}.pt"


def measure(dumps: Path, parts: Path, job: Job, indexer: Path | None) -> str:
    """Every point of a job that is not there yet."""
    torch.set_num_threads(1)
    line, begin = known(indexer)[job.label], time.monotonic()
    content: Any = dump.load(dumps / f"{job.text}-layer{job.layer}.pt")
    query, key, value = (torch.as_tensor(content[name]).float() for name in "qkv")
    layer = figures.Layer(job.layer, query, key, value, float(content["scale"]))
    energies: dict[str, torch.Tensor] = {}
    for at in line.values:
        if part(parts, job, at).exists():
            continue
        point = Point(at)
        point.sums.add(layer, selected(Curve(line, [point]), point, layer, energies))
        sums = {name: getattr(point.sums, name) for name in ("density", "recall", "error", "corrected")}
        sums |= {"select_seconds": point.sums.select_seconds, "attend_seconds": point.sums.attend_seconds}
        unfinished = part(parts, job, at).with_suffix(".new")
        torch.save(sums, unfinished)
        unfinished.replace(part(parts, job, at))
    return f"{job.text} {job.layer} {job.label}: {time.monotonic() - begin:.1f} s"


def together(parts: Path, text: str, layers: Sequence[int], line: lines.Line) -> dict[str, Any] | None:
    """A line's figures over the layers that have all its values, as the lab writes them down."""
    jobs = [Job(text, layer, line.label) for layer in layers]
    whole = [job for job in jobs if all(part(parts, job, value).exists() for value in line.values)]
    if not whole:
        return None
    points = []
    for value in line.values:
        sums = figures.Sums()
        for job in whole:
            for name, what in torch.load(part(parts, job, value)).items():
                if name == "density":
                    sums.density.extend(what)
                elif isinstance(what, list):
                    getattr(sums, name).extend(tiles.float() for tiles in what)
                else:
                    setattr(sums, name, getattr(sums, name) + what)
        points.append({"value": value, **sums.figures()})
    at = {f"{density:g}": figures.at_density(points, density) for density in DENSITIES}
    return {
        "label": line.label,
        "method": line.method,
        "parameter": line.parameter,
        "layers": [job.layer for job in whole],
        "points": points,
        "at": at,
    }


def jobs_of(dumps: Path, found: dict[str, lines.Line], texts: Sequence[str]) -> list[Job]:
    """All jobs in their order: what is wanted most first, and of that what takes longest."""
    have = {
        text: sorted(int(file.stem.rpartition("-layer")[2]) for file in dumps.glob(f"{text}-layer*.pt"))
        for text in texts
    }
    main = [label for label in MAIN if label in found]
    rest = [label for label in found if label not in main]
    stages = [
        [Job(text, n, label) for label in labels for text in texts for n in have[text] if (n in SIX) == six]
        for labels, six in ((main, True), (rest, True), (main, False))
    ]
    return [job for stage in stages for job in stage]


def write(options: argparse.Namespace, found: dict[str, lines.Line], seconds: float) -> None:
    """The JSON of what is there: over the lab's six layers, and over all that were dumped."""
    texts = []
    for text in options.text or TEXTS:
        every = [int(file.stem.rpartition("-layer")[2]) for file in options.dumps.glob(f"{text}-layer*.pt")]
        for layers in (SIX, sorted(every)):
            rows = [together(options.parts, text, layers, line) for line in found.values()]
            texts.append({"name": text, "layers": list(layers), "methods": [row for row in rows if row]})
    results = {
        "schema": "flashprefill-lab-layers/1",
        **machine.describe(),
        "command": shlex.join(["python", "bench/lab/layers.py", *sys.argv[1:]]),
        "model": {"name": "SmolLM2-135M-Instruct", "dtype": "fp32"},
        "forced": FORCED,
        "seconds": round(seconds, 1),
        "texts": texts,
    }
    options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Measure what is missing, write what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("dumps", type=Path)
    parser.add_argument("--parts", type=Path, default=Path("out/lab-layers"))
    parser.add_argument("--text", choices=TEXTS, action="append", help="only these")
    parser.add_argument("--line", action="append", help="only these lines, by their labels")
    parser.add_argument("--six", action="store_true", help="only the lab's six layers")
    parser.add_argument("--indexer", type=Path, help="VSPrefill's weights")
    parser.add_argument("--jobs", type=int, default=1, help="processes beside each other, a thread each")
    parser.add_argument("--minutes", type=float, default=600.0, help="the rest is left after so long")
    parser.add_argument("--out", type=Path, default=Path("bench/results/lab-layers.json"))
    options = parser.parse_args()
    options.parts.mkdir(parents=True, exist_ok=True)
    begin, found = time.monotonic(), known(options.indexer)
    found = {label: line for label, line in found.items() if not options.line or label in options.line}
    jobs = jobs_of(options.dumps, found, options.text or TEXTS)
    jobs = [job for job in jobs if job.layer in SIX or not options.six]
    left = [
        job
        for job in jobs
        if not all(part(options.parts, job, value).exists() for value in found[job.label].values)
    ]
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        waiting = [
            (job, pool.apply_async(measure, (options.dumps, options.parts, job, options.indexer)))
            for job in left
        ]
        for job, one in waiting:
            try:
                print(one.get(max(0.0, begin + 60 * options.minutes - time.monotonic())), flush=True)
            except multiprocessing.TimeoutError:
                print("the time is up", flush=True)
                pool.terminate()
                break
            except Exception as error:  # a line that cannot run here leaves the others alone
                print(f"{job}: {error}", file=sys.stderr, flush=True)
    write(options, found, time.monotonic() - begin)


if __name__ == "__main__":
    main()
