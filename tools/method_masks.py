"""Draws the pictures of docs/methods/: masks of real heads, beside where their attention is.

    .venv/bin/python tools/method_masks.py docs/images/methods "flexprefill=flexprefill;flexprefill(tau=1.0)"

Each argument after the folder is a picture's name and its policies, as `flashprefill inspect` spells them,
separated by semicolons. The model is SmolLM2-135M-Instruct over 7600 tokens of text that is on the machine,
in the demo's six layers; of their 54 heads the same three are shown whatever the policy, one that returns to
a few places, one that picks here and there and one that looks nearly everywhere. Figures of all 54 are
printed: mean density, and the mean share of the true attention that the mask holds, over 512 rows a head.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from flashprefill.apps import heads as kinds
from flashprefill.apps import measure, models, pictures, plots, prompt
from flashprefill.apps.spec import parse_policy
from flashprefill.policies import FlashPrefill

TOKENS, LAYERS, SHOWN = 7600, 6, ("columns", "scattered", "broad")


def main() -> None:
    """Run the model once and draw every picture that was asked for."""
    import torch

    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    loaded = models.load(None, "auto")
    ids = torch.tensor([prompt.build(loaded.tokenizer, TOKENS, None).ids])
    last = loaded.model.config.num_hidden_layers - 1
    layers = frozenset(int(layer) for layer in np.linspace(1, last, LAYERS).round())
    captured = measure.run(loaded.model, ids, 1, layers)[1].captured
    found = kinds.choose(*pictures.candidates_of(captured, FlashPrefill()))
    shown = [(layer, head, kind) for layer, head, kind in found if kind in SHOWN]

    for argument in sys.argv[2:]:
        name, _, specs = argument.partition("=")
        policies = [parse_policy(spec) for spec in specs.split(";")]
        for policy in policies:
            heads, _, visible = pictures.candidates_of(captured, policy)
            density = np.mean([(one.kept & visible).sum() / visible.sum() for one in heads])
            recall = [one.recall for one in heads]
            print(
                f"{policy}: density {density:.3f}, attention held {np.mean(recall):.3f}, "
                f"5th percentile of heads {np.percentile(recall, 5):.3f}"
            )
        rows = []
        for layer, head, kind in shown:
            query, key, scale = captured[layer]
            group = query.shape[1] // key.shape[1]

            def mass(tile: int, block: int, q: object = query[:, head], k: object = key[:, head // group]):  # type: ignore[no-untyped-def]
                return kinds.attention_mass(q, k, scale, tile, block)  # type: ignore[arg-type]  # noqa: B023

            named = [(policy.text, policy) for policy in policies]
            panels = pictures.mask_panels(query, key, scale, head, group, named, mass)
            rows.append(
                plots.HeadRow(f"layer {layer}, head {head}: {kinds.KINDS[kind]}", mass(128, 128), panels)
            )
        plots.masks(folder / f"{name}.png", rows, TOKENS)


if __name__ == "__main__":
    main()
