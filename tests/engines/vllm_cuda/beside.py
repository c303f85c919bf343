"""The engine's own kernel beside ours, in each layer of each batch that has sparse rows.

In bf16 a token test is weak: two good kernels round differently, and greedy tokens part at the first near
tie. So after our `forward` the engine's own runs over the whole batch, into a buffer of its own, and the
difference is kept.
"""

import contextlib
from dataclasses import dataclass

import torch

from flashprefill.vllm import backend, sparse


@dataclass
class Difference:
    """Of one layer of one batch.

    Attributes:
        rows: rows of ours, and of the batch.
        worst: largest difference in units of the last place of the dtype at the largest value.
        rms: root mean square of the difference over that of the values.
        beside: `worst` of the rows that are the engine's own in both.
    """

    rows: tuple[int, int]
    worst: float
    rms: float
    beside: float
    finite: bool


def _difference(plan, ours, engine):
    x, y = ours.float(), engine.float()
    unit = torch.finfo(ours.dtype).eps * max(float(y.abs().max()), 1e-6)
    mine = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for call in plan.calls:
        mine[call.span.begin : call.span.end] = True
    gap = (x - y).abs() / unit
    rms = float((x - y)[mine].pow(2).mean().sqrt() / y[mine].pow(2).mean().sqrt())
    beside = float(gap[~mine].max()) if bool((~mine).any()) else 0.0
    rows = int(mine.sum()), len(x)
    return Difference(rows, float(gap[mine].max()), rms, beside, bool(torch.isfinite(x).all()))


@contextlib.contextmanager
def engines_own():
    """Compare inside the block; gives the list that differences go to."""
    ours, found = backend.ImplMixin.forward, []

    def forward(self, layer, query, key, value, kv_cache, metadata, output, *scales, **more):
        result = ours(self, layer, query, key, value, kv_cache, metadata, output, *scales, **more)
        plan = getattr(metadata, sparse.ATTRIBUTE, None)
        if plan is not None:
            other = torch.zeros_like(output)
            super(backend.ImplMixin, self).forward(
                layer, query, key, value, kv_cache, metadata, other, *scales, **more
            )
            rows = metadata.num_actual_tokens
            found.append(_difference(plan, output[:rows], other[:rows]))
        return result

    backend.ImplMixin.forward = forward
    try:
        yield found
    finally:
        backend.ImplMixin.forward = ours


def assert_equal(found, worst=2.0, rms=0.006):
    """All differences are rounding: at most `worst` units of the last place, and this much on average."""
    assert found, "no batch had sparse rows"
    for difference in found:
        assert difference.finite, difference
        assert difference.worst <= worst and difference.beside <= worst and difference.rms <= rms, difference
