"""Writes docs/quality.md from bench/results/lab-*.json, which `flashprefill lab` and the prototypes made.

    .venv/bin/python tools/quality.py                                  write the page
    .venv/bin/python tools/quality.py out/lab/results.json short       take a run into bench/results first
    .venv/bin/python tools/quality.py out/eval/results.json h200       so with one of `flashprefill eval`

Nothing is typed by hand there: to change a figure, measure again.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import quality_eval
import quality_layers
import quality_summary

from flashprefill.apps import table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
HEAD = """# How good the selections are

![Attention held over density, by method](images/quality.png)

{summary}

## How it is measured

Made by `tools/quality.py` from `bench/results/lab-*.json` and the files named below; each file
holds the machine, versions, command and date of its run. The chart is made by `tools/charts.py`
from `lab-long.json`.

    flashprefill lab                               # all of it, on a GPU if there is one
    flashprefill lab --text long --device cuda     # the tables at 24K tokens: a minute on an H200
    flashprefill lab --text gpl --device cpu       # those of a CPU: 5 minutes on two cores without AVX-512
    flashprefill lab --text long --device cpu      # 30 minutes there
    flashprefill lab --quick                       # does it run?

out/lab/report.html has curves, density maps and the mask viewer. `tools/quality.py
out/lab/results.json long` takes a run into this page.

A model reads real texts. For the queries, keys and values of six of its layers (all heads), every
method is asked which blocks it would keep, over a sweep of its main parameter:

| | |
|---|---|
| density | kept blocks over causal blocks, all layers and heads |
| recall | share of the true softmax mass on the kept blocks, by tile of 128 queries: mean (5th percentile) |
| error | norm of out - dense over that of dense, by tile, mean: without (with) `mean_correction` |

Figures at one density lie between the two points of the sweep around it, linear in the logarithm of
the density: within 0.0007 of the recall of masks made for exactly that density (root mean square
over 18). "-" is a density that the sweep does not reach. Forced blocks are the same for all: 1
sink, 2 window, no dense tail. FlashPrefill's defaults (2, 4 and a tail of 2) keep a quarter of the
causal blocks at 7.6K tokens whatever the scores say, and would hide the differences between
selectors. *Oracle* knows the true masses. *Bounds* is a scorer of the lab's own, a box around a
block's keys in the manner of Quest.

Each section names the machine that made it. On a GPU the model and its attention are bf16 and the
masks are the CUDA kernels', except for the methods that select on the CPU only: their masks are
made there, from the same queries and keys, and judged on the GPU like the others. Times on a GPU
are events around a call that finds the GPU busy and its cache empty.
"""
SUMMARY = """At a density of 0.15, on 24,355 tokens of licences read by SmolLM2-135M (the chart):

- **Sketch** comes nearest to the oracle. With `gain` and `query_metric` it holds {gain} of the true
  attention on average, {gain_p5} in the 5th percentile of tiles; its default {mass} and {mass_p5}.
  Blocks chosen by their true masses (the *oracle*) hold {oracle} and {oracle_p5}.
- **FlashPrefill** holds {v1} and {v1_p5}, with queries pooled by 16 {pooled} and {pooled_p5}:
  pooling queries costs nothing, pooling keys costs the worst tiles.
- **RRAttention** ({rr}, {rr_p5}) and **XAttention** ({x}, {x_p5}) are between the two in the worst
  tiles.
- **FlexPrefill** ({flex}, {flex_p5}) and **MInference** ({mi}, {mi_p5}) decide for a head as a
  whole, and need more blocks for the same recall. **Streaming** ({streaming}, {streaming_p5}) is
  the floor.
- **The mean correction** lowers the output error: FlashPrefill's from {v1_error} to {v1_corrected},
  Sketch's from {mass_error} to {mass_corrected}.
- **Predictions** at 7,600 tokens, defaults, bf16: the same most likely token as dense attention at
  {flash_top1} of 512 positions with FlashPrefill, {sketch_top1} with Sketch
  ([below](#predictions-and-a-models-time-on-a-gpu)).
- **Hidden facts**: of the {dense_found} that dense attention finds between 4K and 24K tokens,
  FlashPrefill's defaults find {flash_found}, Sketch's {sketch_found}
  ([below](#needles-and-a-models-time-on-a-gpu)).

This is one small model. Take the order as a lead, and run the lab on yours."""
SHORT = ("0.15", "0.2", "0.25", "0.3")
LONG = ("0.05", "0.1", "0.15", "0.2", "0.25")
# A file, the densities that are shown of it, and whether its studies are.
SHOWN = {
    "short": (SHORT, True),
    "short-h200": (SHORT, False),
    "long": (LONG, True),
    "long-cpu": (LONG, False),
}


def summary() -> str:
    """The ten lines above the tables."""
    text = json.loads((RESULTS / "lab-long.json").read_text(encoding="utf-8"))["texts"][0]
    at = {curve["label"]: curve["at"]["0.15"] for curve in text["methods"]}
    names = {
        "gain": "Sketch, gain, query metric, pool 64",
        "mass": "Sketch, mass",
        "oracle": "Oracle, share",
        "v1": "FlashPrefill (V1)",
        "pooled": "FlashPrefill, query_pool=16",
        "rr": "RRAttention, stride 8",
        "x": "XAttention, stride 16",
        "flex": "FlexPrefill",
        "mi": "MInference, vertical-slash",
        "streaming": "Streaming",
    }
    figures = {}
    for key, label in names.items():
        figures[key], figures[f"{key}_p5"] = f"{at[label]['recall']:.3f}", f"{at[label]['recall_p5']:.2f}"
        figures[f"{key}_error"] = f"{at[label]['error']:.3f}"
        figures[f"{key}_corrected"] = f"{at[label]['error_corrected']:.3f}"
    demo = json.loads((RESULTS / "demo-h200.json").read_text(encoding="utf-8"))["runs"]
    top1 = {run["label"]: f"{run['top1_agreement']:.0%}".replace("%", " %") for run in demo}
    figures["flash_top1"], figures["sketch_top1"] = top1["FlashPrefill, published"], top1["Sketch"]
    cases = json.loads((RESULTS / "try-h200.json").read_text(encoding="utf-8"))["cases"]
    found = {(case["method"].lower(), case["tokens"], case["depth"]) for case in cases if case["found"]}
    sure = {(tokens, depth) for method, tokens, depth in found if method == "dense attention"}
    figures["dense_found"] = str(len(sure))
    for key, method in (("flash", "flashprefill(alpha=0.12)"), ("sketch", "sketch(mass=0.95)")):
        figures[f"{key}_found"] = str(sum((method, *place) in found for place in sure))
    return SUMMARY.format(**figures)


def take(path: Path, name: str) -> None:
    """Keep what the page needs of a run: not the density of every head."""
    results = json.loads(path.read_text(encoding="utf-8"))
    if results["schema"] == quality_eval.run.SCHEMA:
        kept = json.dumps(quality_eval.slim(results), separators=(",", ":"))
        (RESULTS / f"{quality_eval.PREFIX}{name}.json").write_text(kept + "\n", encoding="utf-8")
        return
    for text in results["texts"]:
        for curve in text["methods"] + [c for study in text["studies"].values() for c in study["curves"]]:
            del curve["density_by_layer_and_head"]
    lines = json.dumps(results, indent=1)
    (RESULTS / f"lab-{name}.json").write_text(lines + "\n", encoding="utf-8")


def ran(results: dict[str, Any]) -> str:
    """Machine, date and command of a file."""
    machine, threads = results["machine"], results.get("settings", {}).get("threads")
    on = f"{machine['cpu']}, {threads} threads" if threads else machine["cpu"]
    if "gpu" in machine:
        gpu = machine["gpu"]
        on = f"{gpu['name']} (CUDA {gpu['cuda']}, driver {gpu['driver']}, {gpu['clock_mhz']} MHz) with {on}"
    seconds = results.get("seconds", 0.0)
    took = (
        f", {seconds / 60:.0f} minutes" if seconds >= 120 else f", {seconds:.0f} seconds" if seconds else ""
    )
    busy = results.get("settings", {}).get("busy")
    return f"{on}; {results['date']}{took}; `{results['command']}`" + (f" ({busy})" if busy else "") + "\n"


def row(cells: list[str]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def header(cells: list[str]) -> list[str]:
    """The first two lines of one."""
    return [row(cells), "|" + "---|" * len(cells)]


def cell(at: dict[str, float] | None) -> str:
    """Recall and error at a density."""
    if at is None:
        return "-"
    corrected = "-" if at["error_corrected"] is None else f"{at['error_corrected']:.3f}"
    return f"{at['recall']:.3f} ({at['recall_p5']:.2f}); {at['error']:.3f} ({corrected})"


def curves_table(found: list[dict[str, Any]], densities: tuple[str, ...]) -> list[str]:
    """Curves down, densities to the right."""
    heads = ["recall (5th percentile); error (corrected)", *(f"density {d}" for d in densities)]
    return header(heads) + [row([c["label"], *(cell(c["at"][d]) for d in densities)]) for c in found] + [""]


def times_table(text: dict[str, Any]) -> list[str]:
    """Milliseconds of one layer by method."""
    lines = header(["", "density", "selection, ms", "selection and attention, ms", "speed-up over SDPA"])
    digits = table.places(text["times"][0]["seconds"])
    for one in text["times"]:
        select = "" if one["select_seconds"] is None else f"{one['select_seconds'] * 1e3:.{max(1, digits)}f}"
        elsewhere = one["seconds"] is None
        cells = [
            one["label"],
            f"{one['density']:.3f}",
            select + " on the CPU" * elsewhere,
            "" if elsewhere else f"{one['seconds'] * 1e3:.{digits}f}",
            "" if elsewhere else f"{one['speedup']:.2f}",
        ]
        lines.append(row(cells))
    return [*lines, ""]


def one_text(text: dict[str, Any], name: str) -> list[str]:
    """All tables of a text of a file."""
    densities, with_studies = SHOWN[name]
    scaled = text["rotary_base_scaled"]
    about = f"{text['files']}; layers {', '.join(map(str, text['layers']))}"
    about += f"; rotary base scaled {scaled:g} times" if scaled else ""
    picked = f", on a GPU (SDPA picks {text['sdpa']})" if text.get("sdpa") else ", on a CPU"
    lines = [f"\n## {text['name']}: {text['tokens']:,} tokens{picked}\n", about + "\n"]
    lines += curves_table(text["methods"], densities)
    lines += [f"Time of layer {text['times_layer']}, each method at the value nearest to density "
              f"{text['reference_density']:g}; selections and attention by turns, medians:\n"]  # fmt: skip
    lines += times_table(text)
    for study in text["studies"].values() if with_studies else ():
        lines += [f"### {study['title']}\n", *curves_table(study["curves"], densities)]
        if len(study["curves"]) == 1:
            (curve,) = study["curves"]
            keys = ("density", "recall", "recall_p5", "error", "error_corrected")
            lines += header([curve["parameter"], "density", "recall", "5th percentile", "error", "corrected"])
            lines += [
                row([f"{p['value']:g}", *(f"{p[key]:.3f}" for key in keys)]) for p in curve["points"]
            ] + [""]
    return lines


VERDICT = {
    "Sketch, mass": "the default",
    "kept": "**built**",
    "bound": "a bound",
    "oracle": "a bound",
}
ORDER = """
## The order of the methods

Recall at equal density on the long text (SmolLM2-135M, {tokens} tokens of licences, rotary base
scaled four times), each method at exactly that density by prototypes in fp32; and the lab's figures
at density 0.15 from its run above. The study that Sketch came from found the same order: oracle,
Sketch, pooled V1 equal to V1, bounds.
"""
COMPARED = {
    "oracle, alpha": "Oracle, alpha",
    "Sketch, mass": "Sketch, mass",
    "Sketch, alpha": "Sketch, alpha",
    "FlashPrefill, query_pool=16": "FlashPrefill, query_pool=16",
    "FlashPrefill (V1)": "FlashPrefill (V1)",
    "Bounds (Quest-like), rows by 16": "Bounds (Quest-like)",
}
NEEDLES = """
## Needles, and a model's time on a GPU

Prompts of real text with a sentence hidden 10 %, 50 % or 90 % into them, by `flashprefill try`.
Times are medians over the three; the policies have their defaults. The model was made for 8K
tokens. Past that its rotary base is scaled by the next power of two: it finds sentences near the
end up to 24K, and nothing from 32K on, with dense attention or without, so from there on only the
times mean something.
"""
DEMOS = """
## Predictions, and a model's time on a GPU

The last 512 positions of one prompt, by `flashprefill demo`, medians of three turns. Attention is
the time between two events around each layer's call; selection was also timed alone. 135M
parameters and 7,600 tokens are too little for an H200: its queue is empty and it waits for the
host, so the times there compare how many lines of Python a layer takes (the host was busy launching
for 100 % of the time to the first token in a later run, and `flashprefill demo` says so). At 24,000
tokens dense attention keeps the GPU busy.
"""
MADE = """
## Methods that need something made for the model

VSPrefill's weights and Reuse's plans come from commands of their own, so these two are not in the
tables above; the rows here are from short runs on two busy cores, and lead to their pages
([vsprefill](methods/vsprefill.md), [reuse](methods/reuse.md)).

`flashprefill train-indexer --tokens 3072 --sequences 10 --steps 300 --hidden 128 --pool 10
--layers 2,7,13,19,25,29 --dtype fp32`, judged on 7,600 tokens of `argparse.py`, which it has not seen, by
the lab's code (`flashprefill lab --text code --method vsprefill --method minference --method
streaming --indexer indexer.safetensors`):

| 7,600 tokens, fp32, all 54 heads of six layers | density | attention held, mean | 5th percentile |
|---|---|---|---|
| Streaming, 5 and 6 window blocks | 0.189, 0.218 | 0.866, 0.880 | 0.43, 0.47 |
| MInference in blocks, 100 verticals, 100 and 250 slashes | 0.161, 0.369 | 0.874, 0.957 | 0.54, 0.83 |
| MInference in tokens, 400 verticals, 150 slashes | 0.147 | 0.912 | 0.70 |
| VSPrefill in tokens, masses 0.5 and 0.01 | 0.196 | 0.907 | 0.65 |
| VSPrefill in tokens, masses 0.6 and 0.01 | 0.243 | 0.923 | 0.71 |
| the same, trained on an H200 for all layers, at one density | 0.200 | 0.888 | 0.59 |
| MInference in blocks, in tokens, at the same | 0.200 | 0.905, 0.928 | 0.66, 0.75 |

`flashprefill plan-reuse --tokens 3072 --sequences 1 --dtype fp32 --policy ...`, a third of the layers
borrow, all heads of all layers of 3,072 tokens of the same text:

| | density | attention held, mean | selection, s |
|---|---|---|---|
| Sketch, gain 0.004, query metric, pool 64 | 0.439 | 0.9680 | 2.30 |
| the same, 10 of 30 layers borrow | 0.416 | 0.9591 | 1.41 |
| Sketch, gain 0.006 | 0.411 | 0.9606 | 2.03 |
"""
SKETCH = """
## Making Sketch better

One change at a time, by prototypes in torch (`bench/lab/sketch_prototypes.py`, which takes a folder
of `flashprefill lab --dump`). Each keeps exactly the blocks of highest worth up to the density.
*Units* are products of a pooled query row with a vector, per tile and block: V1 takes 128. Rows
with a ring come from the scripts that this bench was made of, over the same Q, K and V and with the
same kernel; where both ran they agree to 0.001 (5th percentile: 0.003), and the bench measures all
rows again. *The policy itself* is the library's own select and attend on the CPU, at densities of
0.1499 to 0.1502, forced blocks as above.
"""
SKETCH_END = """
Conclusions:
- **The metric** is most of it. A key far from its block's mean matters if a query can tell;
  distances weighed by the squares of the queries find those keys, and one row of queries per tile
  is sample enough. Built as `query_metric`. The queries' whole covariance is hardly better; the
  block's own principal direction or variance, or the distance from zero, are much worse.
- **Rows can be pooled by 64 or 128**, not only 16: with all keys given exactly, one or two mean
  rows per tile select as well as eight. So the arithmetic is better spent on keys, and an eighth of
  V1's is enough; more than six to ten outliers add little.
- **How to keep.** A threshold on shares keeps the most mass on average, mass serves the worst tiles
  best. share * rest^g goes from one to the other; g = 1/2 is built as `gain`. Normalising rows
  first, or estimating the diagonal block so that local heads get less, is not worth its cost:
  recall hardly moves, or output error rises.
- **Descriptions.** Consecutive means, centroids and principal directions do not beat outliers;
  leaving the variance out is worse.
"""


def both_machines(short: dict[str, Any], others: list[dict[str, Any]]) -> list[str]:
    """How far the two machines are apart on the same text, at the values that both swept."""
    there = next(text for text in others if text["name"] == short["name"])
    known = {
        (curve["label"], point["value"]): point for curve in there["methods"] for point in curve["points"]
    }
    pairs = [
        (point, known[curve["label"], point["value"]])
        for curve in short["methods"]
        for point in curve["points"]
        if (curve["label"], point["value"]) in known
    ]
    most = {key: max(abs(a[key] - b[key]) for a, b in pairs) for key in ("density", "recall", "error")}
    return [
        f"On {short['name']} both machines swept the same {len(pairs)} values. There fp32 on the CPU and "
        f"bf16 on the GPU differ by at most {most['density']:.4f} in density, {most['recall']:.4f} in recall "
        f"and {most['error']:.4f} in error, the model's own rounding included.\n"
    ]


def order(results: dict[str, Any], long: dict[str, Any] | None) -> list[str]:
    """Recall of the methods that the study compared."""
    here = {} if long is None else {curve["label"]: curve["at"]["0.15"] for curve in long["methods"]}
    densities = results["order"][0]["densities"]
    lines = [ORDER.format(tokens=f"{results['tokens']['long']:,}")]
    heads = [f"density {density:.2f}" for density in densities]
    lines += header(["recall, mean (5th percentile)", "units", *heads, "the lab at 0.15"])
    for one in results["order"]:
        pairs = zip(one["recall"], one["recall_p5"], strict=True)
        cells = (f"{mean:.3f} ({low:.2f})" for mean, low in pairs)
        at = here.get(COMPARED[one["name"]])
        lab = "" if at is None else f"{at['recall']:.3f} ({at['recall_p5']:.2f})"
        lines.append(row([one["name"], str(one["units"] or ""), *cells, lab]))
    return lines


def sketch(results: dict[str, Any]) -> list[str]:
    """What was tried, in groups, a table for each text."""
    lines = [SKETCH, ran(results)]
    for text in dict.fromkeys(one["text"] for one in results["rows"]):
        rows = [one for one in results["rows"] if one["text"] == text]
        about = f"{text}, {results['tokens'][text]:,} tokens, density {rows[0]['density']:g}"
        lines += header([about, "", "units", "recall", "5th percentile", "error", "corrected", ""])
        last = None
        for one in rows:
            group = one["group"] if one["group"] != last else ""
            last = one["group"]
            digits = (("recall", 3), ("recall_p5", 2), ("error", 3), ("error_corrected", 4))
            figures = ["" if one[key] is None else f"{one[key]:.{n}f}" for key, n in digits]
            name = one["name"] + (" °" if one.get("by") == "earlier form" else "")
            verdict = VERDICT.get(one["name"], VERDICT.get(one["group"], ""))
            lines.append(row([group, name, str(one["units"] or ""), *figures, verdict]))
        lines.append("")
    return [*lines, SKETCH_END]


def needles(results: dict[str, Any]) -> list[str]:
    """Times and needles of `flashprefill try`, a line for each length and method."""
    lines = [NEEDLES, f"{results['model']['name']}, {results['model']['dtype']}; " + ran(results)]
    heads = ("tokens", "rotary base", "", "density", "first token, ms", "attention, ms", "needles found")
    lines += header([*heads, "of those that dense finds"])
    cases = results["cases"]
    dense = next(case["method"] for case in cases if case["density"] == 1.0)
    for tokens in dict.fromkeys(case["tokens"] for case in cases):
        here = [case for case in cases if case["tokens"] == tokens]
        base = [case for case in here if case["method"] == dense]
        sure = {case["depth"] for case in base if case["found"]}
        for method in dict.fromkeys(case["method"] for case in here):
            some = [case for case in here if case["method"] == method]
            whole, own = (
                [statistics.median(case[key] for case in group) for group in (base, some)]
                for key in ("ttft_seconds", "attention_seconds")
            )
            cells = [f"{tokens:,}", f"x {some[0]['rotary_scale']:g}"] if method == dense else ["", ""]
            cells += [method, f"{statistics.mean(case['density'] for case in some):.3f}"]
            for before, now in (whole, own):
                faster = "" if method == dense else f" ({before / now:.1f}x)"
                cells.append(f"{now * 1e3:.1f}{faster}")
            cells.append(f"{sum(case['found'] for case in some)} of {len(some)}")
            kept = sum(case["found"] for case in some if case["depth"] in sure)
            cells.append("" if method == dense or not sure else f"{kept} of {len(sure)}")
            lines.append(row(cells))
    return [*lines, "", results["verdict"] + ".", ""]


def demos(found: list[dict[str, Any]]) -> list[str]:
    """Tables of `flashprefill demo`."""
    lines = [DEMOS]
    for results in found:
        model, prompt, settings = results["model"], results["prompt"], results["settings"]
        scaled = ", rotary base scaled 4 times" if settings["long"] else ""
        lines.append(
            f"{model['name']}, {model['dtype']}, {prompt['tokens']:,} tokens of {prompt['source']}{scaled}; "
            + ran(results)
        )
        heads = ("", "first token, ms", "attention, ms", "selection alone, ms", "density", "KL to dense")
        lines += header([*heads, "same top-1", "needles found"])
        for run in results["runs"]:
            first, inside, selecting = (
                f"{run[key]['median'] * 1e3:.1f}"
                for key in ("ttft_seconds", "attention_seconds", "select_seconds")
            )
            sparse = run["policy"] is not None
            cells = [
                run["label"],
                first + (f" ({run['ttft_speedup']:.2f}x)" if sparse else ""),
                inside + (f" ({run['attention_speedup']:.2f}x)" if sparse else ""),
                selecting if sparse else "",
                f"{run['density']:.3f}",
                f"{run['kl_nats']:.4f}" if sparse else "",
                f"{run['top1_agreement']:.1%}" if sparse else "",
                f"{sum(needle['found'] for needle in run['needles'])} of {len(run['needles'])}",
            ]
            lines.append(row(cells))
        lines.append("")
    return lines


def keys(results: dict[str, Any]) -> list[str]:
    """What bench/lab/keys_and_skipping.py found."""
    dense = next(one for one in results["rows"] if one["policy"] == "dense")
    lines = [
        f"## Single keys, and skipping: {results['text']}, {results['tokens']:,} tokens, on a CPU\n",
        f"Layers {', '.join(map(str, results['layers']))}. Here each policy has its own forced blocks."
        "\nDensity is of keys that attention uses, without what [Dense](methods/dense.md) skips. Times are"
        "\nCPU seconds of one thread, all layers.\n",
        *header(
            [
                "policy",
                "density",
                "recall (5th percentile)",
                "error",
                "selection, s",
                "attention, s",
                "of dense",
            ]
        ),
    ]
    for one in results["rows"]:
        share = (one["select_seconds"] + one["attend_seconds"]) / dense["attend_seconds"]
        lines.append(
            row(
                [
                    f"`{one['policy']}`",
                    f"{one['density']:.3f}",
                    f"{one['recall']:.3f} ({one['recall_p5']:.2f})",
                    f"{one['error']:.3f}",
                    f"{one['select_seconds']:.2f}",
                    f"{one['attend_seconds']:.2f}",
                    f"{share:.2f}",
                ]
            )
        )
    return [*lines, "", f"*{ran(results).strip()}*\n"]


def main() -> None:
    """Read all results, write the page."""
    if len(sys.argv) == 3:
        take(Path(sys.argv[1]), sys.argv[2])
    lines = [HEAD.format(summary=summary())]
    runs = {}
    for name in SHOWN:
        path = RESULTS / f"lab-{name}.json"
        if not path.exists():
            continue
        results = runs[name] = json.loads(path.read_text(encoding="utf-8"))
        for text in results["texts"]:
            lines += one_text(text, name)
        lines.append(f"*{results['model']['name']}, {results['model']['dtype']}; {ran(results).strip()}*\n")
    if {"short", "short-h200"} <= set(runs):
        lines += both_machines(runs["short"]["texts"][0], runs["short-h200"]["texts"])
    path = RESULTS / "lab-keys.json"
    if path.exists():
        lines += keys(json.loads(path.read_text(encoding="utf-8")))
    path = RESULTS / "lab-layers.json"
    if path.exists():
        lines += quality_layers.section(json.loads(path.read_text(encoding="utf-8")), ran)
    path = RESULTS / "try-h200.json"
    if path.exists():
        lines += needles(json.loads(path.read_text(encoding="utf-8")))
    files = [RESULTS / f"demo-{name}h200.json" for name in ("", "long-", "gather-")]
    found = [json.loads(path.read_text(encoding="utf-8")) for path in files if path.exists()]
    lines += demos(found) if found else []
    evaluated = sorted(RESULTS.glob(f"{quality_eval.PREFIX}*.json"), key=lambda path: path.stem)
    if evaluated:
        lines += quality_eval.section(
            [json.loads(path.read_text(encoding="utf-8")) for path in evaluated], ran
        )
    found = [
        json.loads(p.read_text(encoding="utf-8")) for p in sorted(RESULTS.glob("lab-summary-keys*.json"))
    ]
    lines += quality_summary.section(found, ran) if found else []
    lines.append(MADE)
    path = RESULTS / "lab-prototypes.json"
    if path.exists():
        results = json.loads(path.read_text(encoding="utf-8"))
        long = runs["long"]["texts"][0] if "long" in runs else None
        lines += (order(results, long) if "order" in results else []) + sketch(results)
    page = "\n".join(lines).rstrip() + "\n"
    (ROOT / "docs" / "quality.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
