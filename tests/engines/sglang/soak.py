"""A server with the plugin under many clients for a while: no error, no growth, the answers of quiet times.

    tests/engines/sglang/run.sh --python soak.py --seconds 600

SGLang's HTTP server runs on loopback. Clients ask prompts of mixed lengths over and over, some leave before
the answer. Before that each prompt was asked alone, and answers are held against these as common/judge.py
says. Two ways to serve:

--way whole (default): prompts in one piece, sparse. A batch may hold several; each selects as it does alone.
--way chunks: chunks of 512 rows mixed with tokens that are generated, over a radix cache, with all blocks
kept, since a chunk's size depends on who else is there, and with it what a policy selects. The cache is too
small for all prompts, so they are read again and again.

The server's memory is read while it runs and may not grow after a warm-up of a quarter of the time.
"""

import argparse
import asyncio
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import aiohttp
from answers import tokens
from judge import FLIPPED, RARELY, ROUNDING, compare, memory_mib, verdict

from flashprefill import sglang as plugin

PORT = 18439
LENGTHS = (40, 200, 500, 900, 1500, 2600, 4000)
PLAIN = [
    "--device", "cpu", "--attention-backend", "torch_native", "--skip-tokenizer-init", "--dtype", "float32",
    "--host", "127.0.0.1", "--port", str(PORT), "--mem-fraction-static", "0.3",
    "--max-running-requests", "8", "--random-seed", "1", "--log-level", "info", "--skip-server-warmup",
]  # fmt: skip
WAYS = {
    "whole": (
        ["--chunked-prefill-size", "-1", "--disable-radix-cache", "--max-total-tokens", "24576"],
        {"policy": "flashprefill", "alpha": 0.5, "sink_blocks": 1, "window_blocks": 2},
    ),
    "chunks": (
        [
            "--chunked-prefill-size",
            "512",
            "--enable-mixed-chunk",
            "--page-size",
            "16",
            "--max-total-tokens",
            "6144",
        ],
        {"policy": "dense"},
    ),
}


def serve(options, log):
    arguments, policy = WAYS[options.way]
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(options.model)]
    environment = {**os.environ, **plugin.config(**policy, log_seconds=30)}
    return subprocess.Popen(
        [*command, *PLAIN, *arguments], stdout=log, stderr=subprocess.STDOUT, env=environment
    )


async def ask(session, ids, new):
    body = {
        "input_ids": ids, "return_logprob": True, "top_logprobs_num": 2,
        "sampling_params": {"max_new_tokens": new, "temperature": 0, "ignore_eos": True},
    }  # fmt: skip
    async with session.post(f"http://127.0.0.1:{PORT}/generate", json=body) as response:
        if response.status != 200:
            raise RuntimeError(await response.text())
        found = await response.json()
    best = found["meta_info"]["output_top_logprobs"]
    assert len(best) == new, found["meta_info"]["finish_reason"]
    return found["output_ids"], [sorted((one[0] for one in two), reverse=True) for two in best]


async def wait_for(session, server):
    for _ in range(1200):
        try:
            async with session.get(f"http://127.0.0.1:{PORT}/health") as response:
                if response.status == 200:
                    return
        except aiohttp.ClientError:
            pass
        assert server.poll() is None, "the server ended"
        await asyncio.sleep(0.5)
    raise AssertionError("the server does not start")


async def soak(options, server):
    prompts = [tokens(n, n) for n in LENGTHS]
    if options.way == "chunks":  # each begins as the one before it, so that the radix cache has something
        prompts = [(a[: len(a) // 2] + b)[: len(b)] for a, b in zip([[], *prompts], prompts, strict=False)]
    counts = {"answers": 0, "left": 0, "errors": [], "swaps": []}
    memory, off = [], []
    timeout = aiohttp.ClientTimeout(total=1800)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        await wait_for(session, server)
        alone = [await ask(session, ids, options.new) for ids in prompts]
        begin = time.monotonic()

        def judge(i, answer, when):
            swap, by = compare(alone[i], answer)
            off.append(max(by, swap[1]) if swap else by)
            if swap:
                gap = round(swap[1], 5)
                counts["swaps"].append(
                    {"prompt": len(prompts[i]), "when": when, "token": swap[0], "gap": gap}
                )

        async def client(number):
            dice = random.Random(number)
            while time.monotonic() - begin < options.seconds:
                i = dice.randrange(len(prompts))
                call = ask(session, prompts[i], options.new)
                try:
                    if dice.random() < 0.1:
                        await asyncio.wait_for(call, dice.uniform(0.1, 2.0))
                    else:
                        answer = await call
                        counts["answers"] += 1
                        judge(i, answer, "busy")
                except (asyncio.TimeoutError, TimeoutError):
                    counts["left"] += 1
                except Exception as error:
                    counts["errors"].append(repr(error))
                    await asyncio.sleep(1)
                await asyncio.sleep(dice.uniform(0, 0.5))

        async def watch():
            while time.monotonic() - begin < options.seconds:
                memory.append((round(time.monotonic() - begin, 1), round(memory_mib(server.pid), 1)))
                await asyncio.sleep(min(5.0, options.seconds / 20))

        await asyncio.gather(watch(), *(client(number) for number in range(options.clients)))
        for i, ids in enumerate(prompts):
            judge(i, await ask(session, ids, options.new), "afterwards")
        async with session.get(f"http://127.0.0.1:{PORT}/server_info") as response:
            counts["plugin"] = (await response.json())["internal_states"][0]["flashprefill"]
    counts["off"] = {
        "median": statistics.median(off),
        "max": max(off),
        "beyond_rounding": sum(by > ROUNDING["float32"] for by in off),
        "limits": {"rounding": ROUNDING["float32"], "flipped": FLIPPED["float32"], "share": RARELY},
    }
    counts["wrong"] = verdict("float32", off)
    warm = [mib for second, mib in memory if second >= options.seconds / 4]
    half = len(warm) // 2
    counts["memory_mib"] = {
        "after_warm_up": max(warm[:half]), "second_half": max(warm[half:]), "all": memory
    }  # fmt: skip
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=Path(os.environ.get("FLASHPREFILL_MODELS", ".")) / "llama")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--way", default="whole", choices=WAYS)
    parser.add_argument("--log", type=Path, default=Path("soak-server.log"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with options.log.open("wb") as log:
        server = serve(options, log)
        try:
            counts = asyncio.run(soak(options, server))
            assert server.poll() is None, "the server ended"
        finally:
            server.terminate()
            server.wait(60)
    use, off = counts["memory_mib"], counts["off"]
    if options.out:
        from flashprefill.apps import machine

        result = {"schema": "flashprefill-sglang-soak/1", **machine.describe()}
        names = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
        result["command"] = shlex.join(["python", "tests/engines/sglang/soak.py", *names])
        result["versions"]["sglang"] = machine.version_of("sglang")
        arguments, policy = WAYS[options.way]
        result["settings"] = {
            "seconds": options.seconds, "clients": options.clients, "new_tokens": options.new,
            "model": Path(options.model).name, "prompts": LENGTHS, "arguments": arguments, "policy": policy,
        }  # fmt: skip
        options.out.write_text(json.dumps({**result, **counts}, indent=1) + "\n")
    print(
        f"{counts['answers']} answers, {counts['left']} clients left, {len(counts['errors'])} errors; off by "
        f"{off['median']:.6f} (median) to {off['max']:.6f}, {off['beyond_rounding']} by more than rounding; "
        f"{len(counts['swaps'])} answers parted; memory at most {use['after_warm_up']:.0f} MiB, then "
        f"{use['second_half']:.0f} MiB; {counts['plugin']}"
    )
    wrong = counts["errors"][:3] + ([counts["wrong"]] if counts["wrong"] else [])
    if use["second_half"] > 1.02 * use["after_warm_up"]:
        wrong.append("memory grew")
    density = counts["plugin"]["density"]
    if counts["plugin"]["fallbacks"] or (density == 1.0) != (options.way == "chunks"):
        wrong.append("the plugin was not what it should be")
    if wrong:
        sys.exit("soak: failed: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
