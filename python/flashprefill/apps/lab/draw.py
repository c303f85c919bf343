"""The lab's pictures: recall and error against density, a curve per method; density by layer and head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt

from .. import plots

COLOURS = (
    "#3b6fb6", "#f08a24", "#2f9e6e", "#a04bb5", "#c0392b", "#1aa0b5", "#8a6d3b", "#d35d9c",
    "#5d6d7e", "#7cb518", "#34495e", "#e0b000", "#6c5ce7", "#00806a", "#b5651d", "#888888",
)  # fmt: skip
PANELS = (
    ("recall", "share of the true attention kept, mean"),
    ("recall_p5", "the same, 5th percentile of tiles"),
    ("error", "output error, blocks left out ignored"),
    ("error_corrected", "output error with mean correction"),
)
MOST_DENSITY = 0.55  # curves end here if all can be seen: sparser is the point
MAPS = 8  # density maps on one picture


def all_of(out: Path, text: dict[str, Any]) -> list[str]:
    """Draw one text's pictures; returns the files."""
    name = text["name"]
    files = [f"{name}-curves.png", f"{name}-density.png"]
    title = f"{name}, {text['tokens']:,} tokens"
    curves(out / files[0], title, text["methods"])
    chosen = [curve for curve in text["methods"] if len(curve["points"]) > 1 or curve["policy_at_reference"]]
    maps = [(c["label"], np.array(c["density_by_layer_and_head"])) for c in chosen[:MAPS]]
    plots.density(out / files[1], maps, text["layers"])
    for study, content in text["studies"].items():
        files.append(f"{name}-{study}.png")
        curves(out / files[-1], f"{title}: {content['title'].split(':')[0]}", content["curves"])
    return files


def end_of(found: Sequence[dict[str, Any]]) -> float:
    """Where the axis of densities ends: where every curve shows a line, or its only point."""
    seconds = [sorted(point["density"] for point in curve["points"])[:2][-1] for curve in found]
    return min(1.02, max([MOST_DENSITY, *(1.05 * float(density) for density in seconds)]))


def curves(path: Path, title: str, found: Sequence[dict[str, Any]]) -> None:
    """Four panels over one axis of densities."""
    with plt.rc_context(plots.STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(10.4, 7.6), layout="constrained")
        for axis, (name, what) in zip(axes.flat, PANELS, strict=True):
            for index, curve in enumerate(found):
                points = sorted(curve["points"], key=lambda point: point["density"])
                points = [point for point in points if point[name] is not None]
                colour = COLOURS[index % len(COLOURS)]
                # Oracles, which know the true attention, are dashed: no method can reach them.
                dashes = "--" if curve["method"] == "oracle" else "-"
                x, y = ([point[key] for point in points] for key in ("density", name))
                axis.plot(
                    x,
                    y,
                    dashes,
                    marker="o",
                    markersize=3.2,
                    linewidth=1.4,
                    color=colour,
                    label=curve["label"],
                )
            axis.set_title(what, loc="left")
            axis.grid(color="#e4e7ec", linewidth=0.6)
            axis.set_xlim(0, end_of(found))
        for axis in axes[1]:
            axis.set_ylim(bottom=0)
            axis.set_xlabel("density: share of the causal blocks kept")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8.5)
        figure.savefig(path, dpi=plots.DPI, facecolor="white")
        plt.close(figure)
