"""Zigzag: each rank has early and late pieces of the prompt, and K and V are gathered on every rank.

A prompt is cut into chunks, which are dealt to the P ranks in turn and then in reverse: rank r of P takes
chunks r and 2 P - 1 - r. A long one has twice as many, and the second half of them is dealt in reverse first.
Late rows see more keys than early ones; so all ranks have as much to do. Keys and values of all rows go to
every rank, a group of KV heads at a time, on a stream of their own: while the first heads are attended to,
the next ones travel.

What arrives lies rank by rank, and is read where it lies: pages of 128 tokens, found through a block table,
as engines keep their caches. Nothing is put in order. Only where two chunks meet inside of a page, rows of
the first one are copied next to those of the second: at most 127 rows per seam.

Each tile of queries sees the keys that it would see on one GPU, in the same blocks, and is itself the same
tile, because chunks are cut between tiles. So selection and attention give the same bits as on one GPU. That
cannot be for methods that choose for a tile by rows outside of it (the prompt's last rows, or a mean over all
keys); they are refused here, and are exact with :class:`Ulysses`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .._layout import ceil_div, tile_tokens_of
from .._prepared import PreparedPrefill, signature
from ..api import attend, prefill_attention, select
from ..errors import UnsupportedError, refuse, refuse_type, shown
from ..policies import MaskPolicy, Policy
from ..torch_op import empty_like
from . import collectives
from .pages import Pages
from .shards import Chunk, Shards
from .stats import ShardStats
from .streams import Streams

if TYPE_CHECKING:
    from .call import Call

# CUDA's `prefill` attends densely to whole sequences of at most so many keys (EnergiesDenseUpToKeys in
# src/cuda/common/heuristics.h). A piece of a longer prompt may be that short, and must be selected for, as it
# would be on one GPU.
HOPPER_DENSE_KEYS = 3072
PORTABLE_DENSE_KEYS = 2560


def _dense_keys(device: torch.device, target: str | None) -> int:
    """Return up to how many keys a whole sequence is dense on a device."""
    if device.type != "cuda":
        return 0
    hopper = torch.cuda.get_device_capability(device) == (9, 0) if target is None else target == "sm90a"
    return HOPPER_DENSE_KEYS if hopper else PORTABLE_DENSE_KEYS


# KV heads travel in two groups, a quarter of them and the rest, which travels while the first is attended to:
# nothing hides the first one's way, and what follows arrives before it is wanted. Each group's launches cost
# the host 0.4 ms per layer; a rank with fewer rows would wait for them longer than for the keys.
FIRST_GROUP = 4  # one in so many heads
LEAST_GROUPED_ROWS = 32768  # of a rank

# A chunk's rows from which on there are four of them per rank. With chunks of a quarter of the prompt, on two
# ranks, the one that has the last quarter attends for 17 % longer per row than the other (H200, 128K tokens).
# The first chunk is not to be so short that CUDA would be dense on it.
LEAST_FINE_ROWS = HOPPER_DENSE_KEYS + 128


def _wide(x: torch.Tensor) -> torch.Tensor | None:
    """Return a tensor as numbers of 16 bytes, None where it does not lie so."""
    each = torch.complex128.itemsize // x.element_size()
    steps = (*x.stride()[:-1], x.shape[-1], x.storage_offset())
    fits = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(n % each == 0 for n in steps)
    return x.view(torch.complex128) if fits else None


def _copy(to: torch.Tensor, rows: torch.Tensor) -> None:
    """Copy rows [rows, kv_heads, head_dim] of the same dtype, 16 bytes at a time where that can be.

    PyTorch's copy of some heads of each row moves one number per thread and load.
    """
    wide_to, wide_rows = _wide(to), _wide(rows)
    if wide_to is None or wide_rows is None:
        to.copy_(rows)
    else:
        wide_to.copy_(wide_rows)


_Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # q, k, v, out


class Piece(NamedTuple):
    """Rows of a rank that are one sequence for the kernel."""

    prompt: int
    rows: int
    keys: int  # up to the last row, prefix included
    final: bool  # its last tiles are the policy's dense tail
    tail: bool  # all of them are


@dataclass
class _Sequences:
    """Neighbouring pieces of a rank as the kernel takes them."""

    pieces: list[Piece]
    begin: int  # the first row
    end: int
    cu_seqlens_q: torch.Tensor
    seqused_k: torch.Tensor
    block_table: torch.Tensor

    def arguments(self) -> dict[str, Any]:
        return dict(
            cu_seqlens_q=self.cu_seqlens_q,
            seqused_k=self.seqused_k,
            block_table=self.block_table,
            max_seqlen_q=max(piece.rows for piece in self.pieces),
            max_seqlen_k=max(piece.keys for piece in self.pieces),
            final_chunk=[piece.final for piece in self.pieces],
        )


class Zigzag(Shards):
    """Prompts divided so that all ranks have equally much to do; K and V are gathered.

    For any number of ranks and any length; ranks may end up without rows. The result has the bits of one
    process, whatever the number of ranks.

    Args:
        tokens: new tokens of a prompt; or a list, for a batch.
        group: the process group; the default is torch.distributed's.
        prefix: tokens before them, cached on every rank; or a list, one for each prompt.
        unit: rows; chunks are cut at multiples of it. It must be a multiple of a tile's tokens: 128, or with
            ``share_heads`` 128 // (heads // kv_heads).
        tail: rows at a prompt's end that are dealt out unit by unit, because a policy's dense tail makes them
            the longest to compute.
        rounds: how many chunks of a prompt each rank is dealt. The default is 4 where chunks then have at
            least 3,200 rows, else 2.
        ranks: with ``rank``: the number of ranks, to look at a division without a process group.
        rank: with ``ranks``: this rank.
    """

    def __init__(
        self,
        tokens: int | Sequence[int],
        group: Any = None,
        *,
        prefix: int | Sequence[int] = 0,
        unit: int = 128,
        tail: int = 256,
        rounds: int | None = None,
        ranks: int | None = None,
        rank: int | None = None,
    ) -> None:
        for name, value, least in (("tail", tail, 0), ("rounds", 1 if rounds is None else rounds, 1)):
            if isinstance(value, bool) or not isinstance(value, int):
                refuse_type(name, shown(value), "an integer")
            if value < least:
                refuse(name, value, f"at least {least}")
        self.tail, self.rounds = tail, rounds
        self._chunks: dict[int, list[Chunk]] = {}
        super().__init__(tokens, group, prefix=prefix, unit=unit, ranks=ranks, rank=rank)
        self._stored: Pages | None = None
        self._buffers: list[torch.Tensor] = []  # by group of heads, of the last call
        self._calls: dict[Any, tuple[Any, PreparedPrefill]] = {}  # by the buffer that they read

    def described(self) -> dict[str, Any]:
        """Return what must be the same on all ranks."""
        return {**super().described(), "shards.tail": self.tail, "shards.rounds": self.rounds}

    def chunks(self, rank: int) -> list[Chunk]:
        """Return a rank's chunks of each prompt, and its share of the tails."""
        if rank not in self._chunks:
            found = []
            for prompt, tokens in enumerate(self.tokens):
                # The last unit is longer by what is left: few rows alone are computed as decoding is.
                units = max(tokens // self.unit, 1)
                dealt = self.tail // self.unit
                if self.ranks == 1 or units < 2 * self.ranks + dealt:
                    dealt = 0
                own = self._dealt(rank, units - dealt)
                own += [(units - dealt + i, units - dealt + i + 1) for i in range(rank, dealt, self.ranks)]
                for first, past in own:
                    begin, end = first * self.unit, tokens if past == units else past * self.unit
                    if first < past and begin < end:
                        found.append(Chunk(prompt, begin, end))
            self._chunks[rank] = found
        return self._chunks[rank]

    def _dealt(self, rank: int, units: int) -> list[tuple[int, int]]:
        """Return a rank's runs of so many units, as (first, past): first one to each rank, and so on.

        A round goes forwards where its number has an even number of ones in binary: f b b f b f f b. Then
        ranks have equally many rows, equal sums of their numbers, and with each doubling of the rounds equal
        sums of one power more.
        """
        rounds = self.rounds
        if rounds is None:
            rounds = 4 if units * self.unit >= 4 * self.ranks * LEAST_FINE_ROWS else 2
        parts = rounds * self.ranks
        each, more = divmod(units, parts)
        runs: list[tuple[int, int]] = []
        for number in range(rounds):
            forwards = number.bit_count() % 2 == 0
            c = number * self.ranks + (rank if forwards else self.ranks - 1 - rank)
            first, past = each * c + min(c, more), each * (c + 1) + min(c + 1, more)
            if runs and runs[-1][1] == first:
                runs[-1] = runs[-1][0], past
            else:
                runs.append((first, past))
        return runs

    @property
    def pages(self) -> Pages:
        """Where keys lie after they were gathered."""
        if self._stored is None:
            chunks = [self.chunks(rank) for rank in range(self.ranks)]
            self._stored = Pages(chunks, self.tokens, self.prefix)
        return self._stored

    def groups(self, call: Call) -> list[tuple[int, int]]:
        """Return the groups of KV heads of a call: of each its first head and the one after its last."""
        kv_heads, asked = call.k.shape[1], call.head_groups
        if asked is not None:
            if kv_heads % asked:
                refuse("head_groups", asked, f"a divisor of the KV heads ({kv_heads})")
            each = kv_heads // asked
            groups = [(first, first + each) for first in range(0, kv_heads, each)]
            for group in groups:
                call.at_heads(*group)
            return groups
        whole = [(0, kv_heads)]
        if self.ranks == 1 or sum(self.tokens) // self.ranks < LEAST_GROUPED_ROWS:
            return whole
        if kv_heads == 1:
            return whole
        first = max(1, kv_heads // FIRST_GROUP)
        groups = [(0, first), (first, kv_heads)]
        try:
            for group in groups:
                call.at_heads(*group)
        except UnsupportedError:  # a policy that goes by a head's number
            return whole
        return groups

    def check(self, call: Call) -> None:
        """Refuse what could not have the bits of one process, before anything is sent."""
        policy, group = call.policy, call.q.shape[1] // call.k.shape[1]
        tile = tile_tokens_of(policy.share_heads, group)
        if self.unit % tile:
            refuse(
                "shards.unit",
                self.unit,
                f"a multiple of {tile}, the tokens of this policy's tiles: Zigzag(..., unit={tile})",
            )
        unit = policy._row_unit()
        if self.ranks > 1 and unit is None:
            raise UnsupportedError(
                f"{policy.kind} selects for a tile by rows or keys that other ranks have, so Zigzag can't "
                "give the result of one process; Ulysses does"
            )
        for name, value in (("shards.unit", self.unit), *(("shards.prefix", n) for n in self.prefix)):
            if self.ranks > 1 and unit and value % unit:
                refuse(
                    name,
                    value,
                    f"a multiple of {unit} for {policy.kind}, whose cells of keys it must not cut",
                )
        self.groups(call)

    def prefill(self, call: Call) -> tuple[torch.Tensor, torch.Tensor | None, list[Any]]:
        """Compute a call whose arguments are checked; return out, lse and statistics by group of heads.

        A tile of a dense tail sees all keys, and at 128K tokens takes its multiprocessor 1.7 ms: as long as
        the rest of a rank's group takes the whole GPU. So tails are calls of their own, first, beside the
        others, and no group waits for the end of the one before it.
        """
        groups, device = self.groups(call), call.q.device
        out = empty_like(call.q)
        lse = call.q.new_empty(call.q.shape[1::-1], dtype=torch.float32) if call.return_lse else None
        tails, others = self._sequences(call)
        buffers = self._buffers_for(call, groups)
        streams = self._streams_for(device, len(groups))
        stats = []
        with streams.sending():
            works = [self._send(call, *each) for each in zip(buffers, groups, strict=True)]
        for g, heads in enumerate(groups):
            with streams.arriving(g):
                if works[g] is not None:
                    works[g].wait()
                self.pages.stitch(buffers[g])
            for sequences, tail in ((tails, True), (others, False)):
                if sequences.pieces:
                    with streams.attending(g, tail):
                        stats += self._attend(call, sequences, buffers[g], heads, out, lse)
        streams.join()
        return out, lse, stats

    def _streams_for(self, device: torch.device, groups: int) -> Streams:
        """Return the streams of a call, those of the last one if they fit."""
        key = ("streams", groups)
        streams: Streams = self.kept(key, device, lambda: Streams(device, groups))
        return streams

    def _buffers_for(self, call: Call, groups: list[tuple[int, int]]) -> list[torch.Tensor]:
        """Return a buffer for each group of heads, those of the last call if they fit."""
        k, pages = call.k, self.pages
        shapes = [(pages.shares, 2, pages.slots, past - first, k.shape[2]) for first, past in groups]
        have = [(x.shape, x.dtype, x.device) for x in self._buffers]
        if have != [(shape, k.dtype, k.device) for shape in shapes]:
            self._buffers = [k.new_empty(shape) for shape in shapes]
            self._calls.clear()
        return self._buffers

    def _send(self, call: Call, buffer: torch.Tensor, kv_heads: tuple[int, int]) -> Any:
        """Put this rank's keys and values of some heads into a buffer and start to gather the others'."""
        pages, (first, past) = self.pages, kv_heads
        for which, (own, before) in enumerate(((call.k, call.k_prefix), (call.v, call.v_prefix))):
            for row, slot, count in pages.moves[self.rank]:
                here = buffer[pages.prefix_shares + self.rank, which, slot : slot + count]
                _copy(here, own[row : row + count, first:past])
            if before is not None:
                where = self.kept("prefix", call.k.device, lambda: pages.prefix_slots().to(call.k.device))
                flat = buffer.view(-1, *buffer.shape[3:])
                flat.index_copy_(0, where + which * pages.slots, before[:, first:past])
        gathered = buffer[pages.prefix_shares :]
        return collectives.all_gather(gathered, self.rank, self.group, wait=False)

    def stats_of(self, call: Call, parts: Sequence[Any]) -> ShardStats:
        """Return what this rank's rows kept."""
        heads = (call.k if call.policy.share_heads else call.q).shape[1]
        return ShardStats(parts, len(self.tokens), heads, over_heads=False)

    def _sequences(self, call: Call) -> tuple[_Sequences, _Sequences]:
        """Return this rank's pieces: on a GPU those at its end that are all dense tail, and the others."""
        tile = tile_tokens_of(call.policy.share_heads, call.q.shape[1] // call.k.shape[1])
        tail = ceil_div(getattr(call.policy, "dense_tail_blocks", 0) * call.policy.block_size, tile)
        key = ("sequences", tile, tail, tuple(call.final))

        def made(pieces: list[Piece], begin: int) -> _Sequences:
            starts = torch.tensor([0, *(piece.rows for piece in pieces)]).cumsum(0).to(torch.int32)
            table = self.pages.table([piece.prompt for piece in pieces])
            used = torch.tensor([piece.keys for piece in pieces], dtype=torch.int32)
            end = begin + sum(piece.rows for piece in pieces)
            return _Sequences(pieces, begin, end, *(x.to(call.q.device) for x in (starts, used, table)))

        def make() -> tuple[_Sequences, _Sequences]:
            pieces = self.pieces(self.rank, tile, tail, call.final)
            count = len(pieces)
            while call.q.device.type == "cuda" and count and pieces[count - 1].tail:
                count -= 1
            others = made(pieces[:count], 0)
            return made(pieces[count:], others.end), others

        result: tuple[_Sequences, _Sequences] = self.kept(key, call.q.device, make)
        return result

    def pieces(self, rank: int, tile: int, tail: int, final: Sequence[bool]) -> list[Piece]:
        """Return a rank's chunks as sequences.

        A chunk that holds some of its prompt's dense tail but not its end is cut where the tail begins, and
        its second part is a final chunk: one that is tail all over.

        Args:
            rank: the rank.
            tile: tokens per query tile.
            tail: tiles at a prompt's end that are dense.
            final: whether each prompt ends here.
        """
        pieces = []
        for prompt, begin, end in self.chunks(rank):
            tokens, before = self.tokens[prompt], self.prefix[prompt]
            tail_begin = max(0, ceil_div(tokens, tile) - tail) * tile if final[prompt] else tokens
            if begin < tail_begin < end < tokens:
                pieces.append(Piece(prompt, tail_begin - begin, before + tail_begin, False, False))
                begin = tail_begin
            ends = final[prompt] and tail > 0 and (end == tokens or begin >= tail_begin)
            pieces.append(Piece(prompt, end - begin, before + end, ends, ends and begin >= tail_begin))
        return pieces

    def _attend(
        self,
        call: Call,
        sequences: _Sequences,
        buffer: torch.Tensor,
        kv_heads: tuple[int, int],
        out: torch.Tensor,
        lse: torch.Tensor | None,
    ) -> list[Any]:
        """Select and attend for some heads; return their statistics, if they are asked for."""
        group = call.q.shape[1] // call.k.shape[1]
        here, rows = slice(kv_heads[0] * group, kv_heads[1] * group), slice(sequences.begin, sequences.end)
        k, v = self.pages.views(buffer)
        policy, own, q = call.at_heads(*kv_heads), out[rows, here], call.q[rows, here]
        layout, final = sequences.arguments(), call.options
        shared = dict(softmax_scale=call.softmax_scale, **final)
        short = self._has_short_piece(sequences, _dense_keys(q.device, call.options.get("target")))
        if not (short or call.return_lse or call.return_stats or final or isinstance(policy, MaskPolicy)):
            self._prepared(call, sequences, policy, (q, k, v, own)).run(q, k, v, own)
            return []
        if short:
            mask = select(q, k, policy, **layout, **shared)
            del layout["final_chunk"]
            result = attend(q, k, v, mask, out=own, return_lse=lse is not None, **layout, **shared)
            results: list[Any] = [*result, mask.stats] if lse is not None else [result, mask.stats]
        else:
            result = prefill_attention(
                q, k, v, policy, out=own, return_lse=lse is not None, return_stats=call.return_stats,
                **layout, **shared,
            )  # fmt: skip
            results = list(result) if isinstance(result, tuple) else [result]
        if lse is not None:
            lse[here, rows].copy_(results[1])
        first = kv_heads[0] if policy.share_heads else here.start
        owners = [piece.prompt for piece in sequences.pieces]
        return [(first, owners, results[-1])] if call.return_stats else []

    def _prepared(
        self, call: Call, sequences: _Sequences, policy: Policy, tensors: _Tensors
    ) -> PreparedPrefill:
        """Return what the calls of all layers have in common, made once: it spares the host much of each."""
        scale = call.q.shape[2] ** -0.5 if call.softmax_scale is None else call.softmax_scale
        place = sequences.begin, tensors[1].data_ptr()  # of a group, and so on its stream
        key = policy.text, scale, tuple(call.final), signature(*tensors)
        have = self._calls.get(place)
        if have is None or have[0] != key:
            prepared = PreparedPrefill(
                *tensors,
                policy,
                softmax_scale=scale,
                cu_seqlens_q=sequences.cu_seqlens_q,
                seqused_k=sequences.seqused_k,
                block_table=sequences.block_table,
                rows_and_keys=[(piece.rows, piece.keys) for piece in sequences.pieces],
                final_chunk=[piece.final for piece in sequences.pieces],
            )
            have = self._calls[place] = key, prepared
        return have[1]

    def _has_short_piece(self, sequences: _Sequences, dense_keys: int) -> bool:
        """Return whether a piece is so short that it would be dense by itself, of a prompt that is not."""
        return any(
            piece.keys <= dense_keys < self.tokens[piece.prompt] + self.prefix[piece.prompt]
            for piece in sequences.pieces
        )

    def keys_values(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of all new tokens, from where the last call gathered them."""
        where = self.kept("rows", k.device, lambda: self.pages.row_slots().to(k.device))
        flat = [buffer.view(-1, *buffer.shape[3:]) for buffer in self._buffers]
        keys, values = (
            torch.cat([part.index_select(0, where + which * self.pages.slots) for part in flat], dim=1)
            for which in (0, 1)
        )
        if self._batched("k", k, self.rows_of(self.rank)):
            keys, values = (x.view(len(self.tokens), -1, *x.shape[1:]) for x in (keys, values))
        return keys, values
