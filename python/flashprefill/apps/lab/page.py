"""The lab's report.html: curves, tables, and the mask viewer, in one file that fetches nothing.

What the viewer draws is compressed into the page: masses as 16 bits of their logarithm, masks as bits.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from .. import report, table
from .figures import shown

SCRIPT = Path(__file__).with_name("viewer.js")
LEAST_LOG2 = -24.0  # of a mass; smaller ones are shown as zero

INTRO = """
<p>Attention's true weights were computed for these layers, and every method was asked which blocks of keys
it would keep. <i>Recall</i> is the share of the true softmax mass on the kept blocks, its mean over all tiles
of 128 queries, layers and heads, and what 95 of 100 tiles have at least. <i>Error</i> is |out - dense| /
|dense| by tile, its mean; <i>corrected</i> lets the blocks left out count by their mean key and value.
<i>Density</i> is kept blocks over causal ones. For all methods alike {forced}. The oracle knows the true
masses.</p>
"""

VIEWER = """
<h2>What a method keeps</h2>
<p>Tiles of queries run down, blocks of keys to the right. Colour is the true attention, darker where there is
more of it: <span class="key" style="background:#1f5fae"></span>kept,
<span class="key" style="background:#c62828"></span>lost. What is red was there and was not read.
Point at a block for its numbers.</p>
<div class="card viewer">
<p class="choices"><label>text <select id=text></select></label>
<label>layer <select id=layer></select></label> <label>head <select id=head></select></label>
<label>method <select id=line></select></label>
<span id=sum class=soft></span></p>
<div class="side"><canvas id=mask width=760 height=760></canvas><pre id=tip></pre></div>
</div>
"""

STYLE = """<style>
.viewer{padding:14px 18px}.choices{max-width:none}.choices label{margin-right:14px}
.side{display:flex;gap:16px;flex-wrap:wrap}
canvas{background:#fff;image-rendering:pixelated;width:min(760px,100%);height:auto;cursor:crosshair}
pre{margin:0;font:13px ui-monospace,"DejaVu Sans Mono",monospace;min-width:250px;white-space:pre-wrap}
</style>"""


def packed(array: Any) -> str:
    """An array's bytes, deflated, as text."""
    return base64.b64encode(zlib.compress(np.ascontiguousarray(array).tobytes(), 9)).decode("ascii")


def logarithms(mass: Any) -> Any:
    """Return masses as uint16: 0 below 2^-24, else 1 to 65535 for 2^-24 to 1."""
    with np.errstate(divide="ignore"):
        share = 1.0 - np.log2(np.asarray(mass, dtype=float)) / LEAST_LOG2
    return np.where(share > 0, 1 + np.rint(np.clip(share, 0, 1) * 65534), 0).astype("<u2")


def viewer_data(seen: Sequence[tuple[dict[str, Any], Any, Any]]) -> list[dict[str, Any]]:
    """What viewer.js reads."""
    data = []
    for text, curves, masses in seen:
        some = []
        for curve in curves:
            point = curve.nearest(text["reference_density"])
            value = "" if point.value is None else f", {curve.line.parameter} {point.value:g}"
            some.append(
                {
                    "label": curve.line.label + value,
                    "tile": point.tile_tokens,
                    "group": point.group,
                    "block": point.block_size,
                    "bits": {str(layer): packed(bits) for layer, bits in point.masks.items()},
                }
            )
        data.append(
            {
                "name": text["name"],
                "tokens": text["tokens"],
                "heads": text["q_heads"],
                "block": 128,
                "mass": {str(layer): packed(logarithms(mass)) for layer, mass in masses.items()},
                "lines": some,
            }
        )
    return data


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def quality_table(text: dict[str, Any], curves: Sequence[dict[str, Any]]) -> str:
    """Recall and error at the reference density, or the nearest that a method reaches."""
    heads = ("", "density", "recall", "5th<br>percentile", "error", "error,<br>corrected")
    rows = ["<tr>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>"]
    for curve in curves:
        at, density = shown(curve, text["reference_density"])
        digits = {"recall": 3, "recall_p5": 2, "error": 3, "error_corrected": 3}
        cells = f"<td>{density:.3f}</td>" + "".join(
            f"<td>{_cell(at[name], n)}</td>" for name, n in digits.items()
        )
        policy = curve["policy_at_reference"]
        here = (
            f"<code>{escape(policy)}</code>"
            if policy
            else f"{curve['parameter']} {curve['value_at_reference']:g}"
        )
        near = f"<small>nearest: {here}</small>"
        rows.append(f"<tr><td>{escape(curve['label'])}{near}</td>{cells}</tr>")
    return f'<div class="card"><table>{"".join(rows)}</table></div>'


def times_table(text: dict[str, Any]) -> str:
    """Milliseconds of one layer."""
    heads = ("", "density", "selection,<br>ms", "with attention,<br>ms", "speed-up")
    rows = ["<tr>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>"]
    digits = table.places(text["times"][0]["seconds"])
    for row in text["times"]:
        select = None if row["select_seconds"] is None else row["select_seconds"] * 1e3
        cells = (
            f"{row['density']:.3f}",
            _cell(select, max(1, digits)),
            "on the CPU" if row["seconds"] is None else f"{row['seconds'] * 1e3:.{digits}f}",
            "-" if row["speedup"] is None else f"{row['speedup']:.2f}x",
        )
        rows.append(f"<tr><td>{escape(row['label'])}</td>{''.join(f'<td>{c}</td>' for c in cells)}</tr>")
    return f'<div class="card"><table>{"".join(rows)}</table></div>'


def _one_text(text: dict[str, Any], out: Path) -> list[str]:
    name, layers = text["name"], ", ".join(map(str, text["layers"]))
    scaled = text["rotary_base_scaled"]
    about = f"{escape(text['files'])}; layers {layers}"
    about += f"; rotary base scaled {scaled:g} times" if scaled else ""
    caption = f"Recall and error against density: {escape(name)}"
    parts = [
        f"<h2>{escape(name)}: {text['tokens']:,} tokens, at density {text['reference_density']:g}, "
        "or the nearest that is reached</h2>",
        f"<p class=soft>{about}</p>",
        quality_table(text, text["methods"]),
        report.image(out / f"{name}-curves.png", caption, caption + "."),
        report.image(
            out / f"{name}-density.png",
            "Density by layer and head",
            "Share of the causal blocks kept, by layer (down) and head (right), nearest to this density.",
        ),
        f"<h3>Time of one layer (layer {text['times_layer']})</h3>",
        times_table(text),
    ]
    for study, content in text["studies"].items():
        title = escape(content["title"])
        parts += [f"<h3>{title}</h3>", quality_table(text, content["curves"])]
        parts.append(report.image(out / f"{name}-{study}.png", title, title + "."))
    return parts


def page(results: dict[str, Any], seen: Sequence[tuple[dict[str, Any], Any, Any]], out: Path) -> str:
    """Return the whole page; the pictures are read from `out`."""
    forced = results["settings"]["forced"]
    kept = (
        f"the first {forced['sink_blocks']} and the last {forced['window_blocks']} visible blocks are always"
        f" kept, and {forced['dense_tail_blocks'] or 'no'} last tiles are dense"
    )
    data = json.dumps(viewer_data(seen), separators=(",", ":"))
    model = results["model"]
    body = [STYLE, INTRO.format(forced=kept), VIEWER]
    for text in results["texts"]:
        body += _one_text(text, out)
    facts = {**report.where_it_ran(results), "Model": escape(f"{model['name']}, {model['dtype']}")}
    body.append("<h2>How it was measured</h2>" + report.definitions({**facts, **report.how_it_ran(results)}))
    if results["settings"]["busy"]:
        body.append(f"<p class=no>Careful: {escape(results['settings']['busy'])}.</p>")
    body.append("<p class=soft>All figures are in results.json and points.csv next to this page.</p>")
    body.append(f'<script type="application/json" id=data>{data}</script>')
    body.append(f"<script>{SCRIPT.read_text(encoding='utf-8')}</script>")
    return report.document(
        "What the selections keep",
        f"{model['name']}, {len(results['texts'])} text{'s' * (len(results['texts']) != 1)}",
        "\n".join(body),
    )
