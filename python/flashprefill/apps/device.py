"""The device of an app: all differences between a CPU and a GPU, so that every app has one path.

Work on a GPU is only asked for when a call returns. So its time is taken between two events on the GPU, or
on the host's clock once everything that was asked for is done. A call that is timed alone finds the GPU busy
with emptying its cache: then the host is ahead, as it is in a model that keeps the GPU busy, and what is
measured is the GPU's time and not Python's.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from .. import backends, collect_timings
from .errors import UsageError

_FLUSH_BYTES = 256 << 20  # five times the largest L2
_FLUSHES = 8  # about half a millisecond on an H200; Python takes a quarter of that for a call


def torch_lacks() -> str | None:
    """Why PyTorch can't use a GPU here, or None if it can."""
    try:
        import torch
    except ImportError:
        return "PyTorch is not installed"
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"this PyTorch ({torch.__version__}) is built without CUDA"
    return f"PyTorch has CUDA {torch.version.cuda} but finds no usable device or driver"


def lacks() -> str | None:
    """Why the apps can't use a GPU here, or None if they can: PyTorch and our CUDA backend both must."""
    ours = next((backend for backend in backends() if backend.name == "cuda"), None)
    without = torch_lacks()
    if without is not None:
        return without
    if ours is None:
        return "this flashprefill is built without CUDA (-DFLASHPREFILL_CUDA=ON builds it in)"
    return None if ours.available else f"flashprefill's CUDA backend can't run here: {ours.description}"


def resolve(asked: str, dtype: str = "auto") -> Device:
    """The device that `--device` asks for; auto takes a GPU where there is one that computes in the dtype."""
    if asked == "auto" and dtype == "fp32":
        return CPU
    without = None if asked == "cpu" else lacks()
    if asked == "cuda" and without is not None:
        raise UsageError(f"--device cuda: {without}")
    return CPU if asked == "cpu" or without is not None else Device("cuda")


@dataclass
class Span:
    """The time of a block of code."""

    read: Callable[[], float] = field(default=lambda: 0.0)

    @property
    def seconds(self) -> float:
        """Its seconds; on a GPU this waits for it."""
        return self.read()


@dataclass(frozen=True)
class Device:
    """A CPU or a GPU."""

    kind: str
    clock: Callable[[], float] = time.perf_counter  # of the host

    @property
    def cuda(self) -> bool:
        """Whether it is a GPU."""
        return self.kind == "cuda"

    @property
    def auto_dtype(self) -> str:
        """The default dtype of models and inputs."""
        from . import machine

        return "bf16" if self.cuda or machine.supports_bf16() else "fp32"

    @property
    def digits(self) -> int:
        """Decimal places that milliseconds are printed with."""
        return 3 if self.cuda else 1

    def free_bytes(self) -> int:
        """Memory that is free: a GPU's, or half of what the machine has."""
        if not self.cuda:
            return (os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) // 2
        import torch

        return int(torch.cuda.mem_get_info()[0])

    def facts(self) -> dict[str, Any] | None:
        """A GPU's description for results."""
        if not self.cuda:
            return None
        import torch

        about = torch.cuda.get_device_properties(torch.cuda.current_device())
        cudnn: Any = torch.backends.cudnn
        return {
            "name": about.name,
            "memory_gib": round(about.total_memory / 2**30, 1),
            "multiprocessors": about.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": cudnn.version(),
        }

    def describe(self, threads: int) -> str:
        """The device in words."""
        from . import machine

        about = self.facts()
        return f"{threads} threads on {machine.cpu_model()}" if about is None else str(about["name"])

    def now(self) -> float:
        """The host's clock after all launched work is done."""
        if self.cuda:
            import torch

            torch.cuda.synchronize()
        return self.clock()

    @contextmanager
    def span(self) -> Iterator[Span]:
        """Time a block that is one of many; on a GPU without waiting for it."""
        span = Span()
        if not self.cuda:
            begin = self.clock()
            yield span
            seconds = self.clock() - begin
            span.read = lambda: seconds
            return
        import torch

        event: Any = torch.cuda.Event
        first, last = event(enable_timing=True), event(enable_timing=True)
        first.record()
        yield span
        last.record()

        def read() -> float:
            last.synchronize()
            return float(first.elapsed_time(last)) / 1e3

        span.read = read

    def timed(self, call: Callable[[], Any]) -> tuple[Any, float]:
        """Call something alone; return its result and its seconds."""
        if self.cuda:
            for _ in range(_FLUSHES):
                _scratch().zero_()
        with self.span() as span:
            result = call()
        return result, span.seconds

    def timed_policy(self, call: Callable[[], Any], select: Callable[[], Any]) -> tuple[float, float]:
        """Seconds of a prefill, and of the selection in it.

        The CPU's own clock stands between the two. On a GPU nothing does, and a selection alone is timed.
        """
        with collect_timings() as parts:
            _, seconds = self.timed(call)
        return seconds, self.timed(select)[1] if self.cuda else parts.select_seconds

    def sdpa_backend(self, q_heads: int, kv_heads: int, head_dim: int, tokens: int, dtype: Any) -> str | None:
        """What PyTorch picks by itself for its causal attention on a GPU, as it names it."""
        if not self.cuda:
            return None
        import torch
        from torch.nn.attention import SDPBackend

        q, k = (
            torch.empty(1, heads, tokens, head_dim, dtype=dtype, device=self.kind)
            for heads in (q_heads, kv_heads)
        )
        choice = torch._fused_sdp_choice(q, k, k, is_causal=True, enable_gqa=q_heads != kv_heads)
        return SDPBackend(choice).name.lower().replace("_", " ")


@functools.cache
def _scratch() -> Any:
    import torch

    with torch.inference_mode(False):  # it outlives the block that is timed first
        return torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")


CPU = Device("cpu")
