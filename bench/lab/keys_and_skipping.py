"""Policies that don't choose whole blocks: single keys in lists, and attention that skips; what each costs.

    flashprefill lab --text gpl --dump out/qkv
    python bench/lab/keys_and_skipping.py out/qkv --text gpl --out bench/results/lab-keys.json

Each policy selects and attends once per layer, on one thread, timed in CPU seconds, all policies by turns, so
that a busy machine changes them little. Figures are the lab's (flashprefill.apps.lab.figures). What attention
skips does not count as kept.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flashprefill import attend, select
from flashprefill.apps import machine
from flashprefill.apps.lab import texts
from flashprefill.apps.lab.figures import by_tile, tile_norms

SKETCH = "query_metric=true, outliers=6, query_pool=64, sink_blocks=1, window_blocks=2, dense_tail_blocks=0"
POLICIES = (
    "dense",
    *(f"dense(skip={skip})" for skip in ("1e-7", "0.0001", "0.001", "0.01", "0.05")),
    f"sketch(gain=0.004, {SKETCH})",
    "gather(gain=0.003, dense_tail_blocks=0)",
    *(f"s2o(tau={tau})" for tau in (0.3, 0.1, 0.03, 0.01)),
    "s2o(tau=0.03, share_heads=true)",
    "s2o(tau=0.03, segment=128)",
    "s2o(tau=0.03, segment=128, share_heads=true)",
)


def timed(verb: Callable[..., Any], *tensors: Any, **options: Any) -> tuple[Any, float]:
    """Return what a call returns, and the CPU seconds that it took."""
    begin = time.process_time()
    return verb(*tensors, **options), time.process_time() - begin


def figures(layers: dict[int, Any], policies: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return one row per policy, over all layers."""
    found: dict[str, list[Any]] = {policy: [] for policy in policies}
    for captured in layers.values():
        q, k, v = captured.query, captured.key, captured.value
        options: dict[str, Any] = {"softmax_scale": captured.scale, "threads": 1}
        exact, exact_lse = attend(q, k, v, select(q, k, "dense", **options), return_lse=True, **options)
        norms, tokens = tile_norms(exact), by_tile(torch.ones(len(q), 1))
        for policy in policies:
            mask, selection = timed(select, q, k, policy, **options)
            (out, lse), attention = timed(attend, q, k, v, mask, return_lse=True, **options)
            stats = mask.stats
            found[policy].append(
                (
                    float((stats.kept - stats.skipped).sum() / (stats.total.sum() * stats.kept.shape[1])),
                    (by_tile((lse - exact_lse).T.clamp(max=0).exp()) / tokens).flatten().double(),
                    (tile_norms(out - exact) / norms).flatten().nan_to_num(),
                    selection,
                    attention,
                )
            )
    rows = []
    for policy, parts in found.items():
        density, recall, error, selection, attention = zip(*parts, strict=True)
        held = torch.cat(recall)
        rows.append(
            {
                "policy": policy,
                "density": round(float(np.mean(density)), 4),
                "recall": round(float(held.mean()), 4),
                "recall_p5": round(float(torch.quantile(held, 0.05)), 4),
                "error": round(float(torch.cat(error).mean()), 4),
                "select_seconds": round(sum(selection), 4),
                "attend_seconds": round(sum(attention), 4),
            }
        )
    return rows


def main() -> None:
    """Read the dumps, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("dumps", type=Path, help="what flashprefill lab --dump wrote")
    parser.add_argument("--text", default="gpl", help="which of the dumps' texts")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    busy = machine.busy()
    layers = texts.load(options.dumps)[options.text]
    rows = figures(layers, POLICIES)
    results = {
        **machine.describe(),
        "command": shlex.join(["python", *sys.argv]),
        "settings": {"threads": 1, "busy": busy},
        "text": options.text,
        "tokens": len(next(iter(layers.values())).query),
        "layers": list(layers),
        "rows": rows,
    }
    options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
