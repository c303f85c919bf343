"""The two collectives that are used, over bytes: then every dtype goes through every backend.

Gloo has no all-gather of bfloat16 in all versions of PyTorch, and NCCL moves bytes as fast as numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

# Its name since PyTorch 2.13; the older one warns there.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1).view(torch.uint8)


def all_gather(buffer: torch.Tensor, rank: int, group: Any, *, wait: bool = True) -> Any:
    """Fill the parts of the other ranks in a buffer, in place.

    Args:
        buffer: contiguous [ranks, ...], in which this rank has written its own part.
        rank: this rank.
        group: the process group.
        wait: False: return at once, with what is to be waited for.
    """
    if buffer.numel() == 0:
        return None
    flat = _bytes(buffer).view(buffer.shape[0], -1)
    work = _gather(flat.view(-1), flat[rank], group=group, async_op=not wait)
    return None if wait else work


def all_to_all(
    out: torch.Tensor, parts: torch.Tensor, out_counts: Sequence[int], counts: Sequence[int], group: Any
) -> None:
    """Send runs of numbers to each rank, and receive theirs.

    Args:
        out: contiguous, to be filled with the ranks' runs one after the other.
        parts: contiguous runs for each rank, of the same dtype.
        out_counts: numbers from each rank.
        counts: numbers for each rank.
        group: the process group.
    """
    size = parts.element_size()
    dist.all_to_all_single(
        _bytes(out), _bytes(parts), [n * size for n in out_counts], [n * size for n in counts], group=group
    )
