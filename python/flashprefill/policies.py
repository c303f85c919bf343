"""Policies: which blocks of keys a tile of queries keeps.

Each is a plain frozen dataclass of numbers, with the defaults that its paper or our own study publishes,
checked when it is made. A policy counts in *blocks* of ``block_size`` keys. The words that all share:

``block_size``
    keys a block, a multiple of 16 from 16 to 1024.
``sink_blocks``
    blocks; the first so many of a sequence are always kept.
``window_blocks``
    blocks; always kept from ``window_blocks - 1`` before the block of the tile's first token up to the block
    of its last. The tile's own diagonal is kept even with 0.
``dense_tail_blocks``
    blocks; so many blocks' worth of the last query tiles of a prompt's final chunk keep everything.
``share_heads``
    the query heads of a KV head share one list of blocks, and a tile is floor(128 / group) tokens times the
    group's heads (FlashPrefill V2). Without it each query head has its own list and tiles of 128 tokens (V1).
``mean_correction``
    blocks left out, and visible to the whole tile, count by their mean key and mean value (V2).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from .errors import refuse, refuse_type

__all__ = [
    "Dense",
    "FlashPrefill",
    "FlexPrefill",
    "MInference",
    "Policy",
    "Prism",
    "RRAttention",
    "SampleAttention",
    "Sketch",
    "SpargeAttn",
    "Streaming",
    "XAttention",
]

_MAX_FLOAT32 = 3.4028234663852886e38
_MAX_TOKENS = (1 << 31) - 1
_MAX_BLOCKS = 1 << 24  # the library's limit: more blocks than the longest sequence has

# alpha by family of models, as the paper's code sets it (V1's evaluation scripts and patches).
_ALPHAS = {
    "llama-3.1": 0.18,
    "qwen2": 0.08,
    "qwen2.5": 0.08,
    "qwen2.5-vl": 0.10,
    "qwen3-30b": 0.12,
    "qwen3-moe": 0.12,
    "qwen3-vl-30b": 0.22,
}


def _number(name: str, value: Any) -> float:
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
        refuse_type(name, repr(value), "a number")
    return float(value)


def _integer(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        refuse_type(name, repr(value), "an integer")
    number = int(value)
    if not low <= number <= high:
        refuse(name, number, f"from {low} to {high}")
    return number


def _alpha(value: Any) -> float:
    number = _number("alpha", value)
    if not 0.0 <= number <= _MAX_FLOAT32:  # false for NaN too
        refuse("alpha", number, "finite and at least 0")
    return number


class Policy:
    """The base of all policies. Make one of its subclasses."""

    kind: ClassVar[str] = ""  # the policy's name in specs
    block_size: int
    share_heads: bool
    _spec: str

    def _seal(self, **checked: Any) -> None:
        """Check the fields that all policies share, store checked values, and write the spec.

        The spec is the policy as one string of numbers, which is what goes through a torch operator: a string
        shows in graphs what was asked for, and torch.compile guards on it with one comparison.
        """
        shared: dict[str, Any] = {}
        for field in ("sink_blocks", "window_blocks", "dense_tail_blocks", "min_blocks"):
            if hasattr(self, field):
                shared[field] = _integer(field, getattr(self, field), 0, _MAX_BLOCKS)
        for field in ("share_heads", "mean_correction", "query_metric"):
            if hasattr(self, field):
                value = getattr(self, field)
                if not isinstance(value, bool):
                    refuse_type(field, repr(value), "True or False")
        if hasattr(self, "query_pool"):
            shared["query_pool"] = _integer("query_pool", self.query_pool, 1, 128)
        block_size = _integer("block_size", self.block_size, 16, 1024)
        if block_size % 16:
            refuse("block_size", block_size, "a multiple of 16")
        shared["block_size"] = block_size
        for name, value in {**shared, **checked}.items():
            object.__setattr__(self, name, value)
        spec = self.kind
        for name in type(self).__dataclass_fields__:  # type: ignore[attr-defined]
            spec += self._spell(name, getattr(self, name))
        object.__setattr__(self, "_spec", spec)

    def _spell(self, name: str, value: Any) -> str:
        """Return a field as the spec has it: a number, or rows of integers, "1:2:3,4:5:6"."""
        return f" {name}={'nan' if value is None else int(value) if isinstance(value, bool) else value}"

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Policy:
        """Make a policy of a mapping of options, which may name fields as the method's own code does."""
        return cls(**options)

    def _line_room(self, keys: int) -> tuple[int, int]:
        """Return how many columns and distances of single tokens a mask head needs room for."""
        return 0, 0

    @property
    def corrects(self) -> bool:
        """Whether blocks left out count by their means."""
        return bool(getattr(self, "mean_correction", False))

    def __reduce__(self) -> Any:
        return type(self), tuple(getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Dense(Policy):
    """Everything is kept: exact attention.

    Args:
        block_size: keys a block of the mask that says so.
        share_heads: whether that mask has one head for each KV head.
    """

    block_size: int = 128
    share_heads: bool = False

    kind = "dense"

    def __post_init__(self) -> None:
        self._seal()


@dataclass(frozen=True)
class Streaming(Policy):
    """Sink and window blocks only, nothing is scored.

    StreamingLLM's pattern (arXiv 2309.17453), also called A-shape; with a dense tail, Tri-shape.

    Args:
        sink_blocks: blocks kept at the beginning.
        window_blocks: blocks kept before and at the diagonal.
        dense_tail_blocks: blocks' worth of last query tiles that keep everything.
        block_size: keys a block.
        share_heads: one list for the query heads of a KV head.
        mean_correction: blocks left out count by their means.
    """

    sink_blocks: int = 2
    window_blocks: int = 4
    dense_tail_blocks: int = 2
    block_size: int = 128
    share_heads: bool = False
    mean_correction: bool = False

    kind = "streaming"

    def __post_init__(self) -> None:
        self._seal()

    @classmethod
    def a_shape(
        cls, n_init: int = 128, n_local: int = 3968, *, block_size: int = 128, **fields: Any
    ) -> Streaming:
        """Return A-shape, in tokens rounded out to blocks: the first n_init keys and each row's nearest.

        The defaults are MInference's (arXiv 2407.02490).
        """
        first, nearest = (
            _integer("n_init", n_init, 0, _MAX_TOKENS),
            _integer("n_local", n_local, 1, _MAX_TOKENS),
        )
        size = _integer("block_size", block_size, 16, 1024)
        # A row at the beginning of a block sees n_local - 1 keys before itself.
        window = -(-(nearest - 1) // size) + 1
        forced = {"sink_blocks": -(-first // size), "window_blocks": window, "dense_tail_blocks": 0}
        return cls(**{**forced, "block_size": size, **fields})

    @classmethod
    def tri_shape(
        cls,
        n_init: int = 128,
        n_local: int = 3968,
        n_last: int = 100,
        *,
        block_size: int = 128,
        **fields: Any,
    ) -> Streaming:
        """Return A-shape whose last n_last rows see everything, rounded out to tiles.

        The defaults are MInference's; its second benchmark is where Tri-shape comes from (SCBench, arXiv
        2412.10319). Rows that end a prompt may begin in the middle of a tile, so that there is one tile more
        than they fill.
        """
        rows = _integer("n_last", n_last, 0, _MAX_TOKENS)
        size = _integer("block_size", block_size, 16, 1024)
        tiles = -(-(rows - 1) // 128) + 1 if rows else 0
        tail = {"dense_tail_blocks": -(-tiles * 128 // size)}
        return cls.a_shape(n_init, n_local, block_size=size, **{**tail, **fields})


@dataclass(frozen=True)
class FlashPrefill(Policy):
    """FlashPrefill (arXiv 2603.06199), and its second version (arXiv 2608.19758).

    A block of keys is scored by its mean key: the sum over the tile's rows of exp(scale * q . mean). Kept are
    blocks from
    ``alpha`` times the tile's best score on. V2 is ``share_heads=True, mean_correction=True``.

    Args:
        alpha: threshold as a share of the tile's best score, in [0, inf). 0 keeps every block, 1 the best
            one. 0.12 is what the paper sets for Qwen3-30B; see :meth:`for_model`.
        sink_blocks: blocks kept at the beginning.
        window_blocks: blocks kept before and at the diagonal.
        dense_tail_blocks: blocks' worth of last query tiles that keep everything.
        block_size: keys a block; the paper tunes for 128.
        query_pool: rows; scores are those of means of so many consecutive query rows of a head, 1 to 128. 1
            is the paper, 16 costs 16 times less arithmetic at the same quality (docs: selectors).
        share_heads: one list for the query heads of a KV head (V2).
        mean_correction: blocks left out count by their means (V2).
        min_blocks: blocks; at least the top so many by score are kept.
    """

    alpha: float = 0.12
    sink_blocks: int = 2
    window_blocks: int = 4
    dense_tail_blocks: int = 2
    block_size: int = 128
    query_pool: int = 1
    share_heads: bool = False
    mean_correction: bool = False
    min_blocks: int = 0

    kind = "flashprefill"

    def __post_init__(self) -> None:
        self._seal(alpha=_alpha(self.alpha))

    @classmethod
    def for_model(cls, name: str, **changes: Any) -> FlashPrefill:
        """Return the policy that the paper's code uses for a family of models.

        Args:
            name: "llama-3.1", "qwen2", "qwen2.5", "qwen2.5-vl", "qwen3-30b", "qwen3-moe" or "qwen3-vl-30b".
            **changes: other fields of the policy.

        Raises:
            ValueError: the name is not known; the message lists those that are.
        """
        alpha = _ALPHAS.get(str(name).lower())
        if alpha is None:
            refuse("name", repr(name), "one of " + ", ".join(sorted(_ALPHAS)))
        return cls(**{"alpha": alpha, **changes})


@dataclass(frozen=True)
class Sketch(Policy):
    """Our own: FlashPrefill whose blocks are described by their outliers beside the rest's mean and variance.

    The mean of 128 keys hides the few of them that matter. Here the ``outliers`` keys farthest from the mean
    stand for themselves, and the rest for its mean and diagonal variance (docs: selectors).

    Args:
        mass: keep the smallest set of blocks that holds this share of the tile's estimated softmax mass, in
            (0, 1]. 0.95 unless ``alpha`` or ``gain`` is given: one of the three decides.
        alpha: keep blocks from this share of the tile's best score on, in [0, inf).
        gain: keep blocks, the best first, while share * sqrt(rest) is at least this, in (0, 1). share is a
            block's share of the tile's estimated mass, rest that of all blocks from it on.
        query_metric: outliers are the keys farthest from the mean as queries see it: each dimension of the
            distance weighs by the squares of a sample of the queries (the last row of each tile). CPU only so
            far.
        outliers: keys a block that stand for themselves, 0 to 16.
        query_pool: rows; scores are those of means of so many consecutive query rows of a head, 1 to 128.
        sink_blocks: blocks kept at the beginning.
        window_blocks: blocks kept before and at the diagonal.
        dense_tail_blocks: blocks' worth of last query tiles that keep everything.
        block_size: keys a block.
        share_heads: one list for the query heads of a KV head.
        mean_correction: blocks left out count by their means.
        min_blocks: blocks; at least the top so many by score are kept.
    """

    mass: float | None = None
    alpha: float | None = None
    outliers: int = 4
    query_pool: int = 16
    sink_blocks: int = 2
    window_blocks: int = 4
    dense_tail_blocks: int = 2
    block_size: int = 128
    share_heads: bool = False
    mean_correction: bool = False
    min_blocks: int = 0
    gain: float | None = None
    query_metric: bool = False

    kind = "sketch"

    def __post_init__(self) -> None:
        mass, alpha, gain = self.mass, self.alpha, self.gain
        if mass is not None and alpha is not None:
            refuse("alpha", alpha, f"None where mass is given ({mass}): one of them decides")
        for name, other in (("mass", mass), ("alpha", alpha)):
            if gain is not None and other is not None:
                refuse("gain", gain, f"None where {name} is given ({other}): one of them decides")
        if gain is not None:
            gain = _number("gain", gain)
            if not 1e-37 <= gain < 1.0:  # would be 0 or subnormal in fp32 below; false for NaN too
                refuse("gain", gain, "at least 1e-37 and below 1")
        elif alpha is not None:
            alpha = _alpha(alpha)
        else:
            mass = _number("mass", 0.95 if mass is None else mass)
            if not 0.0 < mass <= 1.0:
                refuse("mass", mass, "above 0 and at most 1")
            if mass < 1e-37:  # would be 0 or subnormal in fp32
                refuse("mass", mass, "at least 1e-37")
        self._seal(mass=mass, alpha=alpha, gain=gain, outliers=_integer("outliers", self.outliers, 0, 16))


@dataclass(frozen=True)
class FlexPrefill(Policy):
    """FlexPrefill (arXiv 2502.20766): each head finds by itself what it keeps, from its last query rows.

    The softmax of the last ``block_size`` query rows over all keys is summed by key (columns) and by distance
    (diagonals). Where the pooled keys foretell the columns (Jensen-Shannon distance below ``tau``), the head
    is *query-aware*: blocks are kept by pooled scores of each block of queries, until they hold ``gamma`` of
    the head's whole map. Else it keeps columns and diagonals of blocks, as many as hold ``gamma`` of those
    rows' mass. The first column and the diagonal are kept always. See docs/methods/flexprefill.md.

    Args:
        gamma: share of the mass to keep, in (0, 1]. The authors use 0.95 for Llama-3.1-8B and GLM-4-9B, 0.9
            for Qwen2-7B and Yi-9B.
        tau: Jensen-Shannon distance, at least 0; 0 makes no head query-aware. The authors use 0.1.
        min_budget: tokens; columns and diagonals hold at least so many, rounded up to blocks.
        max_budget: tokens; at most so many; None is no limit.
        block_size: keys a block, and the query rows that are looked at; 128 is the paper.
        cover: a diagonal of tokens crosses two diagonals of blocks. "first" keeps the nearer of them, as
            published; "both" keeps both.
        sink_blocks: blocks kept at the beginning, beside what the policy keeps.
        window_blocks: blocks kept before and at the diagonal.
        dense_tail_blocks: blocks' worth of last query tiles that keep everything.
        mean_correction: blocks left out count by their means.
    """

    gamma: float = 0.9
    tau: float = 0.1
    min_budget: int = 512
    max_budget: int | None = None
    block_size: int = 128
    cover: str = "first"
    sink_blocks: int = 0
    window_blocks: int = 0
    dense_tail_blocks: int = 0
    mean_correction: bool = False

    kind = "flexprefill"
    share_heads = False

    def __post_init__(self) -> None:
        gamma, tau = _number("gamma", self.gamma), _number("tau", self.tau)
        if not 1e-37 <= gamma <= 1.0:
            refuse("gamma", gamma, "above 0 and at most 1")
        if not 0.0 <= tau <= _MAX_FLOAT32:
            refuse("tau", tau, "finite and at least 0")
        least = _integer("min_budget", self.min_budget, 0, _MAX_TOKENS)
        most = self.max_budget
        if most is not None:
            most = _integer("max_budget", most, 1, _MAX_TOKENS)
            if most < least:
                refuse("max_budget", most, f"at least min_budget ({least}), or None")
        if self.cover not in _COVERS:
            refuse("cover", repr(self.cover), "one of " + ", ".join(map(repr, _COVERS)))
        self._seal(gamma=gamma, tau=tau, min_budget=least, max_budget=most)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> FlexPrefill:
        """Make a policy of FlexPrefill's own options, "flex_prefill_gamma" and so on, or of fields."""
        return cls(**{name.removeprefix("flex_prefill_"): value for name, value in options.items()})

    @classmethod
    def for_model(cls, name: str, **changes: Any) -> FlexPrefill:
        """Return the policy that the authors' scripts use for a family of models.

        Args:
            name: "llama-3.1", "glm-4", "qwen2" or "yi-9b-200k".
            **changes: other fields of the policy.

        Raises:
            ValueError: the name is not known; the message lists those that are.
        """
        gamma = _GAMMAS.get(str(name).lower())
        if gamma is None:
            refuse("name", repr(name), "one of " + ", ".join(sorted(_GAMMAS)))
        return cls(**{"gamma": gamma, "tau": 0.1, "min_budget": 1024, **changes})

    def _spell(self, name: str, value: Any) -> str:
        if name == "cover":
            return f" cover={_COVERS.index(value)}"
        return super()._spell(name, 0 if name == "max_budget" and value is None else value)


@dataclass(frozen=True)
class MInference(Policy):
    """MInference (arXiv 2407.02490): a pattern for each head, found once for a model.

    *Vertical and slash*: the softmax of the last 64 query rows over all keys, summed by key and by distance;
    the ``vertical`` keys and ``slash`` distances with the largest sums are kept, the first 30 keys and the
    nearest 100 distances always among them. Without a table of heads all of them use it, with the authors'
    default for models that they have no table for. See docs/methods/minference.md.

    Args:
        vertical: tokens; columns that a head keeps.
        slash: tokens; diagonals that a head keeps.
        heads: a (pattern, a, b) for each query head, in place of vertical and slash: ("vertical_and_slash",
            columns, diagonals), ("stream_llm", first tokens, nearest tokens) or ("block_sparse", blocks, 0).
        rounding: "blocks" rounds columns and diagonals out to the blocks that hold some of them, which every
            backend can attend to; "tokens" keeps them as they are, as published: on the CPU, and without
            mean_correction.
        block_size: keys a block; 64 are the authors' kernels'.
        sink_blocks: blocks kept at the beginning, beside what the policy keeps.
        window_blocks: blocks kept before and at the diagonal.
        dense_tail_blocks: blocks' worth of last query tiles that keep everything.
        mean_correction: blocks left out count by their means.
    """

    vertical: int = 1000
    slash: int = 6096
    heads: tuple[tuple[str, int, int], ...] | None = None
    rounding: str = "blocks"
    block_size: int = 64
    sink_blocks: int = 0
    window_blocks: int = 0
    dense_tail_blocks: int = 0
    mean_correction: bool = False

    kind = "minference"
    share_heads = False

    def __post_init__(self) -> None:
        heads = self.heads
        if heads is not None:
            heads = tuple(_pattern(f"heads[{h}]", entry) for h, entry in enumerate(heads))
            if not heads:
                refuse("heads", heads, "a pattern for each query head, or None")
        if self.rounding not in _ROUNDINGS:
            refuse("rounding", repr(self.rounding), "one of " + ", ".join(map(repr, _ROUNDINGS)))
        if self.rounding == "tokens" and self.mean_correction is True:
            refuse("mean_correction", True, 'False with rounding="tokens": parts of blocks have no mean')
        self._seal(
            vertical=_integer("vertical", self.vertical, 0, _MAX_TOKENS),
            slash=_integer("slash", self.slash, 0, _MAX_TOKENS),
            heads=heads,
        )

    @classmethod
    def from_config(
        cls, config: Any, *, q_heads: int | None = None, ratio: float = 1.0, **fields: Any
    ) -> dict[Any, MInference]:
        """Read a table of heads as MInference ships them, into a policy for each layer.

        Args:
            config: a path to the JSON file, or what is in it: a list with an object a layer, from a head's
                index to [pattern, a, b, score]. A head that is missing gets the authors' default,
                ["vertical_and_slash", 1000, 6096].
            q_heads: query heads of the model; the default is what the table's largest index says.
            ratio: factor on every a and b of vertical and slash (the authors' minference_ratio).
            **fields: other fields of the policies.

        Returns:
            A mapping from layer to policy, with the default for layers that the table has not: what
            ``flashprefill.patch_model(model, mapping)`` takes.
        """
        if isinstance(config, (str, os.PathLike)):
            config = json.loads(Path(config).read_text())
        if not isinstance(config, list) or not all(isinstance(layer, Mapping) for layer in config):
            refuse_type("config", repr(config)[:60], "a list with one object a layer, or a path to it")
        if not ratio > 0.0:
            refuse("ratio", ratio, "above 0")
        if q_heads is None:
            q_heads = 1 + max((int(head) for layer in config for head in layer), default=-1)
        scaled: dict[Any, MInference] = {}
        for number, layer in enumerate(config):
            heads = [(_PATTERNS[0], 1000, 6096)] * q_heads
            for head, entry in layer.items():
                if not 0 <= int(head) < q_heads:
                    refuse(f"config[{number}]'s head", head, f"from 0 to {q_heads - 1}")
                pattern, a, b = _pattern(f"config[{number}][{head}]", tuple(entry)[:3])
                heads[int(head)] = pattern, a, b
            if ratio != 1.0:
                heads = [
                    (p, int(a * ratio), int(b * ratio)) if p == _PATTERNS[0] else (p, a, b)
                    for p, a, b in heads
                ]
            scaled[number] = cls(heads=tuple(heads), **fields)
        scaled["default"] = cls(**fields)
        return scaled

    @classmethod
    def for_model(cls, name: str, **changes: Any) -> MInference:
        """Return the policy of a model for which the authors publish one pair of numbers for all heads.

        Args:
            name: "llama-3.1-8b". Other models have tables of heads, which :meth:`from_config` reads, or the
                default, ``MInference()``.
            **changes: other fields of the policy.

        Raises:
            ValueError: the name is not known; the message lists those that are.
        """
        pair = _PAIRS.get(str(name).lower())
        if pair is None:
            refuse("name", repr(name), "one of " + ", ".join(sorted(_PAIRS)))
        return cls(**{"vertical": pair[0], "slash": pair[1], **changes})

    def _line_room(self, keys: int) -> tuple[int, int]:
        if self.rounding != "tokens":
            return 0, 0
        heads = self.heads or ((_PATTERNS[0], self.vertical, self.slash),)
        pairs = [(max(a, 30), max(b, 50)) for pattern, a, b in heads if pattern == _PATTERNS[0]]
        if not pairs:
            return 0, 0
        return min(keys, max(a for a, _ in pairs)), min(keys, max(b for _, b in pairs))

    def _spell(self, name: str, value: Any) -> str:
        if name == "rounding":
            return f" rounding={_ROUNDINGS.index(value)}"
        if name != "heads":
            return super()._spell(name, value)
        if value is None:
            return ""
        rows = ",".join(f"{_PATTERNS.index(pattern)}:{a}:{b}" for pattern, a, b in value)
        return f" head_count={len(value)} heads={rows}"


_GAMMAS = {"llama-3.1": 0.95, "glm-4": 0.95, "qwen2": 0.9, "yi-9b-200k": 0.9}  # FlexPrefill's scripts
_PAIRS = {"llama-3.1-8b": (512, 2048)}  # MInference's second table for it has one pair
_COVERS = ("first", "both")  # by fp_flex_cover
_ROUNDINGS = ("blocks", "tokens")  # by fp_rounding
_PATTERNS = ("vertical_and_slash", "stream_llm", "block_sparse")  # by fp_minference_pattern


def _pattern(name: str, entry: Any) -> tuple[str, int, int]:
    if not isinstance(entry, (list, tuple)) or len(entry) != 3:
        refuse_type(name, repr(entry), "(pattern, a, b)")
    pattern, a, b = entry
    if pattern not in _PATTERNS:
        refuse(f"{name}'s pattern", repr(pattern), "one of " + ", ".join(_PATTERNS))
    return pattern, _integer(f"{name}'s a", a, 0, _MAX_TOKENS), _integer(f"{name}'s b", b, 0, _MAX_TOKENS)


_STRIDES = (4, 8, 16, 32, 64, 128)


def _share(name: str, value: Any, *, zero: bool = False) -> float:
    number = _number(name, value)
    if not (0.0 if zero else 1e-37) <= number <= 1.0:  # 1e-37: less would be 0 or subnormal in fp32
        refuse(name, number, "at least 0 and at most 1" if zero else "above 0 and at most 1")
    return number


def _stride(stride: Any, block_size: Any) -> int:
    number = _integer("stride", stride, 4, 128)
    if number not in _STRIDES:
        refuse("stride", number, "4, 8, 16, 32, 64 or 128")
    if _integer("block_size", block_size, 16, 1024) % number:
        refuse("stride", number, f"a divisor of block_size ({block_size})")
    return number


@dataclass(frozen=True)
class XAttention(Policy):
    """XAttention (arXiv 2503.16428): blocks by the sums of the anti-diagonals of a strided grid.

    Queries and keys are cut into cells of ``stride`` tokens. A pair of cells is scored by the sum over its
    anti-diagonal, each row of the grid becomes a softmax, and the masses of a tile's rows are summed by
    block. A tile keeps its forced blocks (as published the first one and the diagonal) and, by descending
    mass, as many others as it takes to hold ``threshold`` of its mass. See docs/methods/xattention.md.

    Args:
        threshold: share of the mass to keep, in [0, 1]; 0 keeps the forced blocks alone.
        stride: tokens a cell, 4, 8, 16, 32, 64 or 128, and a divisor of ``block_size``; 8 and 16 are the
            paper's.
        norm: divides the scores, above 0; 1 in the paper.
        head_thresholds: one threshold for each query head, in place of ``threshold``.
        block_size: keys a block; 128 is the paper.
        sink_blocks: blocks kept at the beginning, counted before the others.
        window_blocks: blocks kept before and at the diagonal, counted before the others.
        dense_tail_blocks: blocks' worth of last query tiles that keep everything.
        mean_correction: blocks left out count by their means.
    """

    threshold: float = 0.9
    stride: int = 16
    norm: float = 1.0
    head_thresholds: tuple[float, ...] | None = None
    block_size: int = 128
    sink_blocks: int = 1
    window_blocks: int = 1
    dense_tail_blocks: int = 0
    mean_correction: bool = False

    kind = "xattention"
    share_heads = False

    def __post_init__(self) -> None:
        norm = _number("norm", self.norm)
        if not 1e-37 <= norm <= _MAX_FLOAT32:
            refuse("norm", norm, "finite and above 0")
        heads = self.head_thresholds
        if heads is not None:
            heads = tuple(_share(f"head_thresholds[{h}]", each, zero=True) for h, each in enumerate(heads))
            if not heads:
                refuse("head_thresholds", heads, "a threshold for each query head, or None")
        self._seal(
            threshold=_share("threshold", self.threshold, zero=True),
            stride=_stride(self.stride, self.block_size),
            norm=norm,
            head_thresholds=heads,
        )

    def _spell(self, name: str, value: Any) -> str:
        if name != "head_thresholds":
            return super()._spell(name, value)
        return (
            "" if value is None else f" head_count={len(value)} head_thresholds=:{':'.join(map(str, value))}"
        )


@dataclass(frozen=True)
class RRAttention(Policy):
    """RRAttention (arXiv 2602.05853): a strided grid of single queries, another one of a cell in each head.

    As :class:`XAttention`, but a row of the grid is one query of its cell, another one in each head, and a
    key cell is the mean of its keys. A tile keeps the smallest set of blocks that holds ``threshold`` of its
    mass, and its forced blocks. See docs/methods/rrattention.md.

    Args:
        threshold: share of the mass to keep, in (0, 1]; the paper uses 0.95 and 0.9.
        stride: tokens a cell, 4, 8, 16, 32, 64 or 128, and a divisor of ``block_size``; 8 is the paper's.
        block_size: keys a block; 128 is the paper.
        sink_blocks: blocks kept at the beginning.
        window_blocks: blocks kept before and at the diagonal.
        dense_tail_blocks: blocks' worth of last query tiles that keep everything.
        mean_correction: blocks left out count by their means.
    """

    threshold: float = 0.95
    stride: int = 8
    block_size: int = 128
    sink_blocks: int = 1
    window_blocks: int = 1
    dense_tail_blocks: int = 0
    mean_correction: bool = False

    kind = "rrattention"
    share_heads = False

    def __post_init__(self) -> None:
        self._seal(
            threshold=_share("threshold", self.threshold), stride=_stride(self.stride, self.block_size)
        )


@dataclass(frozen=True)
class SpargeAttn(Policy):
    """SpargeAttn's first stage (arXiv 2502.18137): means stand for blocks whose tokens are alike.

    Where the mean cosine of a block's tokens is above ``similarity``, the softmax of mean query times mean
    key ranks the key blocks of a tile. Key blocks of other kinds are kept, and so is everything for a tile of
    queries that are not alike. See docs/methods/spargeattn.md.

    Args:
        cdf: keep the top blocks whose probabilities sum up to at most this, at least one, in [0, 1]. 0.98
            unless ``topk`` is given.
        topk: keep the top floor(topk * all key blocks of the sequence), in [0, 1]. One of cdf and topk
            decides.
        similarity: mean cosine, in [-1, 1]; below 0 all blocks are alike. The authors use 0.6 with cdf, -0.1
            with topk.
        block_size: keys a block; 64 is the paper's.
        sink_blocks: blocks kept at the beginning.
        window_blocks: blocks kept before and at the diagonal.
        dense_tail_blocks: blocks' worth of last query tiles that keep everything.
        mean_correction: blocks left out count by their means.
    """

    cdf: float | None = None
    topk: float | None = None
    similarity: float | None = None
    block_size: int = 64
    sink_blocks: int = 0
    window_blocks: int = 0
    dense_tail_blocks: int = 0
    mean_correction: bool = False

    kind = "spargeattn"
    share_heads = False

    def __post_init__(self) -> None:
        cdf, topk = self.cdf, self.topk
        if cdf is not None and topk is not None:
            refuse("topk", topk, f"None where cdf is given ({cdf}): one of the two decides")
        if topk is not None:
            topk = _share("topk", topk, zero=True)
        else:
            cdf = _share("cdf", 0.98 if cdf is None else cdf, zero=True)
        similarity = self.similarity
        similarity = _number(
            "similarity", (0.6 if topk is None else -0.1) if similarity is None else similarity
        )
        if not -1.0 <= similarity <= 1.0:
            refuse("similarity", similarity, "at least -1 and at most 1")
        self._seal(cdf=cdf, topk=topk, similarity=similarity)


@dataclass(frozen=True)
class Prism(Policy):
    """Prism (arXiv 2602.08426): pooled scores in two bands of rotary frequencies.

    A mean over a block averages out what rotates fast. So the fast and the slow dimensions are scored apart,
    each with the temperature that its pooled energy calls for, and a tile keeps the union of the smallest
    sets that hold ``mass`` of either softmax. See docs/methods/prism.md.

    Args:
        mass: share of a band's probability to keep, in (0, 1]; 0.95 in the paper.
        rotary_dim: dimensions that are rotated, the first ones; 0 is head_dim.
        high_pairs: rotary pairs in the high band, fastest first; 0 is half of them (the paper: 32 of 64).
        low_pairs: rotary pairs in the low band, slowest first; 0 is three quarters of them (the paper: 48 of
            64). Dimensions that are not rotated belong to the low band.
        interleaved: False: dimension i is paired with i + rotary_dim / 2 (Llama, Qwen in Transformers); True:
            2i with 2i + 1.
        block_size: keys a block; 128 is the paper's.
        sink_blocks: blocks kept at the beginning.
        window_blocks: blocks kept before and at the diagonal.
        dense_tail_blocks: blocks' worth of last query tiles that keep everything.
        mean_correction: blocks left out count by their means.
    """

    mass: float = 0.95
    rotary_dim: int = 0
    high_pairs: int = 0
    low_pairs: int = 0
    interleaved: bool = False
    block_size: int = 128
    sink_blocks: int = 1
    window_blocks: int = 2
    dense_tail_blocks: int = 0
    mean_correction: bool = False

    kind = "prism"
    share_heads = False

    def __post_init__(self) -> None:
        rotary = _integer("rotary_dim", self.rotary_dim, 0, 512)
        if rotary % 2:
            refuse("rotary_dim", rotary, "even")
        if not isinstance(self.interleaved, bool):
            refuse_type("interleaved", repr(self.interleaved), "True or False")
        self._seal(
            mass=_share("mass", self.mass),
            rotary_dim=rotary,
            high_pairs=_integer("high_pairs", self.high_pairs, 0, 256),
            low_pairs=_integer("low_pairs", self.low_pairs, 0, 256),
        )


@dataclass(frozen=True)
class SampleAttention(Policy):
    """SampleAttention (arXiv 2406.15486): columns and diagonals of blocks by the softmax of sampled rows.

    Some query rows at the end of each segment of the prompt attend to all keys exactly. Their mass, summed by
    key block and by distance in blocks, decides which columns and diagonals all tiles of the head keep,
    beside a window. See docs/methods/sampleattention.md.

    Args:
        coverage: share of the sampled mass that columns, and diagonals, hold each, in (0, 1]; 0.95 in the
            paper.
        sample_ratio: share of the query rows that are sampled, in (0, 1]; 0.05 in the paper.
        window_ratio: tokens before a tile that are kept, as a share of the sequence's keys, in [0, 1]; 0.08
            in the paper.
        sample_rows: rows sampled at the end of each segment of about sample_rows / sample_ratio rows, 1 to
            128.
        block_size: keys a block; 128 is the paper's.
        sink_blocks: blocks kept at the beginning.
        window_blocks: blocks kept before and at the diagonal, beside ``window_ratio``.
        dense_tail_blocks: blocks' worth of last query tiles that keep everything.
        mean_correction: blocks left out count by their means.
    """

    coverage: float = 0.95
    sample_ratio: float = 0.05
    window_ratio: float = 0.08
    sample_rows: int = 32
    block_size: int = 128
    sink_blocks: int = 1
    window_blocks: int = 1
    dense_tail_blocks: int = 0
    mean_correction: bool = False

    kind = "sampleattention"
    share_heads = False

    def __post_init__(self) -> None:
        self._seal(
            coverage=_share("coverage", self.coverage),
            sample_ratio=_share("sample_ratio", self.sample_ratio),
            window_ratio=_share("window_ratio", self.window_ratio, zero=True),
            sample_rows=_integer("sample_rows", self.sample_rows, 1, 128),
        )


def numbers_of(spec: str) -> tuple[str, dict[str, float | list[list[float]]]]:
    """Read a policy's spec back: its kind and its fields, None as NaN, rows of integers as lists."""
    kind, *parts = spec.split()
    fields: dict[str, float | list[list[float]]] = {}
    for part in parts:
        name, value = part.split("=")
        if ":" in value:
            fields[name] = [[float(x) for x in row.split(":") if x] for row in value.split(",")]
        else:
            fields[name] = math.nan if value == "nan" else float(value)
    return kind, fields
