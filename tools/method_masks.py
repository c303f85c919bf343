"""Draws the pictures of docs/methods/ and the README: masks of real heads next to their true attention.

    .venv/bin/python tools/method_masks.py docs/images/methods "flexprefill=flexprefill;flexprefill(tau=1.0)"
    .venv/bin/python tools/method_masks.py docs/images "masks:local,hardest=flashprefill;sketch"

Each argument after the folder is a picture's name and its policies, as `flashprefill inspect` spells them,
separated by semicolons; `LABEL:=policy` gives a panel a shorter title. The model is SmolLM2-135M-Instruct
over 7600 tokens of text that is on the machine, in the lab's six layers. Of their 54 heads the same three are
shown whatever the policy: one that returns to a few places, one that picks here and there and one that looks
nearly everywhere. Kinds after a colon (the keys of apps/heads.py's KINDS) show others. Figures of all 54
heads are printed: mean density, and the mean share of the true attention that the mask holds, over 512 rows
per head. With `--from DIR:TEXT` before the folder the heads are those of a dump of `flashprefill lab --dump`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from flashprefill.apps import heads as kinds
from flashprefill.apps import measure, models, pictures, plots, prompt
from flashprefill.apps.lab import texts
from flashprefill.apps.spec import parse_policy
from flashprefill.policies import FlashPrefill

TOKENS, LAYERS = 7600, frozenset((2, 7, 13, 19, 25, 29))
SHOWN = ("columns", "scattered", "broad")


def main() -> None:
    """Run the model once and draw every picture that was asked for."""
    arguments = sys.argv[1:]
    if arguments[0] == "--from":
        place, _, name = arguments[1].rpartition(":")
        captured, arguments = texts.load(Path(place))[name], arguments[2:]
        print(f"{name} of {place}; layers {sorted(captured)}")
    else:
        loaded = models.load(None, "bf16")
        text = prompt.build(loaded.tokenizer, TOKENS, None)
        captured = measure.run(loaded, text.ids, 1, LAYERS)[1].captured
        print(
            f"{loaded.name}, {loaded.dtype}, {len(text.ids)} tokens of {text.source}; layers {sorted(LAYERS)}"
        )
    folder = Path(arguments[0])
    folder.mkdir(parents=True, exist_ok=True)
    found = kinds.choose(*pictures.candidates_of(captured, FlashPrefill()))
    for argument in arguments[1:]:
        name, _, specs = argument.partition("=")
        name, _, wanted = name.partition(":")
        shown = [one for one in found if one[2] in (wanted.split(",") if wanted else SHOWN)]
        named = []
        for spec in specs.split(";"):
            label, _, policy = spec.rpartition(":=")
            named.append((label or parse_policy(policy).text, parse_policy(policy)))
        for _, policy in named:
            heads, _, visible = pictures.candidates_of(captured, policy)
            density = np.mean([(one.kept & visible).sum() / visible.sum() for one in heads])
            recall = [one.recall for one in heads]
            print(
                f"{policy}: density {density:.3f}, attention held {np.mean(recall):.3f}, "
                f"5th percentile of heads {np.percentile(recall, 5):.3f}"
            )
        rows = []
        for layer, head, kind in shown:
            query, key, value, scale = captured[layer]
            group = query.shape[1] // key.shape[1]

            def mass(tile: int, block: int, q: object = query[:, head], k: object = key[:, head // group]):  # type: ignore[no-untyped-def]
                return pictures.host(kinds.attention_mass(q, k, scale, tile, block).double())  # type: ignore[arg-type]  # noqa: B023

            own = [(label, policy.at_layer(layer)) for label, policy in named]
            panels = pictures.mask_panels(query, key, scale, head, group, own, mass, value)
            rows.append(
                plots.HeadRow(f"layer {layer}, head {head}: {kinds.KINDS[kind]}", mass(128, 128), panels)
            )
        path = folder / f"{name}.png"
        plots.masks(path, rows, TOKENS)
        picture = Image.open(path).convert("RGB")
        picture.quantize(96, dither=Image.Dither.NONE).save(path, optimize=True)  # a third of the bytes


if __name__ == "__main__":
    main()
