"""How far the guard can be believed, what repairs bring and what they cost, on Q, K and V of real layers.

    flashprefill lab --text gpl --text code --dump out/qkv
    python bench/lab/guard.py out/qkv --out bench/results/guard.json

A *case* is one head of one layer of one text under one policy: its recall as the guard reports it, from the
rows that it audits by default, beside its true recall, which comes from the library's attention over all rows
(exp(lse under the mask - lse of dense attention)) and shares no code with the guard. Every policy is one mask
per layer and every head one case, each with a seed of its own.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flashprefill import (
    BlockMask,
    Guard,
    Policy,
    audit,
    collect_timings,
    example_inputs,
    prefill_attention,
    select,
)
from flashprefill.apps import machine
from flashprefill.apps.lab import texts
from flashprefill.apps.lab.figures import Layer
from flashprefill.apps.lab.lines import EIGHTH, KEYS
from flashprefill.apps.lab.run import FORCED
from flashprefill.policies.text import make

SWEEPS: dict[str, tuple[str, tuple[float, ...], dict[str, Any]]] = {
    "sketch, gain": ("sketch", (0.003, 0.01, 0.03, 0.1), {**EIGHTH, **FORCED}),
    "sketch, mass": ("sketch", (0.5, 0.8, 0.93), FORCED),
    "flashprefill": ("flashprefill", (0.05, 0.15, 0.4), FORCED),
    "gather": ("gather", (0.001, 0.005, 0.02), KEYS),
    "flexprefill": ("flexprefill", (0.6, 0.9), {}),
    "xattention": ("xattention", (0.8, 0.95), {}),
    "streaming": ("streaming", (4, 12), FORCED),
    "sampleattention": ("sampleattention", (0.1, 0.5), {}),
}
SWEPT = {"sketch, gain": "gain", "sketch, mass": "mass", "flashprefill": "alpha", "gather": "gain"}
SWEPT |= {"flexprefill": "gamma", "xattention": "threshold", "streaming": "window_blocks"}
SWEPT |= {"sampleattention": "coverage"}
# What is repaired below: budgets that are too low, and one that is right.
REPAIRED = {"sketch, gain": (0.01, 0.03, 0.1), "flashprefill": (0.15, 0.4), "gather": (0.005, 0.02)}
GAPS = (0.0, 0.001, 0.005)
COSTS = ((8192, 0.02), (8192, 0.3), (16384, 0.02), (32768, 0.02))


def policies(sweeps: dict[str, tuple[float, ...]]) -> Iterator[tuple[str, float, Policy]]:
    """Every policy at every value."""
    for name, values in sweeps.items():
        method, _, fixed = SWEEPS[name]
        for value in values:
            yield name, value, make(method, {**fixed, SWEPT[name]: value})


def true_recalls(layer: Layer, mask: BlockMask) -> tuple[np.ndarray, np.ndarray]:
    """The recall of every row [heads, tokens], and whether its tile leaves something out."""
    _, lse = layer.attend(mask)
    recall = (lse - layer.lse).clamp(max=0).exp().double().numpy()
    words = np.ascontiguousarray(mask.bits.numpy()).view(np.uint8)  # whole blocks alone, not keys in lists
    tiles, blocks = (-(-recall.shape[1] // size) for size in (mask.tile_tokens, mask.block_size))
    kept = np.unpackbits(words, axis=-1, bitorder="little")[:, :tiles].sum(axis=2)
    visible = np.minimum(((np.arange(tiles) + 1) * mask.tile_tokens - 1) // mask.block_size + 1, blocks)
    sparse = kept < visible
    rows = np.repeat(np.repeat(sparse, recall.shape[0] // len(sparse), axis=0), mask.tile_tokens, axis=1)
    return recall, rows[:, : recall.shape[1]]


def cases_of(layer: Layer, mask: BlockMask, seed: int) -> Iterator[dict[str, Any]]:
    """The cases of one mask, and the layer's own with its certificate."""
    report = audit(
        layer.query, layer.key, mask, Guard(layer=layer.number, seed=seed), softmax_scale=layer.scale
    )
    recall, sparse = true_recalls(layer, mask)
    heads = []
    for head in range(len(recall)):
        if not sparse[head].any():
            continue
        true = float(recall[head][sparse[head]].mean())
        case = {
            "true": true,
            "recall": float(report.recall[0, head]),
            "low": float(report.recall_low[0, head]),
        }
        heads.append(case)
        yield case
    if heads:
        yield {
            "certificate": float(report.certificate[0]),
            "true": float(np.mean([h["true"] for h in heads])),
        }


def coverage(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """How often a statement of the guard was right."""
    heads = [case for case in cases if "low" in case]
    true, recall, low = (np.array([case[key] for case in heads]) for key in ("true", "recall", "low"))
    layers = [case for case in cases if "certificate" in case]
    held = [case["certificate"] <= case["true"] for case in layers]
    error = recall - true
    return {
        "cases": len(heads),
        "low_is_below_true": {f"{gap:g}": round(float((true >= low - gap).mean()), 4) for gap in GAPS},
        "true_within_twice": round(float((np.abs(error) <= recall - low + 1e-3).mean()), 4),
        "error_rms": round(float(np.sqrt((error**2).mean())), 5),
        "error_mean": round(float(error.mean()), 5),
        "error_worst": round(float(np.abs(error).max()), 5),
        "width_mean": round(float((recall - low).mean()), 5),
        "certificates": len(layers),
        "certificates_right": round(float(np.mean(held)), 4) if held else None,
    }


def repairs_of(layers: list[Layer], policy: Policy) -> dict[str, Any]:
    """One policy under each mode, over all layers: what is kept, what it costs."""
    modes: dict[str, Any] = {}
    for mode in ("off", "observe", "repair", "strict"):
        recalls, densities, seconds, repaired, errors = [], [], np.zeros(3), 0, []
        for layer in layers:
            guard = None if mode == "off" else Guard(mode, layer=layer.number, seed=1)
            with collect_timings() as timings:
                out, lse, stats = prefill_attention(
                    layer.query, layer.key, layer.value, policy, softmax_scale=layer.scale, guard=guard,
                    return_lse=True, return_stats=True,
                )  # fmt: skip
            seconds += (timings.select_seconds, timings.guard_seconds, timings.attend_seconds)
            densities.append(stats.mean_density)
            error = (out.float() - layer.out.float()).norm(dim=-1) / layer.out.float().norm(dim=-1)
            errors.append(float(error.mean()))
            if stats.guard is not None:
                repaired += sum(stats.guard.summary().outcomes[name] for name in ("repaired", "dense"))
            recalls.append((lse - layer.lse).clamp(max=0).exp().double().mean(dim=1).numpy())
        heads = np.concatenate(recalls)
        modes[mode] = {
            "recall": round(float(heads.mean()), 4),
            "recall_p05_of_heads": round(float(np.quantile(heads, 0.05)), 4),
            "recall_worst_head": round(float(heads.min()), 4),
            "output_error": round(float(np.mean(errors)), 4),
            "density": round(float(np.mean(densities)), 4),
            "heads": len(heads),
            "repaired": repaired,
            **dict(zip(("select_s", "guard_s", "attend_s"), seconds.round(4).tolist(), strict=True)),
        }
    return modes


def cpu_seconds(call: Callable[[], Any], turns: int) -> float:
    """Processor time of a call on one thread, the least of some turns, which other work hardly changes."""
    best = np.inf
    for _ in range(turns):
        begin = time.process_time()
        call()
        best = min(best, time.process_time() - begin)
    return float(best)


def cost_of(what: str, inputs: tuple[torch.Tensor, ...], gain: float, turns: int = 5) -> dict[str, Any]:
    """Processor time of one call of Sketch's without a guard, and of an audit of its mask."""
    policy = make("sketch", {**EIGHTH, **FORCED, "gain": gain})
    mask = select(*inputs[:2], policy)
    operator = cpu_seconds(lambda: prefill_attention(*inputs, policy), turns)
    guard = cpu_seconds(lambda: audit(*inputs[:2], mask), 2 * turns)
    return {
        "inputs": what,
        "shape": [*inputs[0].shape],
        "kv_heads": inputs[1].shape[1],
        "density": round(mask.density, 4),
        "rows": int(audit(*inputs[:2], mask).rows_audited[0, 0]),
        "operator_cpu_s": round(operator, 5),
        "guard_cpu_s": round(guard, 5),
        "share_of_operator": round(guard / operator, 5),
    }


def costs(layer: Layer) -> list[dict[str, Any]]:
    """The guard's part of calls: on a real layer, and on made-up inputs of several lengths."""
    real = (layer.query, layer.key, layer.value)
    found = [cost_of("a layer of a text", real, gain) for gain in (0.003, 0.03, 0.1)]
    for tokens, gain in COSTS:
        made_up = tuple(map(torch.from_numpy, example_inputs(tokens)))
        found.append(cost_of("example_inputs", made_up, gain))
    return found


def main() -> None:
    """Write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="a folder of dumps")
    parser.add_argument("--text", action="append", default=[])
    parser.add_argument("--only-cost", action="store_true", help="the times alone, into a file that is there")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.monotonic()
    cases: dict[str, list[dict[str, Any]]] = {}
    repairs: dict[str, dict[str, Any]] = {}
    seed = 0
    for text, captured in texts.load(options.source).items():
        if options.text and text not in options.text:
            continue
        layers = [Layer.of(number, one) for number, one in captured.items()]
        if options.only_cost:
            again = json.loads(options.out.read_text(encoding="utf-8"))
            again["cost"], again["cost_command"] = (
                costs(layers[len(layers) // 2]),
                shlex.join(["python", "bench/lab/guard.py", *sys.argv[1:]]),
            )
            options.out.write_text(json.dumps(again, indent=1) + "\n", encoding="utf-8")
            return
        for name, value, policy in policies({name: values for name, (_, values, _) in SWEEPS.items()}):
            for layer in layers:
                mask = layer.select(policy)[0]
                mask.mean_correction = False
                seed += 1
                cases.setdefault(name, []).extend(cases_of(layer, mask, seed))
            print(text, name, value, flush=True, file=sys.stderr)
        for name, value, policy in policies(REPAIRED):
            repairs.setdefault(text, {})[f"{name} {value:g}"] = repairs_of(layers, policy)
            print(text, "repairs", name, value, flush=True, file=sys.stderr)
    everyone = [case for some in cases.values() for case in some]
    results = {
        "schema": "flashprefill-guard/1",
        **machine.describe(),
        "command": shlex.join(["python", "bench/lab/guard.py", *sys.argv[1:]]),
        "threads": 1,
        "coverage": coverage(everyone),
        "coverage_by_policy": {name: coverage(some) for name, some in cases.items()},
        "cost": costs(layers[len(layers) // 2]),
        "repairs": repairs,
        "seconds": round(time.monotonic() - begin, 1),
    }
    options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results["coverage"], indent=1))


if __name__ == "__main__":
    main()
