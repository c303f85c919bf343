"""`flashprefill inspect`: run a selection on a saved dump of queries and keys, and show what it keeps.

The statistics go to the terminal, with a small drawing of a head's mask in characters; with --out, masks of
the heads are drawn into one PNG, next to the true attention on request.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..api import select
from . import checks, dump, table
from .errors import UsageError
from .spec import parse_policy

PICTURES = (".png", ".pdf", ".svg")
SHADES = " .:-=+*#%@"


@dataclass
class Options:
    """The command line's options."""

    file: Path
    policies: Sequence[str] = ()
    heads: Sequence[int] = ()
    scale: float | None = None
    out: Path | None = None
    text: bool = True
    json: bool = False


def draw_text(kept: npt.NDArray[np.bool_], width: int = 60) -> str:
    """A mask in characters: each stands for several tiles and blocks, darker where more of them are kept."""
    tiles, blocks = kept.shape
    step = max(1, -(-blocks // width))
    down = max(1, round(tiles / max(1, blocks) * step * 2))  # a character is about twice as high as wide
    lines = []
    for top in range(0, tiles, down):
        part = kept[top : top + down]
        shares = [part[:, left : left + step].mean() for left in range(0, blocks, step)]
        lines.append("".join(SHADES[int(np.ceil(share * (len(SHADES) - 1)))] for share in shares).rstrip())
    return "\n".join(lines)


def run(options: Options) -> list[dict[str, Any]]:
    """Select by each policy; print the statistics and write the picture."""
    policies = [parse_policy(text) for text in options.policies or ("flashprefill",)]
    if options.out is not None:
        checks.can_write(options.out, PICTURES)
        checks.need("inspect --out", "torch", "matplotlib")
    q, k = dump.queries_and_keys(options.file)
    heads = list(options.heads) or list(range(min(4, q.shape[1])))
    for head in heads:
        if not 0 <= head < q.shape[1]:
            raise UsageError(f"--heads {head}: must be from 0 to {q.shape[1] - 1}")
    results = []
    masks = []
    for policy in policies:
        mask = select(q, k, policy, softmax_scale=options.scale)
        masks.append(mask)
        share = np.asarray(mask.stats.density, dtype=float)[0]
        results.append(
            {
                "policy": policy.text,
                "tokens": [int(q.shape[0]), int(k.shape[0])],
                "heads": [int(q.shape[1]), int(k.shape[1])],
                "density": float(mask.density),
                "density_by_head": [round(float(x), 4) for x in share],
                "reason": mask.stats.reasons[0],
            }
        )
    if options.json:
        print(json.dumps(results, indent=1))
    else:
        _print(options, results, masks, heads, q.shape[1] // k.shape[1])
    if options.out is not None:
        _picture(options, policies, q, k, heads)
        if not options.json:
            print(f"{options.out}: masks of heads {', '.join(map(str, heads))}")
    return results


def _print(
    options: Options, results: list[dict[str, Any]], masks: list[Any], heads: list[int], group: int
) -> None:
    first = results[0]
    (queries, keys), (q_heads, kv_heads) = first["tokens"], first["heads"]
    print(f"{options.file}: {queries} queries, {keys} keys, {q_heads}/{kv_heads} heads\n")
    rows = []
    for result in results:
        share = result["density_by_head"]
        middle = sorted(share)[len(share) // 2]
        figures = (result["density"], min(share), middle, max(share))
        rows.append([result["policy"], *(f"{x:.3f}" for x in figures), result["reason"]])
    print(table.render(("policy", "density", "least", "median", "most", "selection"), rows))
    if not options.text:
        return
    for result, mask in zip(results, masks, strict=True):
        dense = np.asarray(mask.dense())
        for head in heads:
            own = head // group if mask.share_heads else head
            print(f"\n{result['policy']}, head {head}: keeps {result['density_by_head'][own]:.1%}")
            print(draw_text(dense[own]))


def _picture(options: Options, policies: list[Any], q: Any, k: Any, heads: list[int]) -> None:
    import torch

    from . import heads as kinds
    from . import pictures, plots

    def tensor(x: Any) -> torch.Tensor:
        return x if isinstance(x, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(x))

    query, key = tensor(q), tensor(k)
    scale = options.scale or float(query.shape[-1]) ** -0.5
    group = query.shape[1] // key.shape[1]
    named = [(policy.text, policy) for policy in policies]
    rows = []
    for head in heads:
        own = (query[:, head], key[:, head // group])

        def mass(tile_tokens: int, block_size: int, own: Any = own) -> Any:
            return kinds.attention_mass(own[0], own[1], scale, tile_tokens, block_size).double().numpy()

        # Without a prefix the true attention is cheap to know; with one the tiles do not begin at key 0.
        known = mass if query.shape[0] == key.shape[0] else None
        panels = pictures.mask_panels(query, key, scale, head, group, named, known)
        rows.append(plots.HeadRow(f"head {head}", known(128, 128) if known else None, panels))
    assert options.out is not None
    options.out.parent.mkdir(parents=True, exist_ok=True)
    plots.masks(options.out, rows, key.shape[0])
