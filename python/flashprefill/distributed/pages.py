"""Where keys and values lie after they were gathered: pages in the order in which ranks sent them.

A buffer is [shares, 2, slots, kv_heads, head_dim]: a share for each rank, K in front of V, a slot per token.
Shares in front of the ranks' hold cached prefixes. A page is 128 slots. Chunks begin at the slot that their
first token has in its page, so most pages are whole as they arrive. A page whose tokens came in several
chunks has its home where its last token is, and the others are copied there.

K and V have the same block table, because V lies at a fixed distance behind K: the two views begin so much
apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .._layout import ceil_div
from .shards import Chunk

PAGE = 128  # tokens: what Hopper's kernel copies at once


class Pages:
    """The place of each token of each prompt."""

    def __init__(self, chunks: list[list[Chunk]], tokens: Sequence[int], prefix: Sequence[int]) -> None:
        """Lay out the chunks of all ranks.

        Args:
            chunks: of each rank.
            tokens: new tokens of each prompt.
            prefix: tokens of each prompt that come before.
        """
        self.moves: list[list[tuple[int, int, int]]] = []  # by rank: (row, slot, rows) to copy into its share
        places: list[list[tuple[Chunk, int]]] = []  # by rank: chunks and the slots where they begin
        for own in chunks:
            slot, row = 0, 0
            moves: list[tuple[int, int, int]] = []
            places.append([])
            for chunk in own:
                rows = chunk.end - chunk.begin
                slot = ceil_div(slot, PAGE) * PAGE + (prefix[chunk.prompt] + chunk.begin) % PAGE
                places[-1].append((chunk, slot))
                if moves and moves[-1][1] + moves[-1][2] == slot:
                    moves[-1] = (*moves[-1][:2], moves[-1][2] + rows)
                else:
                    moves.append((row, slot, rows))
                slot, row = slot + rows, row + rows
            self.moves.append(moves)
        ends = [place[-1][1] + place[-1][0].end - place[-1][0].begin for place in places if place]
        self.slots = ceil_div(max(ends, default=0), PAGE) * PAGE
        pages_before = [0]
        for n in prefix:
            pages_before.append(pages_before[-1] + ceil_div(n, PAGE))
        self.prefix_shares = ceil_div(pages_before[-1] * PAGE, self.slots) if self.slots else 0
        self.shares = self.prefix_shares + len(chunks)
        self._prefix = list(prefix)
        self._slots = []  # by prompt: the slot of K of each token, among all slots of the buffer
        for prompt, n in enumerate(tokens):
            slots = torch.empty(prefix[prompt] + n, dtype=torch.int64)
            if self.slots:
                index = torch.arange(prefix[prompt]) + pages_before[prompt] * PAGE
                slots[: prefix[prompt]] = index + index // self.slots * self.slots
            for rank, own_places in enumerate(places):
                base = (self.prefix_shares + rank) * 2 * self.slots
                for chunk, slot in own_places:
                    if chunk.prompt == prompt:
                        here = slice(prefix[prompt] + chunk.begin, prefix[prompt] + chunk.end)
                        slots[here] = torch.arange(base + slot, base + slot + chunk.end - chunk.begin)
            self._slots.append(slots)
        self._seams: dict[str, tuple[torch.Tensor, torch.Tensor] | None] = {}
        self._homes = [self._home_pages(slots) for slots in self._slots]

    @staticmethod
    def _home_pages(slots: torch.Tensor) -> torch.Tensor:
        """Return the page of the buffer for each page of a prompt: where its last token lies."""
        count = ceil_div(len(slots), PAGE)
        last = (torch.arange(1, count + 1) * PAGE).clamp(max=len(slots)) - 1
        return slots[last] // PAGE

    def table(self, prompts: Sequence[int]) -> torch.Tensor:
        """Return a row of pages for each of these prompts, int32 [rows, most pages]."""
        rows = [self._homes[prompt] for prompt in prompts]
        table = torch.zeros(len(rows), max((len(row) for row in rows), default=0), dtype=torch.int32)
        for to, row in zip(table, rows, strict=True):
            to[: len(row)] = row
        return table

    def prefix_slots(self) -> torch.Tensor:
        """Return the slots of K of all prompts' prefixes, int64 [tokens]."""
        return torch.cat([slots[:n] for slots, n in zip(self._slots, self._prefix, strict=True)])

    def row_slots(self) -> torch.Tensor:
        """Return the slots of K of all prompts' new tokens, int64 [tokens]."""
        return torch.cat([slots[n:] for slots, n in zip(self._slots, self._prefix, strict=True)])

    def seams(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return slots of K and V to copy from and to; None where no page is in two chunks."""
        key = str(device)
        if key not in self._seams:
            sources, targets = [], []
            for slots, homes in zip(self._slots, self._homes, strict=True):
                position = torch.arange(len(slots))
                wanted = homes[position // PAGE] * PAGE + position % PAGE
                apart = slots != wanted
                sources.append(slots[apart])
                targets.append(wanted[apart])
            source, target = (
                torch.cat([x, x + self.slots]) for x in (torch.cat(sources), torch.cat(targets))
            )  # fmt: skip
            self._seams[key] = (source.to(device), target.to(device)) if len(source) else None
        return self._seams[key]

    def stitch(self, buffer: torch.Tensor) -> None:
        """Complete pages whose tokens came in several chunks."""
        seams = self.seams(buffer.device)
        if seams is not None:
            flat = buffer.view(-1, *buffer.shape[3:])
            flat.index_copy_(0, seams[1], flat.index_select(0, seams[0]))

    def views(self, buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return K and V as pages [pages, PAGE, kv_heads, head_dim] for one block table."""
        pages = buffer.view(-1, PAGE, *buffer.shape[3:])
        behind = self.slots // PAGE
        return pages[: len(pages) - behind], pages[behind:]
