"""What rules of Sketch, and other methods' defaults, keep and hold over the length of a prompt. On a CPU.

    python bench/lab/sketch_rules.py --out bench/results/lab-sketch-rules.json

A threshold that suits one length may do another thing at the next. Two kinds of made-up inputs, the same at
every length: *topics* (fp.example_inputs), where a sixteenth of the keys matters and the rest does not; and
*spread*, where nearly all keys get a little, as in a head that averages. `held` is the share of the true
attention on the kept blocks, over 64 query rows spread over the prompt and all heads: mean, 5th percentile.
bench/cuda/defaults_bench.py measures times and longer prompts on a GPU.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

import flashprefill as fp
from flashprefill.apps import machine

HEADS, KV_HEADS, BLOCK, SAMPLES = 4, 2, 128, 64
METRIC: dict[str, Any] = {"query_metric": True, "outliers": 6, "query_pool": 64}
POLICIES = {
    "Sketch, mass 0.95": fp.Sketch(mass=0.95),
    "Sketch, mass 0.9": fp.Sketch(mass=0.9),
    "Sketch, mass 0.85": fp.Sketch(mass=0.85),
    "Sketch, mass 0.8": fp.Sketch(mass=0.8),
    "Sketch, mass 0.9, metric": fp.Sketch(mass=0.9, query_metric=True),
    "Sketch, gain 0.0005, metric, pool 64": fp.Sketch(gain=0.0005, **METRIC),
    "Sketch, gain 0.0015, metric, pool 64": fp.Sketch(gain=0.0015, **METRIC),
    "Sketch, gain 0.003, metric, pool 64": fp.Sketch(gain=0.003, **METRIC),
    "FlashPrefill, query_pool 16": fp.FlashPrefill(query_pool=16),
    "XAttention": fp.XAttention(),
    "FlexPrefill": fp.FlexPrefill(),
}


def spread(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise, and 64 topics that are weak beside it."""
    make = torch.Generator().manual_seed(tokens)
    topics = torch.randn(64, 128, generator=make)

    def rows(heads: int, run: int) -> torch.Tensor:
        which = torch.randint(64, (tokens // run, heads), generator=make).repeat_interleave(run, 0)
        return torch.randn(tokens, heads, 128, generator=make) + 0.5 * topics[which]

    return rows(HEADS, 128), rows(KV_HEADS, 256)


def topical(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """fp.example_inputs."""
    q, k, _ = fp.example_inputs(tokens, HEADS, KV_HEADS, dtype=torch.float32)
    return q, k


def masses(q: torch.Tensor, k: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The attention of sampled rows to every block, [heads, rows, blocks]."""
    future = torch.arange(len(q)) > rows[:, None]
    found = []
    for head in range(HEADS):
        scores = q[rows, head] @ k[:, head // (HEADS // KV_HEADS)].T * q.shape[-1] ** -0.5
        weights = scores.masked_fill_(future, -torch.inf).softmax(-1)
        found.append(weights.view(len(rows), -1, BLOCK).sum(-1))
    return torch.stack(found)


def main() -> None:
    """All policies at all lengths."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", default="4096,8192,16384,32768,65536")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    table = []
    for kind, inputs in (("topics", topical), ("spread", spread)):
        for tokens in map(int, arguments.tokens.split(",")):
            q, k = inputs(tokens)
            make, stretch = torch.Generator().manual_seed(tokens), tokens // SAMPLES
            rows = torch.arange(SAMPLES) * stretch + torch.randint(stretch, (SAMPLES,), generator=make)
            true = masses(q, k, rows)
            for name, policy in POLICIES.items():
                mask = fp.select(q, k, policy)
                kept = torch.as_tensor(mask.dense())[:, rows // BLOCK]
                held = (true * kept).sum(-1).flatten()
                table.append({"inputs": kind, "tokens": tokens, "name": name, "policy": policy.text})
                table[-1] |= {"density": round(mask.density, 4), "held": round(float(held.mean()), 4)}
                table[-1]["held_5th"] = round(float(held.quantile(0.05)), 4)
                print(json.dumps(table[-1]), flush=True)
    results = {
        "schema": "flashprefill-sketch-rules/1",
        **machine.describe(),
        "command": shlex.join(["python", "bench/lab/sketch_rules.py", *sys.argv[1:]]),
        "rows": table,
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
