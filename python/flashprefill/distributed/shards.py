"""Which rows of a prompt lie on which rank.

A :class:`Shards` divides prompts over the ranks of a process group, by row: every rank computes projections,
MLPs and attention of its own rows. It says which rows those are, and brings tensors from the whole to the
shard and back. What must travel for attention is up to its subclasses: zigzag.py and ulysses.py.

It is made once per prompt length and used by all layers: index tensors and buffers are kept in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..errors import UnsupportedError, refuse, refuse_type, shown
from . import collectives
from .stats import ShardStats


class Chunk(NamedTuple):
    """Neighbouring rows of one prompt that lie on one rank."""

    prompt: int
    begin: int  # the first row, counted from the prompt's first new token
    end: int


def _lengths(name: str, value: Any, count: int | None) -> tuple[int, ...]:
    """Return one length per prompt."""
    if isinstance(value, int) and not isinstance(value, bool):
        lengths = [value] * (count or 1)
    elif isinstance(value, Sequence) and all(isinstance(n, int) for n in value):
        lengths = list(value)
    else:
        refuse_type(name, shown(value), "an integer, or one per prompt")
    if count is not None and len(lengths) != count:
        refuse(name, f"a list of {len(lengths)}", f"one integer, or one for each of {count} prompts")
    for n in lengths:
        if not 0 <= n < 2**31:
            refuse(name, n, "from 0 to 2147483647")
    return tuple(lengths)


class Shards:
    """How prompts are divided over ranks. Use :class:`Zigzag` or :class:`Ulysses`.

    Attributes:
        tokens: new tokens of each prompt.
        prefix: tokens of each prompt that come before and whose keys and values every rank has.
        group: the process group; None is the default one.
        ranks: how many ranks there are.
        rank: this one.
        unit: rows; prompts are cut at multiples of it.
        rows: rows of this rank, of all prompts together.
    """

    def __init__(
        self,
        tokens: int | Sequence[int],
        group: Any = None,
        *,
        prefix: int | Sequence[int] = 0,
        unit: int = 128,
        ranks: int | None = None,
        rank: int | None = None,
    ) -> None:
        self.tokens = _lengths("tokens", tokens, None)
        self.prefix = _lengths("prefix", prefix, len(self.tokens))
        self.group = group
        if (ranks is None) != (rank is None):
            refuse("rank" if rank is None else "ranks", None, "given where the other of rank and ranks is")
        if ranks is None or rank is None:
            if not dist.is_initialized():
                raise UnsupportedError(
                    "torch.distributed has no process group: call torch.distributed.init_process_group "
                    "first, or give ranks and rank"
                )
            ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        if rank < 0 or ranks < 1 or rank >= ranks:
            refuse("rank", rank, f"a rank of the group, from 0 to {ranks - 1}")
        if isinstance(unit, bool) or not isinstance(unit, int):
            refuse_type("unit", shown(unit), "an integer")
        if unit < 1:
            refuse("unit", unit, "at least 1")
        self.ranks, self.rank, self.unit = ranks, rank, unit
        self.rows = sum(self.rows_of(rank))
        self.agreed: set[Any] = set()  # calls that all ranks are known to make alike
        self._device: dict[Any, Any] = {}  # tensors by name and device

    def described(self) -> dict[str, Any]:
        """Return what must be the same on all ranks, by names of arguments."""
        return {
            "the class of shards": type(self).__name__,
            "shards.tokens": self.tokens,
            "shards.prefix": self.prefix,
            "shards.unit": self.unit,
        }

    def chunks(self, rank: int) -> list[Chunk]:
        """Return the chunks of a rank in the order in which it holds them. None of them is empty."""
        raise NotImplementedError

    def rows_of(self, rank: int) -> list[int]:
        """Return a rank's rows of each prompt."""
        rows = [0] * len(self.tokens)
        for chunk in self.chunks(rank):
            rows[chunk.prompt] += chunk.end - chunk.begin
        return rows

    @property
    def rectangular(self) -> bool:
        """Whether all prompts have as many tokens, so that tensors may have an axis for them."""
        return len(set(self.tokens)) <= 1

    def kept(self, name: Any, device: Any, make: Any) -> Any:
        """Return what `make` makes for a device, made once."""
        key = (name, str(device))
        if key not in self._device:
            self._device[key] = make()
        return self._device[key]

    def numbers(self, rank: int) -> torch.Tensor:
        """Return the rows of a rank among all prompts' rows, one prompt after the other, int64 [rows]."""
        starts = [0]
        for n in self.tokens:
            starts.append(starts[-1] + n)
        parts = [
            torch.arange(starts[c.prompt] + c.begin, starts[c.prompt] + c.end) for c in self.chunks(rank)
        ]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)

    def positions(self, device: Any = "cpu") -> torch.Tensor:
        """Return the position of each of this rank's rows in its prompt, prefix included, int64 [rows]."""

        def make() -> torch.Tensor:
            parts = [
                torch.arange(c.begin, c.end) + self.prefix[c.prompt] for c in self.chunks(self.rank)
            ]  # fmt: skip
            return (torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)).to(device)

        result: torch.Tensor = self.kept("positions", device, make)
        return result

    def shard(self, x: torch.Tensor) -> torch.Tensor:
        """Return this rank's rows of a tensor.

        Args:
            x: [tokens of all prompts, ...], or with an axis for prompts in front where they have equal
                lengths: [prompts, tokens, ...].

        Returns:
            [rows, ...] or [prompts, rows of each, ...].
        """
        batched = self._batched("x", x, self.tokens)
        if not batched:
            index = self.kept("numbers", x.device, lambda: self.numbers(self.rank).to(x.device))
            return x.index_select(0, index)
        own = [c for c in self.chunks(self.rank) if c.prompt == 0]
        parts = [x[:, c.begin : c.end] for c in own]
        return torch.cat(parts, dim=1) if parts else x[:, :0]

    def join(self, x: torch.Tensor) -> torch.Tensor:
        """Return the whole tensor on every rank: the inverse of :meth:`shard`. All ranks call it."""
        own = self.rows_of(self.rank)
        batched = self._batched("x", x, own)
        flat = x.flatten(0, 1) if batched else x
        most = max(sum(self.rows_of(rank)) for rank in range(self.ranks))
        gathered = x.new_empty((self.ranks, most, *flat.shape[1:]))
        gathered[self.rank, : self.rows] = flat
        collectives.all_gather(gathered, self.rank, self.group)

        def make() -> torch.Tensor:
            order = torch.empty(sum(self.tokens), dtype=torch.int64)
            for rank in range(self.ranks):
                numbers = self.numbers(rank)
                order[numbers] = torch.arange(len(numbers)) + rank * most
            return order.to(x.device)

        whole = gathered.flatten(0, 1).index_select(0, self.kept("join", x.device, make))
        return whole.view(len(self.tokens), -1, *whole.shape[1:]) if batched else whole

    def last(self, x: torch.Tensor) -> torch.Tensor:
        """Return each prompt's last row on every rank, [prompts, ...]. All ranks call it.

        Args:
            x: this rank's rows, as :meth:`shard` returns them.
        """
        if 0 in self.tokens:
            refuse("tokens", 0, "at least 1 where the last row is asked for")
        own = self.rows_of(self.rank)
        flat = x.flatten(0, 1) if self._batched("x", x, own) else x
        gathered = x.new_zeros((self.ranks, len(self.tokens), *flat.shape[1:]))
        owners = []
        for prompt, n in enumerate(self.tokens):
            owner = next(r for r in range(self.ranks) if any(c[::2] == (prompt, n) for c in self.chunks(r)))
            owners.append(owner)
            if owner == self.rank:  # which has the prompt's end behind its other rows
                gathered[owner, prompt] = flat[sum(own[: prompt + 1]) - 1]
        collectives.all_gather(gathered, self.rank, self.group)
        return torch.stack([gathered[owner, prompt] for prompt, owner in enumerate(owners)])

    def _batched(self, name: str, x: torch.Tensor, lengths: Sequence[int]) -> bool:
        """Return whether a tensor has an axis for prompts; refuse one that has not the rows."""
        if x.ndim and x.shape[0] == sum(lengths) and not (x.ndim > 1 and self._fits(x, lengths)):
            return False
        if x.ndim > 1 and self._fits(x, lengths):
            return True
        wanted = f"({sum(lengths)}, ...)"
        if self.rectangular and lengths:
            wanted += f" or ({len(lengths)}, {lengths[0]}, ...)"
        return refuse(f"{name}.shape", tuple(x.shape), f"{wanted} on rank {self.rank} of {self.ranks}")

    def _fits(self, x: torch.Tensor, lengths: Sequence[int]) -> bool:
        return self.rectangular and tuple(x.shape[:2]) == (len(lengths), lengths[0] if lengths else 0)

    def prefill(self, call: Any) -> tuple[torch.Tensor, torch.Tensor | None, list[Any]]:
        """Compute a call (call.py) whose arguments are checked; return out, lse and statistics."""
        raise NotImplementedError

    def check(self, call: Any) -> None:
        """Refuse a call that could not have the bits of one process, before anything is sent."""
        raise NotImplementedError

    def stats_of(self, call: Any, parts: Sequence[Any]) -> ShardStats:
        """Return the statistics of a call's parts."""
        raise NotImplementedError

    def keys_values(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of all new tokens on every rank, in their order. All ranks call it.

        Args:
            k: this rank's keys, those of the last call of ``prefill_attention``.
            v: its values.
        """
        return self.join(k), self.join(v)

    def __repr__(self) -> str:
        tokens = self.tokens[0] if len(self.tokens) == 1 else list(self.tokens)
        return f"{type(self).__name__}({tokens} tokens, rank {self.rank} of {self.ranks}: {self.rows} rows)"
