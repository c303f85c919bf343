"""What a guard finds in an engine: the results of many calls, summed up where they lie.

Each layer's call writes how much of the attention its heads kept. Sums of these are kept on the device that
computes, and read now and then together with the other counters, so that nothing waits for a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from ..guard import OUTCOMES, GuardSummary, certificate

if TYPE_CHECKING:
    import torch

    Places: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

SUMS = 3 + len(OUTCOMES)  # moments of the audited rows' recalls; heads by outcome
CALLS = 32  # whose results lie in one buffer, summed at once


class Findings:
    """Results of up to `CALLS` calls for as many sequences and heads.

    Args:
        batch: sequences of a call.
        heads: query heads.
        device: where the calls compute.

    Attributes:
        shares: float32 [calls, 3, batch, heads]: recall, its lower bound, its 5th percentile.
        numbers: int32 [calls, 3, batch, heads]: rows audited, the block missed most, the outcome; -1 where no
            call has written.
        moments: float64 [calls, batch, 3]: of the audited rows' recalls.
        used: calls so far.
    """

    def __init__(self, batch: int, heads: int, device: torch.device) -> None:
        import torch

        self.shares = torch.zeros((CALLS, 3, batch, heads), dtype=torch.float32, device=device)
        self.numbers = torch.full((CALLS, 3, batch, heads), -1, dtype=torch.int32, device=device)
        self.moments = torch.zeros((CALLS, batch, 3), dtype=torch.float64, device=device)
        self.used = 0

    def next(self) -> Places | None:
        """Return the next call's shares, numbers and moments; None if there is no room."""
        if self.used == CALLS:
            return None
        self.used += 1
        i = self.used - 1
        return self.shares[i], self.numbers[i], self.moments[i]

    def sums(self) -> torch.Tensor:
        """Return what `summary` makes figures of, float64 [SUMS]."""
        return sums_of(self.numbers, self.moments)


def sums_of(numbers: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """Sum results up: of calls, or of one call, as `Findings` has them. float64 [SUMS]."""
    import torch

    outcome = numbers.select(-3, 2)
    parts = [
        moments.reshape(-1, 3).sum(0),
        *((outcome == i).sum(dtype=torch.float64)[None] for i in range(len(OUTCOMES))),
    ]
    return torch.cat(parts)


def summary(sums: Sequence[float], risk: float) -> GuardSummary:
    """Return sums as figures, without a 5th percentile."""
    moments, counts = sums[:3], [int(x) for x in sums[3:]]
    return GuardSummary(
        moments[1] / moments[0] if moments[0] else 1.0,
        math.nan,
        certificate(moments, risk),
        sum(counts),
        dict(zip(OUTCOMES, counts, strict=True)),
    )


def figures(sums: Sequence[float], risk: float) -> dict[str, Any]:
    """Return sums for a snapshot: figures, and the sums, of which two snapshots' difference may be taken."""
    found = summary(sums, risk)
    return {
        "recall": round(found.recall, 5),
        "at_least": round(found.certificate, 5),
        "heads": found.heads,
        **found.outcomes,
        "risk": risk,
        "sums": list(sums),
    }
