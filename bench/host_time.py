"""Host time per call of the Python API on small inputs, of several versions of the package in turn.

    python bench/host_time.py new=python old=../old/python [--rounds 40] [--torch]

Each NAME=FOLDER is a folder to put on PYTHONPATH; FLASHPREFILL_LIBRARY may name the library for all of them.
Inputs are so small (16 tokens, 2 heads, head_dim 16) that the kernel is a tenth of a call. Every version has
a process of its own; they take turns, round by round, so that a busy machine hits all alike. Printed are the
least and the median microseconds of processor time per call.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

CALLS = 100  # per round and case


def cases(with_torch: bool) -> dict[str, Callable[[], Any]]:
    """Return the calls to time, by name."""
    import numpy as np

    import flashprefill as fp

    x = np.zeros((16, 2, 16), np.float32)
    out, policy = np.empty_like(x), fp.FlashPrefill()
    found: dict[str, Callable[[], Any]] = {
        "numpy": lambda: fp.prefill_attention(x, x, x, policy),
        "numpy, out": lambda: fp.prefill_attention(x, x, x, policy, out=out),
        "numpy, statistics": lambda: fp.prefill_attention(x, x, x, policy, return_stats=True),
        "numpy, select": lambda: fp.select(x, x, policy),
    }
    if with_torch:
        import torch

        t = torch.from_numpy(x)
        into = torch.empty_like(t)
        found["torch"] = lambda: fp.prefill_attention(t, t, t, policy)
        found["torch, out"] = lambda: fp.prefill_attention(t, t, t, policy, out=into)
    return found


def serve(with_torch: bool) -> None:
    """Run a round for each line of stdin, and print its times."""
    calls = cases(with_torch)
    for _ in sys.stdin:
        times = {}
        for name, call in calls.items():
            begin = time.process_time_ns()
            for _ in range(CALLS):
                call()
            times[name] = (time.process_time_ns() - begin) / CALLS / 1e3
        print(json.dumps(times), flush=True)


def main() -> None:
    """Let the versions take turns, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", metavar="NAME=FOLDER")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--torch", action="store_true", help="time torch tensors too")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.torch)
    processes = {}
    for version in options.versions:
        name, _, folder = version.partition("=")
        command = [sys.executable, __file__, "--serve", *(["--torch"] if options.torch else [])]
        env = {**os.environ, "PYTHONPATH": os.path.abspath(folder), "OMP_NUM_THREADS": "1"}
        pipe: Any = subprocess.PIPE
        processes[name] = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env)
    times: dict[tuple[str, str], list[float]] = {}
    for turn in range(options.rounds + 2):
        for name, process in processes.items():
            assert process.stdin is not None and process.stdout is not None
            print(file=process.stdin, flush=True)
            for case, taken in json.loads(process.stdout.readline()).items():
                if turn >= 2:  # the first two are warm-up
                    times.setdefault((case, name), []).append(taken)
    for (case, name), taken in sorted(times.items()):
        print(f"{case:18} {name:8} least {min(taken):7.1f}   median {statistics.median(taken):7.1f} us")
    for process in processes.values():
        process.communicate()


if __name__ == "__main__":
    main()
