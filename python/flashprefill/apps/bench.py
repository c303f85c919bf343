"""`flashprefill bench`: attention alone, against PyTorch's, in one run and by turns.

Contenders are the policies (selection included in their time) and hand-made masks of given densities
(attention alone). They take turns so that a slow minute of a shared machine hits all alike, and medians are
compared. With one thread the clock is the process's CPU time, which other programs on the machine hardly
touch; with more it is the wall's. The baseline is PyTorch's scaled_dot_product_attention on the layout it
likes best, [batch, heads, tokens, head_dim] and contiguous. The ceiling is PyTorch's own product of two
square matrices, which takes its turns too: in bf16 where the processor multiplies it, else in fp32.

On a GPU each call is timed alone by events, its cache emptied before (device.py), and PyTorch's cuDNN
attention takes turns too where that is not what PyTorch picks by itself.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from .. import BlockMask, attend, backends, prefill_attention, select
from ..policies import Dense
from . import checks, factors, inputs, machine, models, table
from . import device as devices
from .device import CPU, Device
from .errors import UsageError
from .spec import parse_policy

SCHEMA = "flashprefill-bench/1"
DEFAULT_SHAPES = {"cpu": ("9/3x64x8K",), "cuda": ("32/8x128x16K", "32/8x128x64K")}
DEFAULT_POLICIES = ("dense", "flashprefill", "flashprefill(query_pool=16)", "sketch")
DEFAULT_DENSITIES = (0.5, 0.25, 0.1)
MATRIX = {"cpu": 2048, "cuda": 8192}  # rows; a smaller product takes an H200 less time than its launch
MATRIX_PRODUCT = "PyTorch matrix product"
CUDNN = "PyTorch SDPA, cuDNN"


@dataclass
class Options:
    """The command line's options."""

    shapes: Sequence[str] = ()  # those of the device
    policies: Sequence[str] = DEFAULT_POLICIES
    densities: Sequence[float] = DEFAULT_DENSITIES
    device: str = "auto"
    dtype: str = "auto"
    target: str | None = None
    backend: str | None = None
    threads: int | None = None
    repeats: int = 5
    out: Path | None = None


@dataclass
class Contender:
    """Something to time: its name, the call, and what is known of its mask."""

    name: str
    call: Callable[[], Any]
    density: float
    work: float  # floating-point operations
    selection: Callable[[], Any] = lambda: None  # alone
    seconds: list[float] = field(default_factory=list)
    select: list[float] = field(default_factory=list)


def contenders(
    shape: inputs.Shape, options: Options, dtype: torch.dtype, device: Device = CPU
) -> list[Contender]:
    """PyTorch's attention, the policies, and the hand-made masks, on one set of inputs."""
    q, k, v = inputs.make(shape, dtype, device=device.kind)
    where: dict[str, Any] = {"target": options.target, "backend": options.backend, "threads": options.threads}
    heads_first = [x.transpose(0, 1).contiguous()[None] for x in (q, k, v)]
    grouped = shape.q_heads != shape.kv_heads

    def sdpa(chosen: Any = None) -> Any:
        query, key, value = heads_first
        with nullcontext() if chosen is None else sdpa_kernel(chosen):
            return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)

    work = 2.0 * shape.q_heads * shape.head_dim * shape.tokens * (shape.tokens + 1)
    # On CPUs without a 16-bit instruction PyTorch's product is a slow scalar loop, which is no ceiling.
    has_product = device.cuda or (dtype is torch.bfloat16 and machine.supports_bf16())
    rows = MATRIX[device.kind]
    square = torch.randn(rows, rows, device=device.kind).to(dtype if has_product else torch.float32)
    found = [
        Contender("PyTorch SDPA", sdpa, 1.0, work),
        Contender(f"{MATRIX_PRODUCT}, {rows}^3", lambda: square @ square, 1.0, 2.0 * rows**3),
    ]
    if device.cuda and picked(shape, device, dtype) != "cudnn attention" and runs_cudnn(sdpa):
        found.insert(1, Contender(CUDNN, lambda: sdpa(SDPBackend.CUDNN_ATTENTION), 1.0, work))
    asked = [Dense(), *(policy for policy in map(parse_policy, options.policies) if policy.text != "dense")]
    for policy in asked:
        _, stats = prefill_attention(q, k, v, policy, return_stats=True, **where)
        call = lambda policy=policy: prefill_attention(q, k, v, policy, **where)  # noqa: E731
        values = v if policy.reads_values else None
        alone = lambda policy=policy, v=values: select(q, k, policy, v=v, **where)  # noqa: E731
        density = stats.mean_density
        found.append(Contender(policy.text, call, density, work * density, alone))
    for density in options.densities:
        keep = inputs.random_mask(shape, density).to(device.kind)
        mask = BlockMask.from_dense(keep, q_len=shape.tokens, k_len=shape.tokens)
        call = lambda mask=mask: attend(q, k, v, mask, **where)  # noqa: E731
        name = f"random mask, density {density:g}"
        found.append(Contender(name, call, mask.density, work * mask.density))
    return found


def picked(shape: inputs.Shape, device: Device, dtype: torch.dtype) -> str | None:
    """Which of its attentions PyTorch picks on a GPU."""
    return device.sdpa_backend(shape.q_heads, shape.kv_heads, shape.head_dim, shape.tokens, dtype)


def runs_cudnn(sdpa: Callable[[Any], Any]) -> bool:
    """Whether PyTorch's cuDNN attention takes these inputs."""
    try:
        sdpa(SDPBackend.CUDNN_ATTENTION)
    except RuntimeError:
        return False
    return True


def time_by_turns(
    found: Sequence[Contender],
    repeats: int,
    device: Device = CPU,
    progress: Callable[[], Any] = lambda: None,
) -> None:
    """One untimed call each, then `repeats` turns of all."""
    with torch.inference_mode():
        for turn in range(repeats + 1):
            for one in found:
                seconds, selecting = device.timed_policy(one.call, one.selection)
                if turn:
                    one.seconds.append(seconds)
                    one.select.append(selecting)
                progress()


def rows_of(shape: inputs.Shape, found: Sequence[Contender]) -> list[dict[str, Any]]:
    """Return the figures of one shape; rates count the kept part of the causal triangle."""
    base = statistics.median(found[0].seconds)
    ours = statistics.median(next(one.seconds for one in found if one.name == "dense"))
    return [
        {
            "shape": str(shape),
            "name": one.name,
            "density": one.density,
            "seconds": {
                "median": statistics.median(one.seconds),
                "min": min(one.seconds),
                "all": one.seconds,
            },
            "select_seconds": statistics.median(one.select),
            "speedup": None if one.name.startswith(MATRIX_PRODUCT) else base / statistics.median(one.seconds),
            "speedup_over_our_dense": ours / statistics.median(one.seconds),
            # The fastest selection: another process may stretch one beyond the whole call, never all of them.
            "gflops": one.work / (statistics.median(one.seconds) - min(one.select)) / 1e9,
        }
        for one in found
    ]


def check(options: Options) -> None:
    """Refuse what argparse cannot know."""
    if options.repeats < 1:
        raise UsageError(f"--repeats {options.repeats}: must be at least 1")
    if options.threads is not None and options.threads < 1:
        raise UsageError(f"--threads {options.threads}: must be at least 1")
    for density in options.densities:
        if not 0.0 < density <= 1.0:
            raise UsageError(f"--density {density:g}: must be above 0 and at most 1")
    checks.can_write(options.out)
    here = {backend.name: backend for backend in backends() if backend.available}
    if options.backend is not None and options.backend not in here:
        raise UsageError(f"--backend {options.backend}: must be one of {', '.join(here)}")
    targets = [t for b in here.values() if options.backend in (None, b.name) for t in b.targets]
    if options.target is not None and options.target not in targets:
        raise UsageError(f"--target {options.target}: must be one of {', '.join(targets) or 'none here'}")


def device_for(options: Options) -> Device:
    """Return the device of the options, which a backend or an instruction set may imply."""
    asked = options.device
    if asked == "auto":
        on_gpu = [t for b in backends() if b.name == "cuda" and b.available for t in b.targets]
        if options.backend == "cuda" or options.target in on_gpu:
            asked = "cuda"
        elif options.target is not None or options.backend is not None:
            asked = "cpu"
    device = devices.resolve(asked, options.dtype)
    # With one thread the CPU's clock is the process's.
    one_thread = not device.cuda and torch.get_num_threads() == 1
    return Device(device.kind, time.process_time) if one_thread else device


def measure(options: Options) -> dict[str, Any]:
    """Run all shapes; returns what the JSON file holds."""
    check(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = device_for(options)
    shapes = [inputs.parse_shape(text) for text in options.shapes or DEFAULT_SHAPES[device.kind]]
    dtype = models.resolve_dtype(options.dtype, device)
    busy = machine.busy()
    if busy:
        print(f"note: {busy}", file=sys.stderr)
    from tqdm import tqdm

    rows: list[dict[str, Any]] = []
    sdpa = {}
    with tqdm(unit="call", leave=False, file=sys.stderr, disable=None) as bar:
        for shape in shapes:
            bar.set_description(str(shape))
            found = contenders(shape, options, models.torch_dtype(dtype), device)
            time_by_turns(found, options.repeats, device, bar.update)
            rows += rows_of(shape, found)
            sdpa[str(shape)] = picked(shape, device, models.torch_dtype(dtype))
    settings = {
        "device": device.kind,
        "sdpa": sdpa if device.cuda else None,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "target": options.target,
        "backend": options.backend,
        "clock": "events" if device.cuda else "cpu" if device.clock is time.process_time else "wall",
        "torch_target": torch.backends.cpu.get_cpu_capability(),
    }
    return {
        "schema": SCHEMA,
        **machine.describe(device.facts()),
        "settings": {**settings, "repeats": options.repeats, "busy": busy},
        "rows": rows,
    }


def run(options: Options) -> dict[str, Any]:
    """Measure, print the table, write the file."""
    results = measure(options)
    settings = results["settings"]
    target = settings["target"] or "best target"
    gpu = settings["device"] == "cuda"
    print(
        f"{machine.computed_on(results)}, {settings['dtype']}"
        + (f", {target}" if settings["target"] or not gpu else "")
    )
    digits, unit = (3, 1e12) if gpu else (1, 1e9)
    for shape in dict.fromkeys(row["shape"] for row in results["rows"]):
        lines = [
            [
                factors.OURS if row["name"] == "dense" else row["name"],
                f"{row['density']:.3f}",
                f"{row['seconds']['median'] * 1e3:.{digits}f}",
                f"{row['seconds']['min'] * 1e3:.{digits}f}",
                f"{row['select_seconds'] * 1e3:.{max(2, digits)}f}",
                f"{row['gflops'] * 1e9 / unit:.0f}",
                f"{row['speedup']:.2f}x" if row["speedup"] else "",
                f"{row['speedup_over_our_dense']:.2f}x" if row["speedup"] else "",
            ]
            for row in results["rows"]
            if row["shape"] == shape
        ]
        picks = f"; SDPA picks {settings['sdpa'][shape]}" if gpu else ""
        print(f"\n{shape} (query heads / KV heads x head_dim x tokens){picks}")
        rate = "TFLOP/s" if gpu else "GFLOP/s"
        header = ("", "density", "median\nms", "best\nms", "select\nms", rate, "speed-up", "over our\ndense")
        print(table.render(header, lines))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(f"\n{options.out}")
    return results
