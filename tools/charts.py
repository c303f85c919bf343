"""Draws the charts of README.md, docs/performance.md and docs/quality.md from the files in bench/results.

    .venv/bin/python tools/charts.py           all of them, into docs/images/

Nothing is typed by hand there: to change a figure, measure again. The masks in docs/images are
tools/method_masks.py's, which needs the model.
"""

from __future__ import annotations

import io
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator
from performance import SHOWN, factors, read
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
INK, FAINT, GRID = "#1d2433", "#667085", "#e4e7ec"
GREY, BLUE, ORANGE, GREEN = "#8a93a3", "#3b6fb6", "#f08a24", "#2f9e6e"
DPI = 130
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": "#c4cad4",
    "axes.labelcolor": FAINT,
    "axes.titlesize": 9.5,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def save(figure: Any, name: str, colours: int = 64) -> None:
    """Write a picture with a palette: a third of the bytes."""
    memory = io.BytesIO()
    figure.savefig(memory, dpi=DPI, facecolor="white")
    plt.close(figure)
    picture = Image.open(memory).convert("RGB")
    picture.quantize(colours, dither=Image.Dither.NONE).save(IMAGES / f"{name}.png", optimize=True)


def thousands(tokens: float, _: int = 0) -> str:
    """4096 as 4K."""
    return f"{tokens / 1024:g}K"


def duration(milliseconds: float, _: int = 0) -> str:
    """A time as an axis names it."""
    return f"{milliseconds / 1e3:g} s" if milliseconds >= 1e3 else f"{milliseconds:g} ms"


def log_axes(axis: Any, tokens: list[int], times: list[float]) -> None:
    """Prompt length to the right, time upwards, both logarithmic."""
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.xaxis.set_major_locator(FixedLocator(tokens))
    axis.xaxis.set_major_formatter(FuncFormatter(thousands))
    axis.yaxis.set_major_locator(FixedLocator(times))
    axis.yaxis.set_major_formatter(FuncFormatter(duration))
    for part in (axis.xaxis, axis.yaxis):
        part.set_minor_locator(NullLocator())
        part.set_minor_formatter(NullFormatter())
    axis.set_xlabel("tokens in the prompt")
    axis.tick_params(length=2, labelsize=8)


def line(axis: Any, points: list[tuple[int, float]], colour: str, name: str, shift: int = 0) -> None:
    """One curve with its name at the end."""
    axis.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3.5, linewidth=1.8)
    axis.annotate(
        name,
        points[-1],
        xytext=(6, shift),
        textcoords="offset points",
        color=colour,
        fontsize=8.5,
        va="center",
        annotation_clip=False,
    )


def prompt_length() -> None:
    """README: an operator and a model's first token over the length of the prompt."""
    operator, model = read("h200-operator"), read("try-h200")
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11.2, 4.0), layout="constrained")
        for name, colour, label, shift in (
            ("cuDNN", GREY, "dense, cuDNN", 4),
            ("dense", BLUE, "dense, our kernel", -6),
            ("FlashPrefill, query_pool=16", ORANGE, "sparse (FlashPrefill,\npooled queries)", 0),
        ):
            rows = [row for row in operator["rows"] if row["name"] == name and row["tokens"] >= 2048]
            line(left, [(row["tokens"], row["ms"]) for row in rows], colour, label, shift)
        log_axes(left, [2048, 4096, 8192, 16384, 32768, 65536, 131072], [0.1, 1, 10, 100])
        left.set_title("One attention layer, selection included\nH200, 32/8 heads of 128, bf16, made-up text")
        for method, colour, label in (
            ("dense attention", GREY, "dense, PyTorch"),
            ("sketch(mass=0.95)", GREEN, "sparse (Sketch)"),
            ("flashprefill(alpha=0.12)", ORANGE, "sparse\n(FlashPrefill)"),
        ):
            points = []
            for tokens in sorted({case["tokens"] for case in model["cases"]}):
                some = [c for c in model["cases"] if c["tokens"] == tokens and c["method"].lower() == method]
                points.append((tokens, statistics.median(c["ttft_seconds"] for c in some) * 1e3))
            line(right, points, colour, label)
        log_axes(right, [4096, 8192, 16384, 32768, 65536, 131072], [20, 50, 100, 200, 500, 1000])
        right.set_title("Time to first token of a small model\nH200, SmolLM2-135M, bf16, real text")
        save(figure, "prompt-length")


def performance() -> None:
    """docs/performance.md: speed-ups as products, and what a density is worth."""
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(11.2, 4.2), width_ratios=(1.5, 1), layout="constrained"
        )
        for place, (_, name, shape) in enumerate(SHOWN):
            kernel, sparsity, density = factors(read(name), shape)
            left.barh(place, kernel - 1, left=1, color=BLUE, height=0.62)
            left.barh(place, kernel * sparsity - kernel, left=kernel, color=ORANGE, height=0.62)
            text = f"{kernel * sparsity:.1f}x = {kernel:.1f} x {sparsity:.1f}   ({density:.0%} kept)"
            left.text(kernel * sparsity * 1.04, place, text, va="center", fontsize=8)
        left.set_xscale("log")
        left.set_xlim(1, 110)
        left.xaxis.set_major_locator(FixedLocator([1, 2, 5, 10, 20]))
        left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
        left.xaxis.set_minor_locator(NullLocator())
        names = [f"{label}, {shape.replace('x', ' x ')}" for label, _, shape in SHOWN]
        left.set_yticks(range(len(SHOWN)), names)
        left.tick_params(axis="y", length=0, labelcolor=INK)
        left.grid(axis="y", visible=False)
        left.invert_yaxis()
        left.set_title(
            "Speed of attention over PyTorch's SDPA, two threads\n"
            "blue: our dense kernel; orange: what FlashPrefill leaves out"
        )
        for label, name, shape, colour in (
            ("Zen 3, fp32", "cpu-zen3-fp32-1thread", "9/3x64x8192", GREY),
            ("Zen 4, bf16", "cpu-zen4-bf16-1thread", "9/3x64x8192", BLUE),
            ("Xeon (AMX), bf16", "cpu-amx-bf16-1thread", "9/3x64x8192", GREEN),
        ):
            rows = [row for row in read(name)["rows"] if row["shape"] == shape]
            dense = next(row["speedup"] for row in rows if row["name"].lower() in ("dense", "dense()"))
            masks = [(r["density"], r["speedup"] / dense) for r in rows if r["name"].startswith("random")]
            points = [(1.0, 1.0), *masks]
            right.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3.5, label=label)
        right.plot([1, 0.05], [1, 20], color=INK, linestyle=":", linewidth=1, label="1 / density")
        right.set_xscale("log")
        right.set_yscale("log")
        right.invert_xaxis()
        right.xaxis.set_major_locator(FixedLocator([1, 0.5, 0.3, 0.15, 0.05]))
        right.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        right.yaxis.set_major_locator(FixedLocator([1, 2, 5, 10, 20]))
        right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
        for part in (right.xaxis, right.yaxis):
            part.set_minor_locator(NullLocator())
        right.set_xlabel("density: share of the causal blocks kept")
        right.legend(frameon=False, fontsize=8.5)
        right.set_title("attend alone over our dense kernel\nrandom masks, 8K tokens, one thread")
        save(figure, "performance")


CURVES = (
    ("Oracle, share", "oracle (true masses)", INK, ":"),
    ("Sketch, gain, query metric, pool 64", "Sketch, gain", GREEN, "-"),
    ("Sketch, mass", "Sketch, default", GREEN, "--"),
    ("FlashPrefill, query_pool=16", "FlashPrefill, pooled", ORANGE, "-"),
    ("RRAttention, stride 8", "RRAttention", "#9b6bc9", "-"),
    ("XAttention, stride 16", "XAttention", "#9b6bc9", "--"),
    ("FlexPrefill", "FlexPrefill", BLUE, "-"),
    ("MInference, vertical-slash", "MInference", BLUE, "--"),
    ("Streaming", "Streaming", GREY, "-"),
)


def quality() -> None:
    """docs/quality.md: recall over density by method, a panel for each measure."""
    text = read("lab-long")["texts"][0]
    curves = {curve["label"]: curve["points"] for curve in text["methods"]}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(11.2, 4.4), layout="constrained")
        for axis, key, title in (
            (axes[0], "recall", "Attention held, mean over tiles"),
            (axes[1], "recall_p5", "Attention held, 5th percentile of tiles"),
        ):
            for label, name, colour, style in CURVES:
                points = sorted((point["density"], point[key]) for point in curves[label])
                axis.plot(*zip(*points, strict=True), color=colour, linestyle=style, marker="o",
                          markersize=3, linewidth=1.6, label=name)  # fmt: skip
            axis.set_xlim(0, 0.4)
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
            axis.set_xlabel("density: share of the causal blocks kept")
            axis.set_title(f"{title}\nSmolLM2-135M, {text['tokens']:,} tokens of licences")
            axis.tick_params(length=2, labelsize=8)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False,
                      fontsize=8.5)  # fmt: skip
        save(figure, "quality")


EVAL_COLOURS = {
    "flashprefill": GREY,
    "sketch": GREEN,
    "gather": ORANGE,
    "flexprefill": BLUE,
    "xattention": "#9b6bc9",
    "rrattention": "#d1495b",
    "minference": "#5aa5a5",
    "streaming": INK,
}


def ruler() -> None:
    """docs/quality.md: RULER's score against dense attention's over the density, a panel per length."""
    panels = []
    for name, model in (("eval-h200", "SmolLM2-135M"), ("eval-h200-adapter", "with the adapter")):
        if (ROOT / "bench" / "results" / f"{name}.json").exists():
            results = read(name)
            panels += [(results["rows"], length, model) for length in results["settings"]["lengths"]
                       if length > 2048 or model != "SmolLM2-135M"]  # fmt: skip
    with plt.rc_context(STYLE):
        columns = max(1, -(-len(panels) // 2)) if len(panels) > 3 else len(panels)
        rows = -(-len(panels) // columns)
        figure, axes = plt.subplots(
            rows, columns, figsize=(3.9 * columns + 1.6, 3.5 * rows), layout="constrained", squeeze=False
        )
        for axis, (found, length, model) in zip(axes.flat, panels, strict=False):
            here = [row for row in found if row["length"] == length and row["task"] is None]
            dense = next(row["score"] for row in here if row["method"] == "dense")
            axis.axhline(0, color=INK, linewidth=1, linestyle=":", label="dense")
            for method, colour in EVAL_COLOURS.items():
                points = sorted(
                    (row["density"], 100 * (row["score"] - dense)) for row in here
                    if row["method"].partition("(")[0] == method and row["density"] is not None
                )  # fmt: skip
                if points:
                    axis.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4,
                              linewidth=1.4, label=method)  # fmt: skip
            axis.set_xlim(0, 1.02)
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}"))
            axis.set_title(
                f"{thousands(length)} tokens, {model}\npoints against dense attention's {dense:.1%}"
            )
            axis.set_xlabel("density")
            axis.tick_params(length=2, labelsize=8)
        for axis in axes.flat[len(panels) :]:
            axis.set_axis_off()
        names = {text: line for axis in axes.flat for line, text in zip(
            *axis.get_legend_handles_labels(), strict=True)}  # fmt: skip
        figure.legend(names.values(), names.keys(), loc="outside right center", frameon=False, fontsize=8.5)
        save(figure, "ruler", colours=200)


if __name__ == "__main__":
    prompt_length()
    performance()
    quality()
    ruler()
