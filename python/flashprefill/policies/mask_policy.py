"""MaskPolicy: a selection written in Python."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import UnsupportedError, refuse, refuse_type, shown
from .base import Policy
from .streaming import Streaming

FORCED = (
    "sink_blocks",
    "window_blocks",
    "dense_tail_blocks",
    "block_size",
    "share_heads",
    "mean_correction",
)


@dataclass(frozen=True, repr=False)
class MaskPolicy(Policy):
    """A selection by a Python function: the way to try out a method before it is written in C++.

    The function is called as ``function(layer, q, k)``, once for each sequence of a call, and returns which
    blocks of keys each tile of queries keeps::

        def recent(layer, q, k):
            tiles, blocks = -(-len(q) // 128), -(-len(k) // 128)
            first = (len(k) - len(q)) // 128  # the block of the first query
            tile, block = np.arange(tiles)[:, None], np.arange(blocks)[None, :]
            return (block > tile + first - 4)[None]  # bool [1, tiles, blocks]: the same for all heads

        out = fp.prefill_attention(q, k, v, fp.MaskPolicy(recent))
        fp.patch_model(model, fp.MaskPolicy(recent))

    Its arguments are:

    - ``layer``: the number of the layer, an int, where the policy is part of a model; else :attr:`layer`.
    - ``q``: the queries as attention gets them (rotary positions applied, not scaled), [tokens, heads,
      head_dim]; of a prompt that is read in chunks those of the chunk. NumPy or torch, as the call's.
    - ``k``: all keys of the sequence, [keys, kv_heads, head_dim], a cached prefix included. Query i is at
      position keys - tokens + i. Both are views, not to be written to; keys of a paged cache are a copy.

    It returns bool [heads, tiles, blocks], or [1, tiles, blocks] for all heads, a NumPy array or a torch
    tensor; or a :class:`BlockMask` of this one sequence, as :func:`flashprefill.select` returns. Tile t holds
    queries 128 t to 128 t + 127 of the call, block b holds keys block_size * b on. With ``share_heads`` heads
    are KV heads, and a tile holds 128 // (heads // kv_heads) queries. Bits in the future are ignored.

    The tile's own diagonal is always kept, and so are the forced blocks below. A policy works wherever others
    do: :func:`flashprefill.prefill_attention`, :func:`flashprefill.select`, :func:`flashprefill.patch_model`
    (``generate()``, padded batches and prompts in chunks included), and as text, "module:function", on the
    command line and in vLLM's options. torch.compile leaves its graph for the call, so ``fullgraph=True``
    is an error, and so is capturing a CUDA graph if the function waits for the device. llama.cpp's plugin
    has no Python.

    Args:
        function: the function, or "module:function" to import it from.
        block_size: keys per block, a multiple of 16 from 16 to 1024.
        sink_blocks: blocks at the beginning that are always kept.
        window_blocks: blocks before and at the diagonal that are always kept.
        dense_tail_blocks: the last query tiles, as many as hold this many blocks of tokens, keep everything.
        share_heads: masks are per KV head, not per query head.
        mean_correction: blocks left out count by their means; "summary": 16 of them by one key.
        layer: passed to the function; :func:`flashprefill.patch_model` sets it for each layer.

    Raises:
        ArgumentTypeError, InvalidArgumentError: a field is wrong, or the function cannot be imported. When
            called: the function's result is not of the type or shape above. Errors of the function itself
            pass through.
    """

    function: Callable[[int | None, Any, Any], Any]
    block_size: int = 128
    sink_blocks: int = 0
    window_blocks: int = 0
    dense_tail_blocks: int = 0
    share_heads: bool = False
    mean_correction: bool | str = False
    layer: int | None = None

    kind = "maskpolicy"
    _row = "streaming"

    def __post_init__(self) -> None:
        function: Any = self.function
        if isinstance(function, str):
            function = function_named(function)
        if not callable(function):
            refuse_type("function", shown(function), 'a function of (layer, q, k), or "module:function"')
        object.__setattr__(self, "function", function)
        super().__post_init__()

    @functools.cached_property
    def forced(self) -> Streaming:
        """The policy that keeps the forced blocks alone."""
        return Streaming(**{name: getattr(self, name) for name in FORCED})

    @property
    def name(self) -> str:
        """The function's name."""
        return str(getattr(self.function, "__qualname__", None) or type(self.function).__qualname__)

    def _row_unit(self) -> int | None:
        return (
            1  # the function is called with chunks, and it is the function's business what it makes of them
        )

    def _at_heads(self, first: int, past: int, heads: int) -> MaskPolicy:
        if (first, past) != (0, heads):
            raise UnsupportedError(
                f"{self.name} is called with all heads: heads {first} to {past - 1} of {heads} can't be "
                "taken alone"
            )
        return self

    def at_layer(self, layer: int) -> MaskPolicy:
        """Return the policy for one layer of a model."""
        return dataclasses.replace(self, layer=layer)

    def _spelled(self, values: dict[str, Any]) -> str:
        fields = dataclasses.fields(self)[1:-1]
        shown = [
            f"{field.name}={self._spell(field.name, values[field.name])}"
            for field in fields
            if values[field.name] != field.default
        ]
        module = getattr(self.function, "__module__", "?")
        return f"{module}:{self.name}" + (f"({', '.join(shown)})" if shown else "")


def function_named(text: str) -> Any:
    """Return the function that "module:function" names.

    Raises:
        InvalidArgumentError: there is no such module or function; the message says why.
    """
    module, _, path = text.partition(":")
    found: Any
    try:
        if module.startswith("."):
            raise ImportError("a module's whole name is needed")
        found = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        refuse("function", f"{text!r} ({error})", '"module:function", which can be imported')
    return found
