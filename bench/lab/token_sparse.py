"""Token Sparse Attention on dumped layers: what the rows that are kept hold of the true attention.

    flashprefill lab --text gpl --text long --dump out/qkv
    python bench/lab/token_sparse.py out/qkv --text long --out bench/results/lab-token-sparse.json

It has no mask, so it has no line in the lab. Rows of dropped tokens are zeros and pass by in a model's
residual; figures are of the rows that are kept, and of the last 128, which score: their share of the true
softmax mass (exp of lse - dense lse), and the norm of out - dense over that of dense, by head. Seconds are
CPU seconds of one thread, scoring and copies included, over those of dense attention; with --device cuda, in
bf16, none are measured.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flashprefill import prefill_attention
from flashprefill.apps import dump, machine
from flashprefill.policies.text import parse

INNER = "sketch(gain=0.004, query_metric=true, outliers=6, query_pool=64)"
POLICIES = (
    "tokensparse(coverage=0.005)",
    "tokensparse(coverage=0.02)",
    "tokensparse(coverage=0.05)",
    "tokensparse(coverage=0.05, per_kv_head=true)",
    f"tokensparse(inner={INNER}, coverage=0.005)",
    f"tokensparse(inner={INNER}, coverage=0.05)",
    INNER,
)
LAST = 128  # rows that score, by default


def timed(layer: dict[str, Any], policy: str) -> tuple[torch.Tensor, torch.Tensor, Any, float]:
    """(out, lse, stats, CPU seconds) of one layer under a policy."""
    begin = time.process_time()
    out, lse, stats = prefill_attention(
        layer["q"], layer["k"], layer["v"], parse(policy), softmax_scale=float(layer["scale"]), threads=1,
        return_lse=True, return_stats=True,
    )  # fmt: skip
    return out, lse, stats, time.process_time() - begin


def held(out: torch.Tensor, lse: torch.Tensor, dense: torch.Tensor, dense_lse: torch.Tensor) -> list[float]:
    """Kept rows, what they hold, their error; and the last rows' share and error: means over heads."""
    kept = torch.isfinite(lse).T  # [tokens, heads]
    last = torch.arange(len(kept), device=kept.device) >= len(kept) - LAST
    share = (lse - dense_lse).T.clamp(max=0).exp()
    wrong, whole = (x.float().square().sum(dim=-1) for x in (out - dense, dense))
    rows = [float(kept.float().mean())]
    for chosen in (kept, kept & last[:, None]):
        count = chosen.sum(dim=0)
        rows.append(float(((share * chosen).sum(dim=0) / count).mean()))
        rows.append(float(((wrong * chosen).sum(dim=0) / (whole * chosen).sum(dim=0)).sqrt().mean()))
    return rows


NAMES = ("kept", "share", "error", "last_share", "last_error", "density", "seconds")


def rows_of(folder: Path, text: str, layers: list[int], device: str) -> list[dict[str, Any]]:
    """One row per policy and layer."""
    found = []
    for number in layers:
        content: Any = dump.load(folder / f"{text}-layer{number}.pt")
        layer = {name: torch.as_tensor(content[name]) for name in ("q", "k", "v", "scale")}
        if device == "cuda":
            layer |= {name: layer[name].to(device, torch.bfloat16) for name in ("q", "k", "v")}
        dense, dense_lse, _, whole = timed(layer, "dense")
        for policy in POLICIES:
            out, lse, stats, seconds = timed(layer, policy)
            figures = [*held(out, lse, dense, dense_lse), stats.mean_density]
            figures.append(seconds / whole if device == "cpu" else math.nan)
            found.append({"text": text, "tokens": len(dense), "layer": number, "policy": policy})
            found[-1] |= {name: round(float(x), 4) for name, x in zip(NAMES, figures, strict=True) if x == x}
            print(found[-1], flush=True)
    return found


def means(rows: list[dict[str, Any]], layers: list[int]) -> list[dict[str, Any]]:
    """The rows' means over some layers, by text and policy."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["layer"] in layers:
            groups.setdefault((row["text"], row["policy"]), []).append(row)
    return [
        {"text": text, "tokens": some[0]["tokens"], "policy": policy, "layers": [r["layer"] for r in some]}
        | {name: round(float(np.mean([row[name] for row in some])), 4) for name in NAMES if name in some[0]}
        for (text, policy), some in groups.items()
    ]


def main() -> None:
    """Read the dumps, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("dumps", type=Path, help="what flashprefill lab --dump wrote")
    parser.add_argument("--text", action="append", required=True, help="which of the dumps' texts")
    parser.add_argument("--upper", type=json.loads, default=[19, 25, 29], help="layers of the upper half")
    parser.add_argument("--lower", type=json.loads, default=[2, 7, 13], help="layers of the lower half")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        row
        for text in options.text
        for row in rows_of(options.dumps, text, options.upper + options.lower, options.device)
    ]
    results = {
        "schema": "flashprefill-token-sparse/1",
        **machine.describe(),
        "command": shlex.join(["python", "bench/lab/token_sparse.py", *sys.argv[1:]]),
        "rows": rows,
        "means": {half: means(rows, getattr(options, half)) for half in ("upper", "lower")},
    }
    options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
