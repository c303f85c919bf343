"""The lab's order of work: a text, a layer of it, every method at every value; then the times and the pages.

A layer's Q, K, V and its dense attention are in memory once and all methods see the same. The masks at the
value nearest to the text's reference density are kept for the page.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ... import select
from ...errors import UnsupportedError
from ...guard import GuardSummary
from ...mask import BlockMask
from ...policies import VSPrefill
from .. import checks, device, machine, measure, models, table
from ..errors import UsageError
from ..spec import parse_policy
from . import baselines, lines, texts, times
from .figures import Layer, Sums, at_density, reference_density, shown

SCHEMA = "flashprefill-lab/1"
FORCED = {"sink_blocks": 1, "window_blocks": 2, "dense_tail_blocks": 0}  # as in the study
DENSITIES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)  # of the table; forced blocks alone are 0.09 at 7.6K tokens
QUICK_TOKENS, QUICK_LAYERS, QUICK_POINTS = 3072, 2, 3
TURNS = {"cpu": 3, "cuda": 15}
PROBE_TOKENS = 1024

Bits = npt.NDArray[np.uint8]


@dataclass
class Options:
    """The command line's options."""

    model: Path | None = None
    text: Sequence[str] = ()
    prompt: Path | None = None
    tokens: int | None = None
    long: bool = False
    device: str = "auto"
    dtype: str = "auto"
    layers: Sequence[int] = ()
    method: Sequence[str] = ()
    indexer: Path | None = None
    studies: bool = True
    quick: bool = False
    threads: int | None = None
    dump: Path | None = None
    source: Path | None = None
    times_only: bool = False
    out: Path = Path("out/lab")


@dataclass
class Point:
    """One line at one value: its sums over layers, and its masks by layer."""

    value: float | None
    sums: Sums = field(default_factory=Sums)
    masks: dict[int, Bits] = field(default_factory=dict)
    tile_tokens: int = 128
    group: int = 1  # query heads per mask head
    block_size: int = 128
    selected_on: str | None = None  # the kind of device; None for a scorer of the lab's own


@dataclass
class Curve:
    """A line and its points. Lines of several studies that are the same sweep share their points."""

    line: lines.Line
    points: list[Point]

    def nearest(self, density: float) -> Point:
        """The point whose density is nearest to one."""
        return min(self.points, key=lambda point: abs(float(np.mean(point.sums.density)) - density))


def selected(curve: Curve, point: Point, layer: Layer, energies: dict[str, torch.Tensor]) -> BlockMask:
    """The mask of a line at one value on one layer; `energies` keeps a scorer's work for the next value."""
    line = curve.line
    if not line.scorer:
        policy = line.policy(point.value, FORCED)
        made: tuple[BlockMask, str]
        made, seconds = layer.device.timed(lambda: layer.select(policy))
        point.sums.select_seconds += seconds
        mask, point.selected_on = made
        return mask
    if line.method not in energies:
        energies[line.method] = baselines.SCORERS[line.method](layer)
    assert line.parameter is not None and point.value is not None
    keep = baselines.RULES[line.parameter](energies[line.method], point.value)
    always = select(layer.query, layer.key, lines.forced_policy(FORCED, layer.block_size)).dense()
    tokens = layer.query.shape[0]
    return BlockMask.from_dense(keep | always, q_len=tokens, k_len=tokens, block_size=layer.block_size)


def look_at(layer: Layer, curves: Sequence[Curve], step: Any) -> None:
    """All methods at all values on one layer, each sweep once."""
    energies: dict[str, torch.Tensor] = {}
    for curve in {id(curve.points): curve for curve in curves}.values():
        for point in curve.points:
            mask = selected(curve, point, layer, energies)
            point.masks[layer.number] = np.packbits(mask.dense().numpy(force=True), axis=None)
            point.tile_tokens, point.block_size = mask.tile_tokens, mask.block_size
            point.group = layer.query.shape[1] // mask.heads
            point.sums.add(layer, mask)
            step()


def guard_of(sums: Sums) -> dict[str, Any] | None:
    """What a guard would say of the masks, next to the true recall; None where there is no guard."""
    if not sums.guards:
        return None
    found = GuardSummary.of(sums.guards)
    return {"words": str(found), "true_recall": sums.figures()["recall"], **found.figures()}


def figures_of(curve: Curve, density: float) -> dict[str, Any]:
    """One curve, as results.json holds it."""
    line = curve.line
    points = [{"value": point.value, **point.sums.figures()} for point in curve.points]
    near = curve.nearest(density)
    policy = None if line.scorer else line.policy(near.value, FORCED).text
    return {
        "label": line.label,
        "method": line.method,
        "parameter": line.parameter,
        "policy_at_reference": policy,
        "value_at_reference": near.value,
        "selected_on": near.selected_on,
        "guard_at_reference": guard_of(near.sums),
        "density_by_layer_and_head": near.sums.density,
        "points": points,
        "at": {f"{d:g}": at_density(points, d) for d in sorted({*DENSITIES, density})},
    }


@dataclass
class Source:
    """A text's layers and what they are from."""

    name: str
    files: str
    tokens: int
    layers: dict[int, measure.Captured]
    long: bool = False


def sources(options: Options, where: device.Device) -> tuple[list[Source], dict[str, Any]]:
    """Read the texts with the model, or take them from dumps; and what the model is."""
    if options.source is not None:
        dumps = texts.load(options.source, where, options.dtype)
        known = texts.known()
        found = [
            Source(
                name,
                ", ".join(f.name for f in known[name].files) if name in known else str(options.source),
                next(iter(layers.values())).query.shape[0],
                {number: layers[number] for number in options.layers or layers if number in layers},
                name in known and known[name].long,
            )
            for name, layers in dumps.items()
            if not options.text or name in options.text
        ]
        if not found:
            raise UsageError(f"--text {','.join(options.text)}: the dumps are of {', '.join(dumps)}")
        one = next(iter(found[0].layers.values()))
        return found, {"name": "dumps", "dtype": str(one.query.dtype).removeprefix("torch.")}
    found = []
    model: dict[str, Any] = {}
    chosen = wanted(options)
    loaded = models.load(options.model, options.dtype, where)
    for text in chosen:
        print(f"reading {text.name} ...", file=sys.stderr, flush=True)
        loaded = models.stretched(loaded, models.ROPE_STRETCH if text.long else 1.0)
        config = loaded.model.config.get_text_config()
        model = {
            "name": loaded.name,
            "dtype": loaded.dtype,
            "layers": config.num_hidden_layers,
            "q_heads": config.num_attention_heads,
            "kv_heads": getattr(config, "num_key_value_heads", config.num_attention_heads),
        }
        which = texts.chosen_layers(config.num_hidden_layers, options.layers)
        ids = texts.tokens_of(loaded.tokenizer, text)
        captured = texts.capture(loaded, ids, which[-QUICK_LAYERS:] if options.quick else which)
        if options.dump is not None:
            texts.save(options.dump, text.name, captured)
        names = ", ".join(file.name for file in text.files)
        found.append(Source(text.name, names, len(ids), captured, text.long))
    return found, model


def wanted(options: Options) -> list[texts.Text]:
    """The texts that the command line asks for."""
    known = texts.known()
    if options.prompt is not None:
        default = 24000 if options.long else 7600
        return [texts.Text("prompt", (options.prompt,), options.tokens or default, options.long)]
    for name in options.text:
        if name not in known:
            raise UsageError(f"--text {name}: must be one of {', '.join(known)}")
    chosen = [known[name] for name in options.text or (("gpl",) if options.quick else known)]
    tokens = options.tokens or (QUICK_TOKENS if options.quick else None)
    return [dataclasses.replace(text, tokens=tokens) if tokens else text for text in chosen]


def check(options: Options) -> None:
    """Refuse what argparse cannot know."""
    for name, value, low in (("tokens", options.tokens, 256), ("threads", options.threads, 1)):
        if value is not None and value < low:
            raise UsageError(f"--{name} {value}: must be at least {low}")
    for name in options.method:
        if ":" in name:
            parse_policy(name)
        elif name not in lines.names() + lines.labels():
            raise UsageError(f"--method {name}: must be one of {', '.join(lines.names())}, or a line's label")
        elif name == VSPrefill.kind and options.indexer is None:
            raise UsageError(f"--method {name}: needs its weights, --indexer FILE")
    checks.can_read("--indexer", options.indexer)
    checks.can_make(options.out)
    if options.source is not None and not options.source.is_dir():
        raise UsageError(f"--from {options.source}: must be a directory of dumps")
    if options.times_only and (options.source is None or not (options.out / "results.json").is_file()):
        raise UsageError("--times-only: needs --from DIR, and --out of an earlier run")
    if options.source is None:
        checks.can_run(options.model, options.device, options.dtype, options.prompt)


def run(options: Options) -> dict[str, Any]:
    """The whole lab; returns what results.json holds."""
    check(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.times_only:
        return again(options)
    begin, busy, where = time.monotonic(), machine.busy(), device.resolve(options.device, options.dtype)
    found, model = sources(options, where)
    results: dict[str, Any] = {
        "schema": SCHEMA,
        **machine.describe(where.facts()),
        "model": model,
        "settings": {
            "threads": torch.get_num_threads(),
            "forced": FORCED,
            "turns": 1 if options.quick else TURNS[where.kind],
            "quick": options.quick,
            "busy": busy,
            "device": where.kind,
        },
        "texts": [],
    }
    seen = []
    for source in found:
        figures, curves, layers = one_text(source, options)
        results["texts"].append(figures)
        seen.append((figures, curves, layers))
    results["seconds"] = round(time.monotonic() - begin, 1)
    write(options.out, results, seen)
    return results


class Sweeps:
    """Makes curves of lines; a sweep that two of them ask for exists once."""

    def __init__(self, quick: bool) -> None:
        self.quick = quick
        self.known: dict[Any, list[Point]] = {}

    def curves(self, found: Sequence[lines.Line]) -> list[Curve]:
        """Return one curve per line; a policy without values to sweep is one point, its defaults."""
        result = []
        for line in found:
            line = lines.thinned(line, QUICK_POINTS) if self.quick else line
            key = (line.method, line.parameter, tuple(line.fixed.items()), line.values)
            points = self.known.setdefault(key, [Point(value) for value in line.values or (None,)])
            result.append(Curve(line, points))
        return result

    def steps(self) -> int:
        """Masks to be made for a layer."""
        return sum(map(len, self.known.values()))


def refused(options: Options, captured: measure.Captured) -> dict[str, str]:
    """Return methods that no backend here selects for, with the reason; tried on a layer's first tokens."""
    reasons = {}
    query, key = captured.query[:PROBE_TOKENS], captured.key[:PROBE_TOKENS]
    for line in lines.methods(options.method, options.indexer):
        if line.scorer:
            continue
        try:
            policy = line.policy(line.values[0] if line.values else None, FORCED)
            if policy.reads_values:
                continue  # its weights are those of a layer
            mask = select(query.cpu(), key.cpu(), policy)  # what selects anywhere does so here
            if mask.skip and query.is_cuda:
                reasons[line.method] = "masks that skip are for the CPU in the lab"
        except UnsupportedError as error:
            reasons[line.method] = str(error)
    return reasons


def one_text(source: Source, options: Options) -> tuple[dict[str, Any], list[Curve], dict[int, Any]]:
    """All figures of one text, its curves for the page, and the layers' masses."""
    from tqdm import tqdm

    sweeps = Sweeps(options.quick)
    left_out = refused(options, next(iter(source.layers.values())))
    for method, reason in left_out.items():
        print(f"{method} is left out: {reason}", file=sys.stderr, flush=True)
    curves = sweeps.curves(
        [line for line in lines.methods(options.method, options.indexer) if line.method not in left_out]
    )
    by_study = {}
    for name, (title, some) in (lines.studies(options.method) if options.studies else {}).items():
        here = [line for line in some if line.method not in left_out]
        if here:
            by_study[name] = (title, sweeps.curves(here))
    if not curves:
        raise UsageError("nothing is left to look at: " + "; ".join(left_out.values()))
    everyone = curves + [curve for _, some in by_study.values() for curve in some]
    steps = sweeps.steps() * len(source.layers)
    density = reference_density(source.tokens, FORCED["sink_blocks"] + FORCED["window_blocks"])
    masses: dict[int, Any] = {}
    timed: list[dict[str, Any]] = []
    middle = list(source.layers)[len(source.layers) // 2]
    with tqdm(total=steps, unit="mask", desc=source.name, disable=None) as bar:
        last = None
        for number, captured in source.layers.items():
            layer = Layer.of(number, captured)
            masses[number] = layer.mass.cpu()
            look_at(layer, everyone, bar.update)
            if number == middle:
                last = layer
    if last is not None:
        turns = 1 if options.quick else TURNS[last.device.kind]
        timed = times.measure(last, timed_policies(curves, density), turns)
    heads = next(iter(source.layers.values()))
    figures = {
        "name": source.name,
        "files": source.files,
        "tokens": source.tokens,
        "rotary_base_scaled": models.ROPE_STRETCH if source.long else None,
        "layers": list(source.layers),
        "q_heads": heads.query.shape[1],
        "kv_heads": heads.key.shape[1],
        "reference_density": density,
        "left_out": left_out,
        "sdpa": last.sdpa_backend() if last is not None else None,
        "times_layer": middle,
        "times": timed,
        "methods": [figures_of(curve, density) for curve in curves],
        "studies": {
            name: {"title": title, "curves": [figures_of(curve, density) for curve in some]}
            for name, (title, some) in by_study.items()
        },
    }
    return figures, curves, masses


def timed_policies(curves: Sequence[Curve], density: float) -> list[tuple[str, Any]]:
    """Each policy at its value nearest to the density."""
    return [
        (curve.line.label, curve.line.policy(curve.nearest(density).value, FORCED))
        for curve in curves
        if not curve.line.scorer
    ]


def again(options: Options) -> dict[str, Any]:
    """Measure the times of an earlier run again, from its dumps, and rewrite its files."""
    path = options.out / "results.json"
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    assert options.source is not None
    dumps = texts.load(options.source, device.resolve(options.device, options.dtype), options.dtype)
    here = {line.label: line for line in lines.methods((), options.indexer)}
    for text in results["texts"]:
        if text["name"] not in dumps or (options.text and text["name"] not in options.text):
            continue
        layer = Layer.of(text["times_layer"], dumps[text["name"]][text["times_layer"]])
        policies = [
            (curve["label"], here[curve["label"]].policy(curve["value_at_reference"], FORCED))
            for curve in text["methods"]
            if curve["label"] in here and not here[curve["label"]].scorer
        ]
        text["times"] = times.measure(layer, policies, TURNS[layer.device.kind])
        text["times_command"] = machine.describe()["command"]
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for text in results["texts"]:
        print(render_times(text), flush=True)
    return results


HEADER = ("", "density", "recall", "5th\npercentile", "error", "error,\ncorrected")


def render(text: dict[str, Any]) -> str:
    """The table of one text at its reference density."""
    rows = []
    for curve in text["methods"]:
        at, density = shown(curve, text["reference_density"])
        cells = (f"{density:.3f}", f"{at['recall']:.3f}", f"{at['recall_p5']:.2f}", f"{at['error']:.3f}")
        corrected = at["error_corrected"]
        rows.append([curve["label"], *cells, "-" if corrected is None else f"{corrected:.3f}"])
    title = f"{text['name']}: {text['tokens']} tokens, at density {text['reference_density']:g}"
    whole = f"{title}, or the nearest that a method reaches\n{table.render(HEADER, rows)}"
    found = [(c["label"], c["guard_at_reference"]) for c in text["methods"] if c.get("guard_at_reference")]
    lines = [f"{label}: {guard['words']}" for label, guard in found]
    if lines:
        whole += "\n\nwhat a guard says, at the value nearest to it:\n" + "\n".join(lines)
    return whole


def render_times(text: dict[str, Any]) -> str:
    """Milliseconds of one layer by method."""
    digits = table.places(text["times"][0]["seconds"])
    rows = [
        [
            row["label"],
            f"{row['density']:.3f}",
            "-" if row["select_seconds"] is None else f"{row['select_seconds'] * 1e3:.{max(1, digits)}f}",
            "on the CPU" if row["seconds"] is None else f"{row['seconds'] * 1e3:.{digits}f}",
            "-" if row["speedup"] is None else f"{row['speedup']:.2f}x",
        ]
        for row in text["times"]
    ]
    title = f"{text['name']}, layer {text['times_layer']}: milliseconds\n"
    return title + table.render(("", "density", "selection", "with\nattention", "speed-\nup"), rows)


def write(out: Path, results: dict[str, Any], seen: Sequence[tuple[dict[str, Any], Any, Any]]) -> None:
    """All files."""
    from . import draw, page

    out.mkdir(parents=True, exist_ok=True)
    for text in results["texts"]:
        print("\n" + render(text), flush=True)
        print("\n" + render_times(text), flush=True)
    results["files"] = ["results.json", "points.csv", "report.html"]
    for text in results["texts"]:
        results["files"] += draw.all_of(out, text)
    (out / "points.csv").write_text(csv_of(results), encoding="utf-8")
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (out / "report.html").write_text(page.page(results, seen, out), encoding="utf-8")
    print(f"\n{out}/: {', '.join(results['files'])}", flush=True)


CSV = ("text", "tokens", "study", "label", "method", "parameter")


def csv_of(results: dict[str, Any]) -> str:
    """Every point of every curve as a line of CSV."""
    rows = []
    for text in results["texts"]:
        groups = [("methods", text["methods"])]
        groups += [(name, study["curves"]) for name, study in text["studies"].items()]
        for name, curves in groups:
            for curve in curves:
                head = [
                    text["name"],
                    text["tokens"],
                    name,
                    curve["label"],
                    curve["method"],
                    curve["parameter"],
                ]
                rows += [[*head, *point.values()] for point in curve["points"]]
                keys = list(curve["points"][0])
    import csv
    import io

    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*CSV, *keys])
    writer.writerows(rows)
    return file.getvalue()
