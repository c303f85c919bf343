"""Time to first token inside SGLang on a CPU: the stock engine against the plugin's, by turns.

    tests/engines/sglang/run.sh --python bench/sglang/ttft.py MODEL --tokens 2048 7600 --out FILE.json

MODEL is a Hugging Face directory (tests/engines/common/models.py unpacks the bundled one). Each engine is a
process of its own; one holds still while the other is timed. Both have SGLang's backend torch_native, which
is what runs on a CPU without SGLang's kernels: it calls PyTorch's scaled_dot_product_attention for each
request, and has no fused kernel for pages. The radix cache is off, so that prompts can be asked again.

Beside seconds there are processor seconds: what the engine's processes used between question and first token,
on all cores together. Where other work runs on the machine, these say more.
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


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process and all that it started have used."""
    total, todo, ticks = 0.0, [pid], os.sysconf("SC_CLK_TCK")
    while todo:
        one = todo.pop()
        try:
            for task in Path(f"/proc/{one}/task").iterdir():
                todo += [int(child) for child in (task / "children").read_text().split()]
            fields = Path(f"/proc/{one}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        total += (int(fields[11]) + int(fields[12])) / ticks
    return total


def serve(pipe: Any, model: str, arguments: dict[str, Any], environment: dict[str, str]) -> None:
    """Be an engine: take ids, return times and counts of blocks."""
    os.environ.update(environment)
    import sglang

    engine = sglang.Engine(
        model_path=model,
        device="cpu",
        attention_backend="torch_native",
        skip_tokenizer_init=True,
        disable_radix_cache=True,
        sleep_on_idle=True,
        mem_fraction_static=0.3,
        max_total_tokens=10240,
        max_running_requests=2,
        **arguments,
    )
    pipe.send("ready")
    while (ids := pipe.recv()) is not None:
        busy, used, begin = machine.cpu_seconds()[0], cpu_seconds(os.getpid()), time.perf_counter()
        sampling = {"max_new_tokens": 1, "temperature": 0, "ignore_eos": True}
        engine.generate(input_ids=ids, sampling_params=sampling)
        seconds, used = time.perf_counter() - begin, cpu_seconds(os.getpid()) - used
        share = 1 - used / max(machine.cpu_seconds()[0] - busy, 1e-9)
        numbers = engine.get_server_info()["internal_states"][0].get("flashprefill")
        pipe.send((seconds, used, share, numbers))
    engine.shutdown()


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 7600])
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--chunk", type=int, default=8192, help="rows per chunk")
    parser.add_argument("--policy", default="flashprefill")
    parser.add_argument("--parameters", type=json.loads, default={}, help="JSON of the policy's fields")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    from transformers import AutoTokenizer

    from flashprefill import sglang as plugin

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    prompts = {n: prompt.build(tokenizer, n, 0.5) for n in options.tokens}
    policy = {"policy": options.policy, **options.parameters}
    arguments = {"dtype": options.dtype, "chunked_prefill_size": options.chunk}
    engines = {}
    context = multiprocessing.get_context("spawn")
    for arm, environment in (("stock", {}), ("flashprefill", plugin.config(**policy, log_seconds=0))):
        here, there = context.Pipe()
        process = context.Process(target=serve, args=(there, options.model, arguments, environment))
        process.start()
        engines[arm] = here
        there.close()
        here.recv()

    def ask(arm: str, ids: list[int]) -> Any:
        engines[arm].send(ids)
        return engines[arm].recv()

    for arm in engines:  # the first prompt of an engine pays for its memory
        ask(arm, prompts[min(prompts)].ids[:512])
    result = {"schema": "flashprefill-sglang-ttft/1", **machine.describe()}
    names = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    result["command"] = shlex.join(["python", "bench/sglang/ttft.py", *names])
    result["versions"]["sglang"] = machine.version_of("sglang")
    result["settings"] = {
        "model": Path(options.model).name,
        "dtype": options.dtype,
        "policy": policy,
        "repeats": options.repeats,
        "chunk": options.chunk,
        "attention_backend": "torch_native",
    }
    rows: list[dict[str, Any]] = []
    blocks = [0, 0]  # kept and causal ones until now; the first prompt is too short for the policy
    for asked in prompts.values():
        seen: dict[str, Any] = {arm: {"seconds": [], "cpu": [], "others": []} for arm in engines}
        for turn in range(options.repeats):
            for arm in engines if turn % 2 == 0 else reversed(engines):
                seconds, used, others, numbers = ask(arm, asked.ids)
                seen[arm]["seconds"].append(seconds)
                seen[arm]["cpu"].append(used)
                seen[arm]["others"].append(round(others, 4))
                if numbers:
                    density = numbers["kept_blocks"] - blocks[0], numbers["causal_blocks"] - blocks[1]
                    blocks = [numbers["kept_blocks"], numbers["causal_blocks"]]
        row: dict[str, Any] = {"tokens": len(asked.ids), "density": density[0] / density[1]}
        for arm, values in seen.items():
            row[arm] = {
                "ttft_seconds": statistics.median(values["seconds"]),
                "ttft_all": values["seconds"],
                "cpu_seconds": statistics.median(values["cpu"]),
                "cpu_all": values["cpu"],
                "others_share_of_busy_time": values["others"],
            }
        stock, ours = row["stock"], row["flashprefill"]
        row["speedup"] = stock["ttft_seconds"] / ours["ttft_seconds"]
        row["cpu_ratio"] = stock["cpu_seconds"] / ours["cpu_seconds"]
        rows.append(row)
        print(
            f"{row['tokens']:6d} tokens: first token {stock['ttft_seconds']:6.2f} s stock, "
            f"{ours['ttft_seconds']:6.2f} s ours, {row['speedup']:.2f}x; processor "
            f"{stock['cpu_seconds']:.1f} and {ours['cpu_seconds']:.1f} s, {row['cpu_ratio']:.2f}x; "
            f"density {row['density']:.3f}",
            flush=True,
        )
        if options.out is not None:  # after each length, so that a run that is cut off leaves what it has
            result["rows"] = rows
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    for pipe in engines.values():
        pipe.send(None)


if __name__ == "__main__":
    main()
