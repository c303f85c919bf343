"""Streams of a call on a GPU: one on which keys and values travel, and two for each group of heads.

A group's attention begins when its keys are there, not when the group before it has ended: a kernel's last
tiles leave most of a GPU idle, and the next group's first ones fill it. On CPUs there are no streams, and all
is done in its order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


class Streams:
    """The streams of a device for a number of groups of heads."""

    def __init__(self, device: torch.device, groups: int) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._arrived: list[Any] = [None] * groups
        self._done: list[Any] = []
        if self._cuda:
            stream: Any = torch.cuda.Stream
            self._side = stream(device)
            self._others = [stream(device) for _ in range(groups)]
            self._tails = [stream(device, priority=-1) for _ in range(groups)]

    @contextlib.contextmanager
    def sending(self) -> Iterator[None]:
        """Send, after what the current stream has been given so far."""
        if not self._cuda:
            yield
            return
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            yield

    @contextlib.contextmanager
    def arriving(self, group: int) -> Iterator[None]:
        """Wait for a group's keys and values, and complete them."""
        if not self._cuda:
            yield
            return
        with torch.cuda.stream(self._side):
            yield
            self._arrived[group] = self._side.record_event()

    @contextlib.contextmanager
    def attending(self, group: int, tail: bool) -> Iterator[None]:
        """Compute a group whose keys and values have arrived."""
        if not self._cuda:
            yield
            return
        stream = (self._tails if tail else self._others)[group]
        stream.wait_event(self._arrived[group])
        with torch.cuda.stream(stream):
            yield
            self._done.append(stream.record_event())

    def join(self) -> None:
        """Let the current stream wait for all of it."""
        if self._cuda:
            current = torch.cuda.current_stream(self._device)
            for event in (*self._done, *self._arrived):
                current.wait_event(event)
            self._done.clear()
