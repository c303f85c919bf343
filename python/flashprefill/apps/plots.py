"""The pictures: masks of heads that differ in kind, density by layer and head, and where the time went.

matplotlib without a display. One palette throughout: blue is what every mask keeps, orange is what the
policy chose, grey is what was skipped, white is the future.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.patches import Patch

FUTURE, SKIPPED, FORCED, CHOSEN = "#ffffff", "#e4e7ec", "#3b6fb6", "#f08a24"
INK, FAINT = "#1d2433", "#667085"
DPI = 150
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": "#c4cad4",
    "axes.labelcolor": FAINT,
    "axes.titlesize": 9.5,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
Array = npt.NDArray[Any]


@dataclass
class MaskPanel:
    """One policy's mask of one head: kept blocks, forced blocks, visible blocks."""

    title: str
    kept: Array
    forced: Array
    visible: Array
    recall: float | None = None

    @property
    def density(self) -> float:
        """Share of the visible blocks that was kept."""
        return float((self.kept & self.visible).sum() / max(1, self.visible.sum()))


@dataclass
class HeadRow:
    """One head: its true attention mass by tile and block (None if not measured), and its masks."""

    title: str
    mass: Array | None
    panels: list[MaskPanel] = field(default_factory=list)


def _axis(axis: Any, tokens: int) -> None:
    ticks = [t for t in range(0, tokens + 1, 2048 if tokens <= 12288 else 8192 if tokens <= 49152 else 32768)]
    if tokens < 2048:
        ticks = [0, tokens]
    names = [f"{t // 1024}K" if t % 1024 == 0 and t else str(t) for t in ticks]
    axis.set_xticks(ticks, names)
    axis.set_yticks(ticks, names)
    axis.tick_params(length=2, labelsize=7.5)


def _draw_mask(axis: Any, panel: MaskPanel, extent: tuple[float, float, float, float]) -> None:
    kind = np.where(~panel.visible, 0, np.where(~panel.kept, 1, np.where(panel.forced, 2, 3)))
    colours = ListedColormap([FUTURE, SKIPPED, FORCED, CHOSEN])
    axis.imshow(kind, cmap=colours, vmin=0, vmax=3, extent=extent, aspect="auto", interpolation="nearest")
    text = f"{panel.title}\nkeeps {panel.density:.0%} of the blocks"
    if panel.recall is not None:
        text += f", {panel.recall:.1%} of the attention"
    axis.set_title(text, loc="left", fontsize=8.5)


def masks(path: Path, rows: Sequence[HeadRow], tokens: int) -> None:
    """Draw one row of panels per head: its attention, then what each policy kept of it."""
    with plt.rc_context(STYLE):
        columns = max((row.mass is not None) + len(row.panels) for row in rows)
        size = (3.45 * columns + 0.4, 3.3 * len(rows) + 0.5)
        figure, axes = plt.subplots(len(rows), columns, figsize=size, squeeze=False, layout="constrained")
        extent: tuple[float, float, float, float] = (0, tokens, tokens, 0)
        attention: Any = None
        for line, row in zip(axes, rows, strict=True):
            places = list(line)
            line[0].set_ylabel(f"{row.title}\nquery position", fontsize=8.5)
            if row.mass is not None:
                axis = places.pop(0)
                shown = np.ma.masked_less(row.mass, 1e-7)
                norm = LogNorm(1e-4, 1)
                attention = axis.imshow(
                    shown, cmap="magma_r", norm=norm, extent=extent, aspect="auto", interpolation="nearest"
                )
                axis.set_title("true attention,\ndarker is more", loc="left", fontsize=8.5)
                _axis(axis, tokens)
            for axis, panel in zip(places, row.panels, strict=False):
                _draw_mask(axis, panel, extent)
                _axis(axis, tokens)
            for axis in places[len(row.panels) :]:
                axis.set_axis_off()
        for axis in axes[-1]:
            axis.set_xlabel("key position", fontsize=8.5)
        if attention is not None:
            label = "a block's share of its tile's true attention"
            figure.colorbar(attention, ax=axes, label=label, fraction=0.03, aspect=40)
        keys = [
            (FORCED, "always kept: the beginning, the neighbourhood, the prompt's end"),
            (CHOSEN, "chosen by score"),
            (SKIPPED, "skipped"),
        ]
        handles = [Patch(facecolor=colour, edgecolor="#c4cad4", label=name) for colour, name in keys]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
        figure.savefig(path, dpi=DPI, facecolor="white")
        plt.close(figure)


def density(path: Path, maps: Sequence[tuple[str, Array]], numbers: Sequence[int] | None = None) -> None:
    """Share of blocks kept, a panel for each (name, [layers, heads]); `numbers` names the layers."""
    with plt.rc_context(STYLE):
        across = min(len(maps), 4)
        down = -(-len(maps) // across)
        layers = max(values.shape[0] for _, values in maps)
        size = (2.55 * across + 0.9, (1.0 + min(4.6, max(1.6, 0.12 * layers))) * down)
        figure, axes = plt.subplots(down, across, figsize=size, squeeze=False, layout="constrained")
        image: Any = None
        for axis, (name, values) in zip(axes.flat, maps, strict=False):
            image = axis.imshow(
                values, cmap="viridis_r", vmin=0, vmax=1, aspect="auto", interpolation="nearest"
            )
            axis.set_title(f"{name}\nmean {values.mean():.2f}", loc="left", fontsize=8.5)
            axis.set_xlabel("head" if values.shape[1] > 1 else "", fontsize=8.5)
            step = max(1, values.shape[1] // 10)
            axis.set_xticks(range(0, values.shape[1], step))
            if numbers is not None:
                axis.set_yticks(range(len(numbers)), [str(number) for number in numbers])
            axis.tick_params(length=2, labelsize=7.5)
        for axis in list(axes.flat)[len(maps) :]:
            axis.set_axis_off()
        for axis in axes[:, 0]:
            axis.set_ylabel("layer", fontsize=8.5)
        figure.colorbar(
            image, ax=axes, label="share of the blocks kept, darker is more", fraction=0.03, aspect=30
        )
        figure.savefig(path, dpi=DPI, facecolor="white")
        plt.close(figure)


@dataclass(frozen=True)
class Unit:
    """One unit and one precision for all times of a chart: three digits of the largest."""

    name: str
    factor: float
    digits: int

    @classmethod
    def of(cls, largest: float) -> Unit:
        """Seconds, or milliseconds where there is no whole second."""
        name, factor = ("s", 1.0) if largest >= 1.0 else ("ms", 1e3)
        return cls(name, factor, max(0, 2 - int(np.floor(np.log10(max(largest * factor, 1e-9))))))

    def write(self, seconds: float) -> str:
        """Write a time. One that would round to nothing has one digit of its own."""
        value = seconds * self.factor
        digits = (
            max(self.digits, min(3, -int(np.floor(np.log10(max(value, 1e-9)))))) if value else self.digits
        )
        return f"{value:.{digits}f}"


def times(path: Path, bars: Sequence[tuple[str, float, float, float]]) -> None:
    """Seconds to the first token by method: (name, selection, rest of attention, everything else)."""
    with plt.rc_context(STYLE):
        figure = times_figure(bars)
        figure.savefig(path, dpi=DPI, facecolor="white")
        plt.close(figure)


def times_figure(bars: Sequence[tuple[str, float, float, float]]) -> Any:
    """Return the chart. Attention's time stands inside its part of the bar if it fits, else to the right."""
    figure, axis = plt.subplots(figsize=(8.2, 0.52 * len(bars) + 1.1), layout="constrained")
    place = np.arange(len(bars))
    select, attend, rest = (np.array([bar[i] for bar in bars]) for i in (1, 2, 3))
    unit = Unit.of(float((select + attend + rest).max()))
    select, attend, rest = (part * unit.factor for part in (select, attend, rest))
    total, inside = select + attend + rest, select + attend
    axis.barh(place, select, color=FORCED, height=0.62, label="selection")
    axis.barh(place, attend, left=select, color=CHOSEN, height=0.62, label="attention")
    axis.barh(place, rest, left=inside, color=SKIPPED, height=0.62, label="the rest of the model")
    axis.set_yticks(place, [bar[0] for bar in bars])
    axis.invert_yaxis()
    axis.set_xlim(0, total.max() * 1.25)
    axis.tick_params(axis="y", length=0, labelcolor=INK)
    axis.tick_params(axis="x", length=2, labelsize=7.5)
    words = {"s": "seconds", "ms": "milliseconds"}[unit.name]
    text = f"{words} to the first token; attention's part of it in the bar or in brackets"
    axis.set_xlabel(text, fontsize=8.5)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
    figure.draw_without_rendering()  # now the axis has its width, and texts can be measured
    for y in range(len(bars)):
        own = unit.write(inside[y] / unit.factor)
        label = axis.text(
            inside[y] / 2, y, own, va="center", ha="center", color="white", fontsize=8.5, gid="inside"
        )
        fits = _width(axis, label) < 0.9 * inside[y]
        if not fits:
            label.remove()
        whole = unit.write(total[y] / unit.factor) + ("" if fits else f" ({own})")
        axis.text(total[y] + total.max() * 0.01, y, whole, va="center", fontsize=8.5)
    return figure


def _width(axis: Any, text: Any) -> float:
    """Return how wide a text is, in the units of the axis."""
    box = text.get_window_extent().transformed(axis.transData.inverted())
    return float(box.width)
