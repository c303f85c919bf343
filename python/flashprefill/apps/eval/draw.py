"""The pictures: scores, density and time by length; scores by task; needles by depth and length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt

from .. import plots
from ..lab.draw import COLOURS
from . import figures, ruler

PANELS = (  # key, title, factor, where the axis ends
    ("score", "score, %", 100.0, 103.0),
    ("density", "density", 1.0, 1.03),
    ("ttft_seconds", "first token, s", 1.0, None),
)
MISSING = "#f2f4f7"


def _name(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)


def short(labels: Sequence[str], most: int = 30) -> dict[str, str]:
    """Names for little room: without fields where that still tells the methods apart."""
    names = [label.partition("(")[0] for label in labels]
    alone = {label: names.count(name) == 1 for label, name in zip(labels, names, strict=True)}
    cut = {label: label if len(label) <= most else label[: most - 3] + "..." for label in labels}
    return {label: name if alone[label] else cut[label] for label, name in zip(labels, names, strict=True)}


def all_of(out: Path, results: dict[str, Any]) -> list[str]:
    """Draw what the run has figures for; returns the files."""
    files = ["lengths.png", "tasks.png"]
    lengths(out / files[0], results)
    tasks(out / files[1], results)
    if any(case["depth"] is not None for case in results["cases"]):
        files.append("needles.png")
        needles(out / files[-1], results)
    return files


def lengths(path: Path, results: dict[str, Any]) -> None:
    """Three panels over the lengths: score, density, seconds to the first token; a line per method."""
    known, labels = results["settings"]["lengths"], list(results["methods"])
    with plt.rc_context(plots.STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(11.4, 3.9), layout="constrained")
        for axis, (key, what, factor, most) in zip(axes, PANELS, strict=True):
            for number, label in enumerate(labels):
                values = [figures.one(results["rows"], label, length, None)[key] for length in known]
                shown = [float("nan") if value is None else factor * value for value in values]
                style = {"color": plots.INK, "linestyle": "--"} if label == figures.DENSE else {}
                colour = {"color": COLOURS[(number - 1) % len(COLOURS)]} | style
                axis.plot(
                    range(len(known)), shown, marker="o", markersize=4, linewidth=1.5, label=label, **colour
                )
            axis.set_xticks(range(len(known)), [_name(length) for length in known])
            axis.set_xlabel("tokens", fontsize=8.5)
            axis.set_title(what, loc="left")
            axis.set_ylim(0, most)
            axis.grid(axis="y", color="#e4e7ec", linewidth=0.6)
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
        figure.savefig(path, dpi=plots.DPI, facecolor="white")
        plt.close(figure)


def _map(
    axis: Any, values: Sequence[Sequence[float | None]], down: Sequence[str], across: Sequence[str]
) -> Any:
    """A heat map of shares with its figures in per cent; None is grey."""
    table = np.array([[np.nan if value is None else value for value in row] for row in values], dtype=float)
    colours = plt.get_cmap("RdYlGn").with_extremes(bad=MISSING)
    image = axis.imshow(np.ma.masked_invalid(table), cmap=colours, vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(table):
        if np.isfinite(value):
            axis.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7.5)
    axis.set_xticks(range(len(across)), across, fontsize=7.5)
    axis.set_yticks(range(len(down)), down, fontsize=7.5)
    axis.tick_params(length=0)
    return image


def tasks(path: Path, results: dict[str, Any]) -> None:
    """A panel per length: tasks down, methods across, scores in per cent."""
    known, labels, rows = results["settings"]["lengths"], list(results["methods"]), results["rows"]
    names = list(dict.fromkeys(row["task"] for row in rows if row["task"]))
    shown = list(short(labels).values())
    here = {(row["method"], row["length"], row["task"]): row["score"] for row in rows}
    with plt.rc_context(plots.STYLE):
        size = (
            1.9 + (0.5 * len(labels) + 0.3) * len(known),
            0.6 + 0.085 * max(map(len, shown)) + 0.3 * len(names),
        )
        figure, axes = plt.subplots(
            1,
            len(known),
            figsize=(max(4.0, size[0]), size[1]),
            squeeze=False,
            sharey=True,
            layout="constrained",
        )
        for axis, length in zip(axes[0], known, strict=True):
            values = [[here.get((label, length, name)) for label in labels] for name in names]
            _map(axis, values, names, shown)
            axis.set_title(_name(length), loc="left")
            axis.tick_params(axis="x", labelrotation=90)
        figure.savefig(path, dpi=plots.DPI, facecolor="white")
        plt.close(figure)


def needles(path: Path, results: dict[str, Any]) -> None:
    """A panel per method: where one needle stands down, lengths across, share found in per cent."""
    cases = [case for case in results["cases"] if case["task"] in ruler.ONE_NEEDLE]
    known, labels = sorted({case["length"] for case in cases}), list(results["methods"])
    bins, names = 5, short(labels)
    down = [f"{100 * row // bins}-{100 * (row + 1) // bins} %" for row in range(bins)]
    with plt.rc_context(plots.STYLE):
        across = min(4, len(labels))
        lines = -(-len(labels) // across)
        size = (max(5.0, across * (1.2 + 0.55 * len(known)) + 1.2), 2.3 * lines + 0.3)
        figure, axes = plt.subplots(lines, across, figsize=size, squeeze=False, layout="constrained")
        image: Any = None
        for axis, label in zip(axes.flat, labels, strict=False):
            table = figures.depth_bins(cases, label, known, bins)
            image = _map(axis, table, down, [_name(length) for length in known])
            axis.set_title(names[label], loc="left", fontsize=8)
        for axis in list(axes.flat)[len(labels) :]:
            axis.set_axis_off()
        for axis in axes[:, 0]:
            axis.set_ylabel("depth", fontsize=8.5)
        figure.colorbar(image, ax=axes, label="share of needles found", fraction=0.04, aspect=30)
        figure.savefig(path, dpi=plots.DPI, facecolor="white")
        plt.close(figure)
