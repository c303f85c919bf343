"""A contender of the demo and its figures: what demo.py measures, and pictures.py draws."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..guard import GuardSummary
from ..policies import Dense, Policy


@dataclass
class Method:
    """One contender and its measurements; lists have one entry per timed turn."""

    label: str
    policy: Policy | None
    ttft: list[float] = field(default_factory=list)
    attention: list[float] = field(default_factory=list)
    select: list[float] = field(default_factory=list)
    host_share: list[float] = field(
        default_factory=list
    )  # on a GPU: share of ttft until all work was launched
    density: Any = None  # [layers, heads]
    guard: GuardSummary | None = None  # of the last pass that had one
    fallbacks: dict[str, int] = field(default_factory=dict)  # layers that ran dense, by reason
    kl: float | None = None
    top1: float | None = None
    needles: list[dict[str, Any]] = field(default_factory=list)

    @property
    def selects(self) -> bool:
        """Whether it leaves anything out: it is neither PyTorch's dense attention nor ours."""
        return self.policy is not None and not (isinstance(self.policy, Dense) and self.policy.exact)
