"""Prompt evaluation and decoding of llama.cpp, stock against the plugin, by turns in one process.

    tests/engines/ggml/run.sh --python bench/engine_llama.py --tokens 2048 --ubatch 512 --out results.json

The first run sets the engine up. Two contexts of one model, of which one knows the plugin, read a prompt one
after the other and then generate by turns of eight tokens. Decode speed is that of the median step. A file
that exists is added to, so that a measurement can be made in pieces.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/engines/ggml"))
import llama_cpp  # noqa: E402
from engine import Engine, Setup, engine, prompt  # noqa: E402

STEPS = 8  # of decoding, one engine's turn


class Side:
    """One of the two, and what was measured of it."""

    def __init__(self, it: Engine) -> None:
        self.it = it
        self.prompts: list[float] = []
        self.steps: list[float] = []
        self.stats: dict | None = None

    def read(self, tokens: list[int]) -> None:
        self.it.remove(0)
        if self.it.plugin:
            self.it.plugin.reset_stats()
        begin = time.perf_counter()
        self.logits = self.it.feed([(0, tokens)])[0][-1]
        self.prompts.append(time.perf_counter() - begin)
        if self.it.plugin:
            self.stats = {k: v for k, v in self.it.plugin.stats().items() if k != "total_blocks"}

    def generate(self, count: int) -> None:
        for _ in range(count):
            begin = time.perf_counter()
            self.logits = self.it.feed([(0, [int(self.logits.argmax())])])[0][-1]
            self.steps.append(time.perf_counter() - begin)

    def row(self, count: int) -> dict:
        quartiles = statistics.quantiles(self.steps, n=4) if self.steps else None
        return {
            "prompt_s": statistics.median(self.prompts),
            "prompt_s_all": self.prompts,
            "prompt_tokens_per_s": count / statistics.median(self.prompts),
            "decode_tokens_per_s": 1 / quartiles[1] if quartiles else None,
            "decode_step_quartiles": quartiles,
            "decode_steps": len(self.steps),
            "plugin": self.stats,
        }


def measure(setup: Setup, options: str, tokens: list[int], decode: int, repeats: int) -> dict:
    # The stock context first: one that is made later would find the plugin.
    with engine(setup) as stock, engine(setup, options) as ours:
        sides = [Side(stock), Side(ours)]
        for side in sides:
            side.read(tokens[:64])
            side.prompts.clear()
        for repeat in range(repeats):
            for side in sides if repeat % 2 == 0 else reversed(sides):
                side.read(tokens)
            for turn in range(decode // STEPS):
                for side in sides if turn % 2 == 0 else reversed(sides):
                    side.generate(STEPS)
        return dict(zip(("stock", "flashprefill"), (side.row(len(tokens)) for side in sides), strict=True))


def seconds_of_cpus() -> tuple[float, float]:
    """Seconds that all processors were busy, and those of this process."""
    fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    busy = sum(fields[:3]) + sum(fields[5:8])
    times = os.times()
    return busy / os.sysconf("SC_CLK_TCK"), times.user + times.system


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "?")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, action="append", required=True)
    parser.add_argument("--ubatch", type=int, action="append", required=True)
    parser.add_argument("--options", default="policy=flashprefill", help="of the plugin")
    parser.add_argument("--kv", default="f16")
    parser.add_argument("--decode", type=int, default=64, help="tokens after each prompt")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--others", type=float, default=0.05, help="largest share of other processes")
    arguments = parser.parse_args()
    rows = []
    before = seconds_of_cpus()
    for count in arguments.tokens:
        for ubatch in arguments.ubatch:
            setup = Setup(model="q4_1", kv=arguments.kv, n_ctx=count // 256 * 256 + 512, n_ubatch=ubatch)
            found = measure(setup, arguments.options, prompt(count), arguments.decode, arguments.repeats)
            stock, ours = found["stock"], found["flashprefill"]
            row = {
                "tokens": count,
                "ubatch": ubatch,
                "kv": arguments.kv,
                "options": arguments.options,
                "speedup": stock["prompt_s"] / ours["prompt_s"],
                "density": ours["plugin"]["density"],
            }
            if arguments.decode:
                row["decode_ratio"] = ours["decode_tokens_per_s"] / stock["decode_tokens_per_s"]
            print(row, f"{stock['prompt_s']:.2f} s, {ours['prompt_s']:.2f} s", flush=True)
            rows.append({**row, **found})
    busy, own = (after - was for after, was in zip(seconds_of_cpus(), before, strict=True))
    others = max(0.0, busy - own) / busy
    print(f"others had {others:.1%} of the time that processors were busy")
    if arguments.out is None:
        return
    if others > arguments.others:
        sys.exit(f"not written: others must not have more than {arguments.others:.0%}")
    report = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"pieces": []}
    report["pieces"].append(
        {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": shlex.join(
                ["tests/engines/ggml/run.sh", "--python", "bench/engine_llama.py", *sys.argv[1:]]
            ),
            "machine": {
                "processor": processor(),
                "cpus": os.cpu_count(),
                "threads": Setup().threads,
                "others_share_of_busy_time": round(others, 4),
                "system": platform.platform(),
            },
            "llama_cpp_python": llama_cpp.__version__,
            "system_info": llama_cpp.llama_print_system_info().decode(),
            "model": Path(os.environ["FLASHPREFILL_MODEL"]).name,
            "text": "licences and Python's own modules, by turns",
            "rows": rows,
        }
    )
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
