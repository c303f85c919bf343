"""Policies that don't choose whole blocks: single keys in lists, and attention that skips; what each costs.

    flashprefill lab --text gpl --dump out/qkv
    python bench/lab/keys_and_skipping.py out/qkv --text gpl --out bench/results/lab-keys.json

Each policy selects and attends once per layer, on one thread, timed in CPU seconds, all policies by turns, so
that a busy machine changes them little. Figures are the lab's (flashprefill.apps.lab.figures). What attention
skips does not count as kept. --policy looks at others, --jobs at several layers beside each other.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flashprefill import attend, select
from flashprefill.apps import dump, machine
from flashprefill.apps.lab.figures import by_tile, tile_norms
from flashprefill.apps.lab.texts import known

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


Row = tuple[float, torch.Tensor, torch.Tensor, float, float]


def of_layer(dumps: Path, name: str, policies: tuple[str, ...]) -> dict[str, Row]:
    """What each policy keeps of one layer: density, recall and error by tile, seconds of both verbs."""
    torch.set_num_threads(1)
    content: Any = dump.load(dumps / name)
    q, k, v = (torch.as_tensor(content[key]).float() for key in "qkv")
    options: dict[str, Any] = {"softmax_scale": float(content["scale"]), "threads": 1}
    exact, exact_lse = attend(q, k, v, select(q, k, "dense", **options), return_lse=True, **options)
    norms, tokens = tile_norms(exact), by_tile(torch.ones(len(q), 1))
    found = {}
    for policy in policies:
        mask, selection = timed(select, q, k, policy, **options)
        (out, lse), attention = timed(attend, q, k, v, mask, return_lse=True, **options)
        stats = mask.stats
        found[policy] = (
            float((stats.kept - stats.skipped).sum() / (stats.total.sum() * stats.kept.shape[1])),
            (by_tile((lse - exact_lse).T.clamp(max=0).exp()) / tokens).flatten().double(),
            (tile_norms(out - exact) / norms).flatten().nan_to_num(),
            selection,
            attention,
        )
    return found


def figures(layers: list[dict[str, Row]]) -> list[dict[str, Any]]:
    """Return one row per policy, over all layers."""
    rows = []
    for policy in layers[0]:
        density, recall, error, selection, attention = zip(*(one[policy] for one in layers), strict=True)
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
    parser.add_argument("--layers", type=json.loads, help="only these, as [7, 13]")
    parser.add_argument("--policy", action="append", help="these in place of the ones above, dense first")
    parser.add_argument("--jobs", type=int, default=1, help="layers beside each other, a thread each")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    options = parser.parse_args()
    busy = machine.busy()
    files = {
        int(f.stem.rpartition("-layer")[2]): f.name for f in options.dumps.glob(f"{options.text}-layer*")
    }
    layers = sorted(n for n in files if not options.layers or n in options.layers)
    policies = tuple(options.policy or POLICIES)
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        found = pool.starmap(of_layer, [(options.dumps, files[n], policies) for n in layers], chunksize=1)
    results = {
        **machine.describe(),
        "command": shlex.join(["python", *sys.argv]),
        "settings": {"threads": 1, "busy": busy},
        "text": options.text,
        "tokens": known()[options.text].tokens,
        "layers": layers,
        "rows": figures(found),
    }
    options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
