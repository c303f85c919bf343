"""Prompt evaluation and decoding of llama.cpp, stock against the plugin, by turns in one process.

    tests/engines/ggml/run.sh --python bench/engine_llama.py --tokens 2048 --ubatch 512 --out results.json

The first run sets the engine up. A file that exists is added to, so that a measurement can be made in pieces.
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
from engine import Setup, engine, prompt  # noqa: E402


def measure(setup: Setup, options: str | None, tokens: list[int], decode: int) -> dict:
    with engine(setup, options) as it:
        begin = time.perf_counter()
        logits = it.feed([(0, tokens)])[0][-1]
        prompt_seconds = time.perf_counter() - begin
        begin = time.perf_counter()
        if decode:
            it.greedy(logits, decode)
        result = {"prompt_s": prompt_seconds, "decode_s": time.perf_counter() - begin}
        if it.plugin:
            result |= {k: v for k, v in it.plugin.stats().items() if k != "total_blocks"}
        return result


def warm_up(setup: Setup) -> None:
    with engine(setup) as it:
        it.feed([(0, prompt(64))])


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
    parser.add_argument("--options", action="append", default=[], help="of the plugin; may be repeated")
    parser.add_argument("--kv", default="f16")
    parser.add_argument("--decode", type=int, default=0, help="tokens after each prompt")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--others", type=float, default=0.05, help="largest share of other processes")
    arguments = parser.parse_args()
    rivals = [None, *(arguments.options or ["policy=flashprefill"])]
    rows = []
    before = seconds_of_cpus()
    for count in arguments.tokens:
        for ubatch in arguments.ubatch:
            setup = Setup(model="q4_1", kv=arguments.kv, n_ctx=count // 256 * 256 + 512, n_ubatch=ubatch)
            warm_up(setup)
            runs: list[list[dict]] = [[] for _ in rivals]
            for _ in range(arguments.repeats):
                for rival, options in enumerate(rivals):
                    runs[rival].append(measure(setup, options, prompt(count), arguments.decode))
            stock = statistics.median(run["prompt_s"] for run in runs[0])
            for options, mine in zip(rivals, runs, strict=True):
                seconds = statistics.median(run["prompt_s"] for run in mine)
                row = {
                    "tokens": count,
                    "ubatch": ubatch,
                    "kv": arguments.kv,
                    "engine": "stock" if options is None else options,
                    "prompt_tokens_per_s": count / seconds,
                    "speedup": stock / seconds,
                    "density": mine[0].get("density"),
                    "decode_tokens": arguments.decode,
                    "decode_tokens_per_s": arguments.decode / statistics.median(r["decode_s"] for r in mine)
                    if arguments.decode
                    else None,
                    "runs": mine,
                }
                rows.append(row)
                print({k: v for k, v in row.items() if k != "runs"}, flush=True)
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
