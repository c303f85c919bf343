"""What a selection kept on one rank, and over all of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from .._abi import FALLBACK_NAMES
from ..stats import Stats

_NOT_HERE = -2  # of a prompt without rows on this rank


class ShardStats:
    """How many blocks of keys the rows of one rank kept, or after :meth:`over_ranks` those of all.

    As :class:`flashprefill.Stats`, nothing is read from a GPU before an attribute is.
    """

    def __init__(
        self,
        parts: Sequence[tuple[int, Sequence[int], Stats]],
        prompts: int,
        heads: int,
        over_heads: bool,
    ) -> None:
        """Join the statistics of several calls.

        Args:
            parts: of each call its first mask head, the prompts that its sequences belong to, and its
                statistics.
            prompts: how many prompts there are.
            heads: mask heads of all calls together.
            over_heads: ranks have all rows of some heads, not some rows of all heads.
        """
        self._parts = list(parts)
        self._prompts, self._heads, self._over_heads = prompts, heads, over_heads
        self._read: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    def _values(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if self._read is None:
            kept = np.zeros((self._prompts, self._heads), np.int64)
            total = np.zeros(self._prompts, np.int64)
            fallback = np.full(self._prompts, _NOT_HERE, np.int32)
            for head, owners, stats in self._parts:
                here, possible, reasons = (np.asarray(x) for x in (stats.kept, stats.total, stats.fallback))
                for sequence, prompt in enumerate(owners):
                    kept[prompt, head : head + here.shape[1]] += here[sequence]
                    total[prompt] += possible[sequence] if head == 0 else 0
                    fallback[prompt] = _join(fallback[prompt], reasons[sequence])
            self._read = kept, total, fallback
        return self._read

    @property
    def kept(self) -> torch.Tensor:
        """Kept blocks summed over tiles, int64 [prompts, mask heads]."""
        return torch.from_numpy(self._values()[0])

    @property
    def total(self) -> torch.Tensor:
        """Blocks that some row of their tile may see, summed over one head's tiles, int64 [prompts]."""
        return torch.from_numpy(self._values()[1])

    @property
    def density(self) -> torch.Tensor:
        """Kept / total, float64 [prompts, mask heads]; 1 where there is nothing to keep."""
        kept, total, _ = self._values()
        share = np.ones(kept.shape, np.float64)
        np.divide(kept, total[:, None], out=share, where=total[:, None] > 0)
        return torch.from_numpy(share)

    @property
    def mean_density(self) -> float:
        """Kept blocks of all prompts and heads over all that could have been kept."""
        kept, total, _ = self._values()
        possible = int(total.sum()) * kept.shape[1]
        return float(kept.sum() / possible) if possible else 1.0

    @property
    def reasons(self) -> list[str]:
        """Why each prompt was not selected for, in :class:`flashprefill.Stats`' words; "": no rows here."""
        return ["" if code == _NOT_HERE else FALLBACK_NAMES[int(code)] for code in self._values()[2]]

    def over_ranks(self, group: Any = None) -> ShardStats:
        """Return the sum over all ranks of a process group. All ranks call it."""
        mine = self._values()
        everyone: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, mine, group=group)
        kept, total, fallbacks = (list(values) for values in zip(*everyone, strict=True))
        reasons = np.array(
            [functools.reduce(_join, codes) for codes in zip(*fallbacks, strict=True)], np.int32
        )
        if self._over_heads:
            read = np.concatenate(kept, axis=1), np.max(total, axis=0), reasons
        else:
            read = np.sum(kept, axis=0), np.sum(total, axis=0), reasons
        result = ShardStats([], self._prompts, read[0].shape[1], self._over_heads)
        result._read = read
        return result

    def __repr__(self) -> str:
        kept, total, _ = self._values()
        return (
            f"ShardStats(density {self.mean_density:.3f}: {int(kept.sum())} of "
            f"{int(total.sum()) * kept.shape[1]} blocks kept)"
        )


def _join(a: int, b: int) -> int:
    """Return one reason for two parts of a prompt: 0, selected, where one of them was."""
    if _NOT_HERE in (a, b):
        return max(a, b)
    return 0 if 0 in (a, b) else max(a, b)
