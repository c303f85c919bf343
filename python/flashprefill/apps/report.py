"""report.html: the demo's figures and pictures as one page that needs nothing else.

Pictures are inlined, there is no script and nothing is fetched, so the page can be mailed or kept. It
follows the reader's light or dark setting. Every sentence with a figure in it is made from results.json's
fields.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from . import factors, machine, table

STYLE = Path(__file__).with_name("report.css")


def image(path: Path, alt: str, caption: str) -> str:
    """A picture of the run, inlined, with its caption."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    picture = f'<img alt="{escape(alt, quote=True)}" src="data:image/png;base64,{data}">'
    return f'<figure><div class="card">{picture}</div><figcaption>{caption}</figcaption></figure>'


def _range(values: dict[str, Any]) -> str:
    if len(values["all"]) == 1:
        return table.seconds(values["median"])
    least, most = (table.seconds(values[name]) for name in ("min", "max"))
    return f"{table.seconds(values['median'])}<small>{least} - {most}</small>"


def _found(needles: Sequence[dict[str, Any]]) -> str:
    known = [n["found"] for n in needles if n["found"] is not None]
    if not known:
        return "-"
    kind = "yes" if all(known) else "no"
    text = ("yes" if known[0] else "no") if len(known) == 1 else f"{sum(known)} of {len(known)}"
    return f'<span class="{kind}">{text}</span>'


def _table(runs: Sequence[dict[str, Any]]) -> str:
    heads = "|first token,<br>seconds|speed-up|in attention,<br>seconds|speed-up|over our<br>dense"
    heads += "|selection,<br>seconds"
    heads += "|blocks<br>kept|KL from<br>dense, nats|same<br>top token|needle<br>found"
    lines = ["<tr>" + "".join(f"<th>{head}</th>" for head in heads.split("|")) + "</tr>"]
    for run in runs:
        dense = run["policy"] is None
        about = "the baseline" if dense else f"<code>{escape(run['policy'])}</code>"
        speed, over_ours = (
            f"{run[key]:.2f}x" if run[key] else "-"
            for key in ("attention_speedup", "attention_speedup_over_our_dense")
        )
        cells = [
            f"{escape(run['label'])}<small>{about}</small>",
            _range(run["ttft_seconds"]),
            f"{run['ttft_speedup']:.2f}x",
            _range(run["attention_seconds"]),
            speed if dense else f'<span class="fast">{speed}</span>',
            over_ours,
            "-" if run["policy"] in factors.DENSE else table.seconds(run["select_seconds"]["median"]),
            f"{run['density']:.1%}",
            "-" if run["kl_nats"] is None else f"{run['kl_nats']:.4f}",
            "-" if run["top1_agreement"] is None else f"{run['top1_agreement']:.1%}",
            _found(run["needles"]),
        ]
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f'<div class="card"><table>{"".join(lines)}</table></div>'


def _kept_unseen(run: dict[str, Any]) -> str:
    share = run.get("always_kept")
    return "" if share is None else f"; {share:.0%} were kept whatever their scores"


def _tiles(runs: Sequence[dict[str, Any]]) -> str:
    dense, best = runs[0], factors.fastest(runs)
    if best is None:
        return ""
    ours, others = factors.our_dense(runs), [run for run in runs if run["policy"] not in factors.DENSE]
    whole, _, split = factors.product(
        best["attention_speedup"] or 0.0, ours["attention_speedup"] or 1.0
    ).partition(" ")
    first, _, halves = factors.product(best["ttft_speedup"], ours["ttft_speedup"]).partition(" ")
    tiles = [
        (
            whole,
            f"{split}: attention with {escape(best['label'])} against PyTorch's dense, selection included",
        ),
        (first, f"{halves}: sooner to the first token, the rest of the model included"),
        (
            f"{1 - best['density']:.0%}",
            f"of the visible blocks of keys were never read{_kept_unseen(best)}",
        ),
    ]
    if best["top1_agreement"] is not None:
        tiles.append(
            (f"{best['top1_agreement']:.1%}", "of positions predict the same next token as dense attention")
        )
    hidden = [n["found"] for n in dense["needles"] if n["found"] is not None]
    if hidden:
        found = [sum(bool(n["found"]) for n in run["needles"]) for run in others]
        every = sum(count == len(hidden) for count in found)
        needles = "the needle" if len(hidden) == 1 else f"all {len(hidden)} needles"
        words = f"policies found {needles} (dense: {sum(hidden)} of {len(hidden)})"
        tiles.append((f"{every} of {len(others)}", words))
    return (
        '<div class="tiles">'
        + "".join(f"<div class=tile><b>{a}</b><span>{b}</span></div>" for a, b in tiles)
        + "</div>"
    )


def _answers(results: dict[str, Any]) -> str:
    asked = results["prompt"]
    lines = ["<h2>What the model said</h2>"]
    if asked["needle"]:
        depths = ", ".join(f"{depth:.0%}" for depth in asked["depths"])
        lines += [
            f"<p>One sentence that does not belong there was hidden {depths} of the way into the text:</p>",
            f"<blockquote>{escape(asked['needle'])}</blockquote>",
            f"<p>The prompt ends with: {escape(asked['question'])} A method has found the needle if what",
            f" the model writes contains <b>{escape(asked['answer'])}</b>. The probability of the least sure",
            " token tells a model that knows from one that guesses.</p>",
        ]
    else:
        lines.append("<p>The most likely continuation of the prompt:</p>")
    rows = ["<tr><th></th><th>depth</th><th>least sure<br>token</th><th class=words>continuation</th></tr>"]
    for run in results["runs"]:
        for needle in run["needles"]:
            kind = {True: "yes", False: "no", None: ""}[needle["found"]]
            depth = "-" if needle["depth"] is None else f"{needle['depth']:g}"
            words = f'<span class="{kind}">{escape(needle["continuation"]) or "(nothing)"}</span>'
            rows.append(
                f"<tr><td>{escape(run['label'])}</td><td>{depth}</td>"
                f"<td>{needle['least_sure_token']:.2f}</td><td class=words>{words}</td></tr>"
            )
    lines.append(f'<div class="card"><table>{"".join(rows)}</table></div>')
    return "".join(lines)


SKIPPED = """
<h2>What was skipped</h2>
<p>Attention lets every token look back at every earlier one, so its cost grows with the square of the
prompt. But most heads give nearly all their weight to a few places. The prompt is cut into blocks of 128
keys; for each head and each tile of queries a quick look at summaries of the blocks tells which of them
matter, and exact attention is computed over just those. Query positions run down, key positions to the
right; the future (the white triangle) is never visible.</p>
"""

MASKS = """
Left: where the dense model's attention really is, darker where there is more of it. Then
what was kept of it: <span class="key"
style="background:#3b6fb6"></span>always, whatever the scores say: the beginning, the neighbourhood, and
everything for the prompt's last tokens; <span class="key" style="background:#f08a24"></span>chosen by
score; <span class="key" style="background:#e4e7ec"></span>skipped, never read. The last row is the head,
of those that were looked at, whose selection loses the most attention.
"""

DENSITY = """
Share of the visible blocks that was kept, by layer (down) and head (right). Bright heads need little beyond
what is always kept; dark ones look everywhere. Under a shared mask the heads of a group keep the same.
"""

TIMES = "Everything but attention is the same work for all; where that part differs, the machine was shared."

MEASURED = """
<p>The methods took turns on the same prompt after a short warm-up; times are {turns}. <i>First token</i>
is the whole model reading the prompt. <i>In attention</i> is the time inside the attention function,
taken by the same hook for all, selection included{selecting}. <i>Over our dense</i> is what leaving blocks
out gains: attention's time against that of our own kernel with every block kept; the rest of a speed-up is
that kernel's over PyTorch's. <i>KL</i> and <i>same top token</i> compare the
predictions at the last {positions} positions with those of dense attention. <i>Blocks kept</i> is out of
those that a query may see.</p>
"""

ON_GPU = """, between two events on the GPU: where the model is small or the prompt short, what it waits for
there is Python. Selection is timed alone, over the layers that are drawn"""


def _heads(results: dict[str, Any]) -> str:
    items = []
    for head in results["heads"]:
        parts = [
            f"{escape(name)} keeps {mask['density']:.0%} of blocks and {mask['recall']:.1%} of attention"
            for name, mask in head["masks"].items()
        ]
        items.append(
            f"<li>Layer {head['layer']}, head {head['head']} {head['kind']}: {'; '.join(parts)}.</li>"
        )
    return f"<ul>{''.join(items)}</ul>"


def _skipped(results: dict[str, Any], out: Path) -> str:
    parts = [SKIPPED]
    if "masks.png" in results["files"]:
        parts += [image(out / "masks.png", "Masks of heads that differ in kind", MASKS), _heads(results)]
    if "density.png" in results["files"]:
        parts += [
            "<h2>How much each head keeps</h2>",
            image(out / "density.png", "Density by layer and head", DENSITY),
        ]
    return "".join(parts)


def _facts(results: dict[str, Any]) -> str:
    model, settings = results["model"], results["settings"]
    size = f"{model['layers']} layers, {model['q_heads']} query and {model['kv_heads']} KV heads"
    facts = {
        **where_it_ran(results),
        "Model": escape(
            f"{model['name']}: {size}, {model['parameters'] / 1e6:.0f}M parameters, {model['dtype']}"
        ),
        "Prompt": escape(f"{results['prompt']['tokens']} tokens of {results['prompt']['source']}"),
        **how_it_ran(results),
    }
    repeats = settings["repeats"]
    turns = (
        "of one turn"
        if repeats == 1
        else f"the median of {repeats} turns, with the least and the most below it"
    )
    selecting = ON_GPU if settings["device"] == "cuda" else ""
    measured = MEASURED.format(turns=turns, positions=settings["compared_positions"], selecting=selecting)
    closing = "<p class=soft>All figures are in results.json next to this page.</p>"
    for note in (settings["busy"], settings.get("pace")):
        measured += f"<p class=no>Careful: {escape(note)}.</p>" if note else ""
    return f"<h2>How it was measured</h2>{measured}{definitions(facts)}{closing}"


def where_it_ran(results: dict[str, Any]) -> dict[str, str]:
    """Machine and threads."""
    here, settings = results["machine"], results["settings"]
    features = ", ".join(here["features"])
    facts = {"Machine": f"{here['cpu']}, {here['cpus']} CPUs, {here['memory_gib']} GiB; {features}"}
    gpu = here.get("gpu")
    if gpu is None:
        return {name: escape(text) for name, text in facts.items()} | {"Threads": str(settings["threads"])}
    facts["GPU"] = f"{gpu['name']}, {gpu['memory_gib']} GiB, CUDA {gpu['cuda']}, driver {gpu.get('driver')}"
    if settings.get("sdpa"):
        facts["PyTorch's attention"] = settings["sdpa"]
    return {name: escape(text) for name, text in facts.items()}


def how_it_ran(results: dict[str, Any]) -> dict[str, str]:
    """Versions, date and command."""
    versions = ", ".join(f"{name} {is_}" for name, is_ in results["versions"].items() if is_)
    command = f"<code>{escape(results['command'])}</code>"
    return {"Versions": escape(versions), "Date": escape(results["date"]), "Command": command}


def definitions(facts: dict[str, str]) -> str:
    """Names and what they are; the texts are HTML already."""
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in facts.items()) + "</dl>"


PAGE = """<!doctype html>
<html lang=en>
<head>
<meta charset=utf-8>
<meta name=viewport content="width=device-width,initial-scale=1">
<meta name=color-scheme content="light dark">
<title>flashprefill: {title}</title>
<style>
{style}</style>
</head>
<body><main>
<h1>{title}</h1>
<p class=soft>{subtitle}</p>
{body}
</main></body>
</html>
"""


def page(results: dict[str, Any], out: Path) -> str:
    """Return the whole page; the pictures are read from `out`."""
    model = results["model"]
    title = f"{model['name']} reads {results['prompt']['tokens']:,} tokens"
    where = f"{machine.computed_on(results)}, {model['dtype']}"
    body = [
        _tiles(results["runs"]),
        "<h2>Side by side</h2>",
        _table(results["runs"]),
        image(out / "times.png", "Seconds to the first token by method", TIMES),
        _skipped(results, out),
        _answers(results),
        _facts(results),
    ]
    return document(title, f"Dense attention against flashprefill's policies, on {where}", "\n".join(body))


def document(title: str, subtitle: str, body: str) -> str:
    """A page with our look around a body."""
    style = STYLE.read_text(encoding="utf-8")
    return PAGE.format(title=escape(title), style=style, subtitle=escape(subtitle), body=body)
