"""Ulysses: each rank has a run of rows, and for attention all rows of some heads.

Before attention every rank sends each other rank the rows of that one's heads (DeepSpeed-Ulysses, arXiv
2309.14509); afterwards results go back the same way. In between a rank computes whole prompts, as one process
would for these heads: so every policy gives the same bits as on one GPU, also those that choose by the
prompt's last rows.

Queries and results travel too: with 32 query heads over 8 KV heads that is 5 times the bytes of K and V, but
each goes to one rank only. Nothing of it is hidden behind attention. Heads are dealt out by KV head; ranks
beyond their number have nothing to attend to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..api import prefill_attention
from . import collectives
from .shards import Chunk, Shards
from .stats import ShardStats

if TYPE_CHECKING:
    from .call import Call


class Ulysses(Shards):
    """Prompts divided into runs of rows; heads are exchanged for rows around attention.

    For every policy that does not go by a head's number, any number of ranks and any length. The result has
    the bits of one process.

    Args:
        tokens: new tokens of a prompt; or a list, for a batch.
        group: the process group; the default is torch.distributed's.
        prefix: tokens before them, cached on every rank; or a list, one for each prompt.
        unit: rows; prompts are cut at multiples of it.
        ranks: with ``rank``: the number of ranks, to look at a division without a process group.
        rank: with ``ranks``: this rank.
    """

    def chunks(self, rank: int) -> list[Chunk]:
        """Return a run of rows per prompt."""
        found = []
        for prompt, tokens in enumerate(self.tokens):
            units = -(-tokens // self.unit)
            begin, end = (min(tokens, units * r // self.ranks * self.unit) for r in (rank, rank + 1))
            if begin < end:
                found.append(Chunk(prompt, begin, end))
        return found

    def heads_of(self, rank: int, kv_heads: int) -> tuple[int, int]:
        """Return a rank's first KV head and the one after its last."""
        return kv_heads * rank // self.ranks, kv_heads * (rank + 1) // self.ranks

    def check(self, call: Call) -> None:
        """Refuse a policy that can't be cut by head here; on all ranks alike."""
        for rank in range(self.ranks):
            first, past = self.heads_of(rank, call.k.shape[1])
            if first < past:
                call.at_heads(first, past)

    def prefill(self, call: Call) -> tuple[torch.Tensor, torch.Tensor | None, list[Any]]:
        """Compute a call whose arguments are checked; return out, lse and statistics."""
        kv_heads, group = call.k.shape[1], call.q.shape[1] // call.k.shape[1]
        first, past = self.heads_of(self.rank, kv_heads)
        q, k, v = (
            self._to_heads(x, kv_heads, per) for x, per in ((call.q, group), (call.k, 1), (call.v, 1))
        )  # fmt: skip
        if call.k_prefix is not None and call.v_prefix is not None:
            k, v = (
                self._behind(call.k_prefix[:, first:past], k),
                self._behind(call.v_prefix[:, first:past], v),
            )
        out, lse, stats = q.new_empty(q.shape), None, []
        if call.return_lse:
            lse = q.new_empty(q.shape[1::-1], dtype=torch.float32)
        if first < past and q.shape[0]:
            starts_q, starts_k = (
                self.kept(name, q.device, lambda n=name: self._starts(n, q)) for name in "qk"
            )
            result = prefill_attention(
                q, k, v, call.at_heads(first, past), softmax_scale=call.softmax_scale, cu_seqlens_q=starts_q,
                cu_seqlens_k=starts_k, max_seqlen_q=max(self.tokens), final_chunk=call.final, out=out,
                max_seqlen_k=max(n + p for n, p in zip(self.tokens, self.prefix, strict=True)),
                return_lse=call.return_lse, return_stats=call.return_stats, **call.options,
            )  # fmt: skip
            results = list(result) if isinstance(result, tuple) else [result]
            lse = results[1] if call.return_lse else None
            stats = [(0, range(len(self.tokens)), results[-1])] if call.return_stats else []
        own = self._to_rows(out, kv_heads, group)
        own_lse = None
        if lse is not None:
            own_lse = self._to_rows(lse.T.contiguous()[..., None], kv_heads, group)[..., 0].T.contiguous()
        return own, own_lse, stats

    def stats_of(self, call: Call, parts: Sequence[Any]) -> ShardStats:
        """Return what this rank's heads kept."""
        first, past = self.heads_of(self.rank, call.k.shape[1])
        heads = (past - first) * (1 if call.policy.share_heads else call.q.shape[1] // call.k.shape[1])
        prompts = len(self.tokens)
        return ShardStats(parts, prompts, heads, over_heads=True)

    def _starts(self, which: str, like: torch.Tensor) -> torch.Tensor:
        """Return cumulative lengths of the prompts' queries or keys."""
        prefix = self.prefix if which == "k" else [0] * len(self.tokens)
        lengths = [n + p for n, p in zip(self.tokens, prefix, strict=True)]
        return torch.tensor([0, *lengths]).cumsum(0).to(like.device, torch.int32)

    def _to_heads(self, x: torch.Tensor, kv_heads: int, per: int) -> torch.Tensor:
        """Exchange this rank's rows of all heads for all rows of its heads."""
        bounds = [self.heads_of(rank, kv_heads) for rank in range(self.ranks)]
        mine = (bounds[self.rank][1] - bounds[self.rank][0]) * per
        rows, dim = [sum(self.rows_of(rank)) for rank in range(self.ranks)], x.shape[2]
        sent = torch.cat([x[:, a * per : b * per].reshape(-1) for a, b in bounds])
        received = x.new_empty((sum(rows), mine, dim))
        counts = [self.rows * (b - a) * per * dim for a, b in bounds]
        collectives.all_to_all(received.view(-1), sent, [n * mine * dim for n in rows], counts, self.group)
        return received if self._in_order else received.index_select(0, self._order(x.device)[0])

    def _to_rows(self, x: torch.Tensor, kv_heads: int, per: int) -> torch.Tensor:
        """Exchange all rows of this rank's heads for its rows of all heads."""
        bounds = [self.heads_of(rank, kv_heads) for rank in range(self.ranks)]
        rows, dim = [sum(self.rows_of(rank)) for rank in range(self.ranks)], x.shape[2]
        sent = x if self._in_order else x.index_select(0, self._order(x.device)[1])
        received = x.new_empty(self.rows * kv_heads * per * dim)
        counts = [self.rows * (b - a) * per * dim for a, b in bounds]
        collectives.all_to_all(
            received, sent.reshape(-1), counts, [n * x.shape[1] * dim for n in rows], self.group
        )  # fmt: skip
        parts = torch.split(received, counts)
        shapes = [(self.rows, (b - a) * per, dim) for a, b in bounds]
        return torch.cat([part.view(shape) for part, shape in zip(parts, shapes, strict=True)], dim=1)

    @property
    def _in_order(self) -> bool:
        """Whether rows rank by rank are rows prompt by prompt."""
        return len(self.tokens) == 1

    def _order(self, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the orders of rows: prompt by prompt among those rank by rank, and the reverse."""

        def make() -> tuple[torch.Tensor, torch.Tensor]:
            by_rank = torch.cat([self.numbers(rank) for rank in range(self.ranks)])
            return by_rank.argsort().to(device), by_rank.to(device)

        result: tuple[torch.Tensor, torch.Tensor] = self.kept("order", device, make)
        return result

    def _behind(self, prefix: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Return each prompt's prefix and new tokens, one after the other."""
        parts = []
        for p, n in zip(
            torch.split(prefix, list(self.prefix)), torch.split(new, list(self.tokens)), strict=True
        ):
            parts += [p, n]
        return torch.cat(parts)
