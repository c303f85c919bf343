"""Prompt evaluation and decoding of llama.cpp, stock against the plugin, by turns in one process.

    tests/engines/ggml/run.sh --python bench/engine_llama.py --tokens 2048 --ubatch 512 --out results.json

The first run sets the engine up. Two contexts of one model, of which one knows the plugin, read a prompt one
after the other and then generate by turns of eight tokens. Decode speed is that of the median step. A turn in
which other processes had more than --others of the processors' busy time is taken again, at most twice. A
file that exists is added to, so that a measurement can be made in pieces.
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

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests/engines/ggml"))
sys.path.append(str(ROOT / "python/flashprefill/apps"))  # the engine's Python has no flashprefill
import llama_cpp  # noqa: E402
import machine  # noqa: E402
from engine import Engine, Setup, engine, prompt  # noqa: E402

STEPS = 8  # of decoding, one engine's turn
TRIES = 3  # for a turn without other processes


class Side:
    """One of the two, and what was measured of it."""

    def __init__(self, it: Engine) -> None:
        self.it = it
        self.prompts: list[float] = []
        self.steps: list[float] = []
        self.others: list[float] = []  # their share during each prompt
        self.stats: dict | None = None

    def read(self, tokens: list[int], allowed: float = 1.0) -> None:
        for _ in range(TRIES):
            self.it.remove(0)
            if self.it.plugin:
                self.it.plugin.reset_stats()
            before, begin = machine.cpu_seconds(), time.perf_counter()
            self.logits = self.it.feed([(0, tokens)])[0][-1]
            seconds, others = time.perf_counter() - begin, machine.share_of_others(before)
            if self.it.plugin:
                self.stats = {k: v for k, v in self.it.plugin.stats().items() if k != "total_blocks"}
            if others <= allowed:
                break
        self.prompts.append(seconds)
        self.others.append(others)

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
            "others_share_of_busy_time": [round(share, 4) for share in self.others],
            "prompt_tokens_per_s": count / statistics.median(self.prompts),
            "decode_tokens_per_s": 1 / quartiles[1] if quartiles else None,
            "decode_step_quartiles": quartiles,
            "decode_steps": len(self.steps),
            "plugin": self.stats,
        }


def measure(setup: Setup, options: str, tokens: list[int], decode: int, repeats: int, allowed: float) -> dict:
    # The stock context first: one that is made later would find the plugin.
    with engine(setup) as stock, engine(setup, options) as ours:
        sides = [Side(stock), Side(ours)]
        for side in sides:
            side.read(tokens[:64])
            side.prompts.clear()
            side.others.clear()
        for repeat in range(repeats):
            for side in sides if repeat % 2 == 0 else reversed(sides):
                side.read(tokens, allowed)
            for turn in range(decode // STEPS):
                for side in sides if turn % 2 == 0 else reversed(sides):
                    side.generate(STEPS)
        return dict(zip(("stock", "flashprefill"), (side.row(len(tokens)) for side in sides), strict=True))


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
    for count in arguments.tokens:
        for ubatch in arguments.ubatch:
            setup = Setup(model="q4_1", kv=arguments.kv, n_ctx=count // 256 * 256 + 512, n_ubatch=ubatch)
            found = measure(
                setup,
                arguments.options,
                prompt(count),
                arguments.decode,
                arguments.repeats,
                arguments.others,
            )
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
    sides = [row[name] for row in rows for name in ("stock", "flashprefill")]
    others = max(share for side in sides for share in side["others_share_of_busy_time"])
    print(f"others had up to {others:.1%} of the time that processors were busy in a prompt")
    if arguments.out is None:
        return
    if others > arguments.others:
        sys.exit(f"not written: others must not have more than {arguments.others:.0%}")
    report = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"pieces": []}
    here = machine.describe()
    command = ["tests/engines/ggml/run.sh", "--python", "bench/engine_llama.py", *sys.argv[1:]]
    here["command"] = shlex.join(Path(word).name if Path(word).is_absolute() else word for word in command)
    here["machine"]["threads"] = Setup().threads
    here["versions"] = {"python": here["versions"]["python"], "llama_cpp_python": llama_cpp.__version__}
    here |= {
        "system_info": llama_cpp.llama_print_system_info().decode(),
        "model": Path(os.environ["FLASHPREFILL_MODEL"]).name,
        "text": "licences and Python's own modules, by turns",
        "rows": rows,
    }
    report["pieces"].append(here)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
