"""Masks that later layers of the same forward read again: whose they are, and how long they stay.

Layers of a forward are called one after the other in ascending order, in one thread. So a forward begins
where a layer is called whose number is not above the one before it, and all that is held then is of an
earlier forward: it goes. That holds for batches, chunks and tokens of generate() alike, and for a forward
that an error ended. A layer may be called for parts of its batch, one after the other (padded batches): its
masks are in the order of these, and so is their reading.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class _Forward(threading.local):
    """What one thread holds."""

    def __init__(self) -> None:
        self.layer = -1  # called last
        self.inside = 0
        self.part = 0  # of the layer's call, the next one
        self.masks: dict[int, list[Any]] = {}  # by layer, one for each part


class HeldMasks:
    """The masks of a model's forward.

    Args:
        last_readers: for each layer whose mask others read, the last of these.
    """

    def __init__(self, last_readers: Mapping[int, int]) -> None:
        self.last_readers = dict(last_readers)
        self._own = _Forward()

    def __reduce__(self) -> Any:  # a copy of a model has masks of its own
        return HeldMasks, (self.last_readers,)

    @contextmanager
    def call(self, layer: int) -> Iterator[None]:
        """A call of one layer: what is put or taken inside are its parts, in their order."""
        own = self._own
        if own.inside:  # a part of a call that has begun
            yield
            return
        if layer <= own.layer:
            own.masks.clear()
        own.layer, own.part, own.inside = layer, 0, 1
        try:
            yield
        finally:
            own.inside = 0
            for source in [s for s in own.masks if self.last_readers.get(s, -1) <= layer]:
                del own.masks[source]

    def put(self, layer: int, mask: Any) -> None:
        """Hold the mask of the layer's next part, if another layer will read it."""
        if layer in self.last_readers:
            self._own.masks.setdefault(layer, []).append(mask)

    def take(self, source: int) -> Any:
        """The mask of the same part that an earlier layer put, or None."""
        own = self._own
        masks, part = own.masks.get(source, []), own.part
        own.part += 1
        return masks[part] if part < len(masks) else None

    def count(self) -> int:
        """How many masks this thread holds."""
        return sum(map(len, self._own.masks.values()))
