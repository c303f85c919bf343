"""FlexPrefill."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import refuse
from .base import Policy
from .library import DEFAULT

_GAMMAS = {"llama-3.1": 0.95, "glm-4": 0.95, "qwen2": 0.9, "yi-9b-200k": 0.9}  # FlexPrefill's scripts


@dataclass(frozen=True, repr=False)
class FlexPrefill(Policy):
    """FlexPrefill (arXiv 2502.20766): each head finds by itself what it keeps, from its last query rows.

    The softmax of the last ``block_size`` query rows over all keys is summed by key (columns) and by distance
    (diagonals). Where the pooled keys foretell the columns (Jensen-Shannon distance below ``tau``), the head
    is *query-aware*: blocks are kept by pooled scores of each block of queries, until they hold ``gamma`` of
    the head's whole map. Else it keeps columns and diagonals of blocks, as many as hold ``gamma`` of those
    rows' mass. The first column and the diagonal are kept always. See docs/methods/flexprefill.md.

    Args:
        gamma: share of the mass to keep, in (0, 1]. The authors use 0.95 for Llama-3.1-8B and GLM-4-9B, 0.9
            for Qwen2-7B and Yi-9B.
        tau: Jensen-Shannon distance, at least 0; 0 makes no head query-aware. The authors use 0.1.
        min_budget: tokens; columns and diagonals hold at least so many, rounded up to blocks.
        max_budget: tokens; at most so many; None is no limit.
        block_size: keys a block, and the query rows that are looked at; 128 is the paper.
        cover: a diagonal of tokens crosses two diagonals of blocks. "first" keeps the nearer of them, as
            published; "both" keeps both.
        sink_blocks: blocks kept at the beginning, beside what the policy keeps.
        window_blocks: blocks kept before and at the diagonal.
        dense_tail_blocks: blocks' worth of last query tiles that keep everything.
        mean_correction: blocks left out count by their means.
    """

    gamma: float = DEFAULT
    tau: float = DEFAULT
    min_budget: int = DEFAULT
    max_budget: int | None = DEFAULT
    block_size: int = DEFAULT
    cover: str = DEFAULT
    sink_blocks: int = DEFAULT
    window_blocks: int = DEFAULT
    dense_tail_blocks: int = DEFAULT
    mean_correction: bool = DEFAULT

    kind = "flexprefill"

    def _rules(self, values: dict[str, Any]) -> None:
        least, most = values["min_budget"], values["max_budget"]
        if most is not None and most < least:
            refuse("max_budget", most, f"at least min_budget ({least}), or None")

    @classmethod
    def own_names(cls, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return options by the names of our fields: FlexPrefill calls gamma "flex_prefill_gamma"."""
        return {name.removeprefix("flex_prefill_"): value for name, value in options.items()}

    @classmethod
    def for_model(cls, name: str, **changes: Any) -> FlexPrefill:
        """Return the policy that the authors' scripts use for a family of models.

        Args:
            name: "llama-3.1", "glm-4", "qwen2" or "yi-9b-200k".
            **changes: other fields of the policy.

        Raises:
            ValueError: the name is not known; the message lists those that are.
        """
        gamma = _GAMMAS.get(str(name).lower())
        if gamma is None:
            refuse("name", repr(name), "one of " + ", ".join(sorted(_GAMMAS)))
        return cls(**{"gamma": gamma, "tau": 0.1, "min_budget": 1024, **changes})
