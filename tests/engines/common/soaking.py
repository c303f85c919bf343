"""A soak: a server under many clients for a while; no error, no growth, the answers of quiet times.

Clients ask prompts of mixed lengths over and over, some leave before the answer. Before that each prompt is
asked alone. An answer may part from that one only at a token where the two best were near each other, and the
distances between the two best before it may have moved by rounding alone (judge.py). The server's memory is
read while it runs and may not grow after a warm-up of a quarter of the time.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from judge import FLIPPED, RARELY, ROUNDING, compare, memory_mib, verdict

LENGTHS = (40, 200, 500, 900, 1500, 2600, 4000)


@contextlib.asynccontextmanager
async def alone(session, prompts):
    """No company: nothing but the prompts is asked."""
    yield []


@dataclass
class Engine:
    """What a soak has to know of an engine.

    Attributes:
        name: of its package ("vllm"), which results are called after.
        packages: that its version may be read from, in this order.
        command: starts its server.
        environment: of the server, beside this process's.
        url: where it listens.
        prompts: lists of token ids.
        ask: (session, ids, new) to (tokens, the log-probabilities of each one's two best, larger first).
        dtype: the model's.
        settings: for the file of results.
        counted: (session) to what the plugin counted, once everybody has left; None: there is no way to ask.
        company: (session, prompts) to a context in which requests run all the time; gives their tasks.
    """

    name: str
    packages: tuple[str, ...]
    command: list[str]
    environment: dict[str, str]
    url: str
    prompts: list[list[int]]
    ask: Callable[..., Awaitable[Any]]
    dtype: str
    settings: dict[str, Any]
    counted: Callable[..., Awaitable[Any]] | None = None
    company: Callable[..., Any] = alone


def parser(doc, model):
    """The options that all soaks have.

    Args:
        doc: the description.
        model: the default's name, a folder beside the engine's environment.
    """
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    found.add_argument("--model", default=Path(os.environ.get("FLASHPREFILL_MODELS", ".")) / model)
    found.add_argument("--seconds", type=float, default=600)
    found.add_argument("--clients", type=int, default=4)
    found.add_argument("--new", type=int, default=16)
    found.add_argument("--log", type=Path, default=Path("soak-server.log"))
    found.add_argument("--out", type=Path)
    return found


async def is_up(session, engine, server):
    """Wait until the server answers."""
    for _ in range(1200):
        try:
            async with session.get(f"{engine.url}/health") as response:
                if response.status == 200:
                    return
        except aiohttp.ClientError:
            pass
        assert server.poll() is None, "the server ended"
        await asyncio.sleep(0.5)
    raise AssertionError("the server does not start")


class Clients:
    """Asks, and judges answers against those given in quiet times."""

    def __init__(self, engine, options, session):
        self.engine, self.options, self.session = engine, options, session
        self.counts = {"answers": 0, "left": 0, "errors": [], "swaps": []}
        self.off = []  # by how much each answer was

    async def quiet(self):
        """Ask each prompt once, one after the other."""
        return [await self.ask(i) for i in range(len(self.engine.prompts))]

    async def ask(self, i):
        """Ask a prompt."""
        return await self.engine.ask(self.session, self.engine.prompts[i], self.options.new)

    def judge(self, i, expected, answer, when):
        """Note by how much an answer is off."""
        swap, by = compare(expected[i], answer)
        self.off.append(max(by, swap[1]) if swap else by)
        if swap:
            where = {"prompt": len(self.engine.prompts[i]), "when": when, "token": swap[0]}
            self.counts["swaps"].append({**where, "gap": round(swap[1], 5)})

    async def one(self, number, expected, end):
        """Be a client until a moment of time.monotonic."""
        dice = random.Random(number)
        while time.monotonic() < end:
            i = dice.randrange(len(self.engine.prompts))
            call = self.ask(i)
            try:
                if dice.random() < 0.1:
                    await asyncio.wait_for(call, dice.uniform(0.1, 2.0))
                else:
                    answer = await call
                    self.counts["answers"] += 1
                    self.judge(i, expected, answer, "busy")
            except (asyncio.TimeoutError, TimeoutError):
                self.counts["left"] += 1
            except Exception as error:
                self.counts["errors"].append(repr(error))
                await asyncio.sleep(1)
            await asyncio.sleep(dice.uniform(0, 0.5))


async def watch(pid, begin, seconds):
    """Read the memory of a process now and then: pairs of seconds and MiB."""
    memory = []
    while time.monotonic() < begin + seconds:
        memory.append((round(time.monotonic() - begin, 1), round(memory_mib(pid), 1)))
        await asyncio.sleep(min(5.0, seconds / 20))
    return memory


async def soak(engine, options, server):
    """Keep a server busy; returns what was counted."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=1800)) as session:
        await is_up(session, engine, server)
        clients = Clients(engine, options, session)
        async with engine.company(session, engine.prompts) as company:
            expected = await clients.quiet()
            begin = time.monotonic()
            crowd = (clients.one(n, expected, begin + options.seconds) for n in range(options.clients))
            memory, *_ = await asyncio.gather(watch(server.pid, begin, options.seconds), *crowd)
            for i, answer in enumerate(await clients.quiet()):
                clients.judge(i, expected, answer, "afterwards")
            clients.counts["errors"] += [repr(task.exception()) for task in company if task.done()]
        if engine.counted is not None:
            clients.counts["plugin"] = await engine.counted(session)
    return {**clients.counts, **judged(clients.off, memory, engine.dtype, options.seconds)}


def judged(off, memory, dtype, seconds):
    """What of a run's numbers is held against limits."""
    warm = [mib for second, mib in memory if second >= seconds / 4]
    half = len(warm) // 2
    return {
        "off": {
            "median": statistics.median(off),
            "max": max(off),
            "beyond_rounding": sum(by > ROUNDING[dtype] for by in off),
            "limits": {"rounding": ROUNDING[dtype], "flipped": FLIPPED[dtype], "share": RARELY},
        },
        "wrong": verdict(dtype, off),
        "memory_mib": {
            "after_warm_up": max(warm[:half]), "second_half": max(warm[half:]), "all": memory
        },
    }  # fmt: skip


def write(engine, options, counts):
    """Write the file of results."""
    from flashprefill.apps import machine

    result = {"schema": f"flashprefill-{engine.name}-soak/1", **machine.describe()}
    names = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    result["command"] = shlex.join(["python", f"tests/engines/{engine.name}/soak.py", *names])
    versions = map(machine.version_of, engine.packages)
    result["versions"][engine.name] = next(filter(None, versions), None)
    common = {"seconds": options.seconds, "clients": options.clients, "new_tokens": options.new}
    result["settings"] = {**common, "prompts": [len(ids) for ids in engine.prompts], **engine.settings}
    options.out.write_text(json.dumps({**result, **counts}, indent=1) + "\n")


def run(engine, options, what_is_wrong):
    """Serve, soak, write, print; end with a message if something is wrong.

    Args:
        engine: what runs.
        options: of `parser`.
        what_is_wrong: (counts) to messages about the plugin; it may put what a server's log says into
            ``counts["plugin"]``.
    """
    with options.log.open("wb") as log:
        environment = {**os.environ, **engine.environment}
        server = subprocess.Popen(engine.command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            counts = asyncio.run(soak(engine, options, server))
            assert server.poll() is None, "the server ended"
        finally:
            server.terminate()
            server.wait(60)
    wrong = what_is_wrong(counts)
    if options.out:
        write(engine, options, counts)
    use, off = counts["memory_mib"], counts["off"]
    print(
        f"{counts['answers']} answers, {counts['left']} clients left, {len(counts['errors'])} errors; off by "
        f"{off['median']:.6f} (median) to {off['max']:.6f}, {off['beyond_rounding']} by more than rounding; "
        f"{len(counts['swaps'])} answers parted; memory at most {use['after_warm_up']:.0f} MiB, then "
        f"{use['second_half']:.0f} MiB; {counts['plugin']}"
    )
    wrong = counts["errors"][:3] + ([counts["wrong"]] if counts["wrong"] else []) + wrong
    if use["second_half"] > 1.02 * use["after_warm_up"]:
        wrong.append("memory grew")
    if wrong:
        sys.exit("soak: failed: " + "; ".join(wrong))
