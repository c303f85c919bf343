"""FlexPrefill."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import refuse
from .base import Policy
from .library import DEFAULT


@dataclass(frozen=True, repr=False)
class FlexPrefill(Policy):
    """FlexPrefill (arXiv 2502.20766): each head selects by itself, from its last query rows.

    The softmax of the last ``block_size`` query rows over all keys is summed by key (verticals) and by
    distance (slashes). If pooled queries and keys predict the verticals (Jensen-Shannon distance below
    ``tau``), the head is *query-aware*: it keeps blocks by the pooled scores of each block of queries, until
    they hold ``gamma`` of the head's whole map. Otherwise it keeps verticals and slashes of blocks, as many
    as hold ``gamma`` of those rows' mass. The first vertical and the diagonal are always kept. See
    docs/methods/flexprefill.md.

    Args:
        gamma: share of the mass to keep, in (0, 1]. The authors use 0.95 for Llama-3.1-8B and GLM-4-9B, 0.9
            for Qwen2-7B and Yi-9B.
        tau: Jensen-Shannon distance, at least 0; 0 makes no head query-aware. The authors use 0.1.
        min_budget: tokens that verticals and slashes hold at least, rounded up to blocks.
        max_budget: tokens that they hold at most; None: no limit.
        block_size: keys per block, and the number of query rows that are looked at; 128 is the paper's.
        cover: a slash of tokens crosses two slashes of blocks. "first" keeps the nearer one, as published;
            "both" keeps both.
        sink_blocks: blocks at the beginning that are always kept.
        window_blocks: blocks before and at the diagonal that are always kept.
        dense_tail_blocks: the last query tiles of a prompt, in blocks, that keep everything.
        mean_correction: blocks left out count by their means; "summary": 16 of them by one key.
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
    mean_correction: bool | str = DEFAULT

    kind = "flexprefill"

    def _rules(self, values: dict[str, Any]) -> None:
        least, most = values["min_budget"], values["max_budget"]
        if most is not None and most < least:
            refuse("max_budget", most, f"at least min_budget ({least}), or None")

    @classmethod
    def own_names(cls, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return options by the names of our fields: FlexPrefill calls gamma "flex_prefill_gamma"."""
        return {name.removeprefix("flex_prefill_"): value for name, value in options.items()}
