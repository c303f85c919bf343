"""`flashprefill info`: what is installed, what runs here, and why the rest does not."""

from __future__ import annotations

import json
from typing import Any

from .. import backends, library_path, library_version, thread_runtime
from . import device, machine


def gpu_line() -> str:
    """The GPU that torch sees, or why there is none."""
    without = device.torch_lacks()
    if without is not None:
        return f"none: {without}"
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{', '.join(names)} (CUDA {torch.version.cuda})"


def gather() -> dict[str, Any]:
    """All facts as plain data."""
    facts = machine.describe()
    facts["library"] = {"version": library_version(), "path": library_path()}
    facts["threads"] = thread_runtime()
    facts["gpu"] = gpu_line()
    facts["default_device"] = device.resolve("auto").kind
    facts["default_dtype"] = device.resolve("auto").auto_dtype
    facts["backends"] = [
        {"name": b.name, "available": b.available, "description": b.description, "targets": list(b.targets)}
        for b in backends()
    ]
    return facts


def run(as_json: bool) -> None:
    """Print the facts."""
    facts = gather()
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    here, versions = facts["machine"], facts["versions"]
    lines = [
        ("flashprefill", f"{facts['library']['version']}  {facts['library']['path']}"),
        ("processor", f"{here['cpu']}, {here['cpus']} CPUs, {here['memory_gib']} GiB"),
        ("features", " ".join(here["features"]) or "none of those that matter here"),
        ("device", f"{facts['default_device']} and {facts['default_dtype']} by default"),
        ("threads", facts["threads"]),
        ("GPU", facts["gpu"]),
    ]
    lines += [
        (name, version or "not installed") for name, version in versions.items() if name != "flashprefill"
    ]
    for backend in facts["backends"]:
        text = backend["description"] if backend["available"] else f"can't run here: {backend['description']}"
        lines.append((f"backend {backend['name']}", text))
        if backend["targets"]:
            lines.append(("", "targets: " + " ".join(backend["targets"])))
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        print(f"{name.ljust(width)}  {text}")
