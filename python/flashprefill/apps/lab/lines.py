"""The table of methods. A new policy shows up in the lab by one line here; without one, by its defaults.

A line is one curve: a policy's name (or a scorer of baselines.py), the fields that stay, the one that is
swept and from where to where, so that densities from about 0.05 to 0.35 come out at the lengths that the lab
reads. Fields for forced blocks are set for all alike, from outside: comparing selections means little while
half of what is kept is kept anyway.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...policies import MaskPolicy, Policy, Streaming
from ...policies.text import make, named
from .baselines import RULES, SCORERS

ALPHAS = (0.02, 0.05, 0.12, 0.25, 0.45, 0.7)
ORACLE_ALPHAS = (0.01, 0.03, 0.08, 0.2, 0.45)
MASSES = (0.4, 0.65, 0.8, 0.9, 0.96)
GAINS = (0.0005, 0.0015, 0.004, 0.012, 0.03)
KEY_GAINS = (0.0003, 0.001, 0.003, 0.01, 0.03)  # Gather's
SKIPS = (0.0001, 0.001, 0.01, 0.05, 0.2)
TAUS = (0.003, 0.01, 0.03, 0.1, 0.3)  # S2O's
GAMMAS = (0.4, 0.65, 0.8, 0.9, 0.95)
COUNTS = (4, 8, 14, 22, 34)  # blocks per tile
NONE_BY_ALPHA = 3e38  # an alpha that no block reaches: min_blocks decides alone

# Sketch at an eighth of V1's products: two pooled rows per tile times mean, variance and six outliers.
EIGHTH = {"query_metric": True, "outliers": 6, "query_pool": 64}


# What Gather forces is its own: it chooses single keys, so blocks are for the nearest alone, and small.
KEYS = {"block_size": 32, "sink_blocks": 1, "window_blocks": 2}


@dataclass(frozen=True)
class Line:
    """One curve: a policy or scorer, fields that stay, the swept field and its values."""

    label: str
    method: str
    parameter: str | None
    values: tuple[float, ...]
    fixed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def scorer(self) -> bool:
        """Whether it is a scorer of the lab's own and no policy."""
        return self.method in SCORERS

    def policy(self, value: float | None, forced: Mapping[str, Any]) -> Policy:
        """The policy at one value of the sweep."""
        own = MaskPolicy if ":" in self.method else named()[self.method]
        arguments: dict[str, Any] = {name: forced[name] for name in own._names() if name in forced}
        arguments.update(self.fixed)
        if self.parameter is not None:
            arguments[self.parameter] = value
        return make(self.method, arguments)


INDEXED_MASSES = (0.3, 0.5, 0.65, 0.8, 0.9, 0.96)

METHODS = (
    Line("Oracle, alpha", "oracle", "alpha", ORACLE_ALPHAS),
    Line("Oracle, share", "oracle", "share", (0.002, 0.006, 0.016, 0.04)),
    Line("FlashPrefill (V1)", "flashprefill", "alpha", ALPHAS),
    Line("FlashPrefill, query_pool=16", "flashprefill", "alpha", ALPHAS, {"query_pool": 16}),
    Line("Sketch, mass", "sketch", "mass", MASSES),
    Line("Sketch, alpha", "sketch", "alpha", ALPHAS),
    Line("Sketch, mass, query metric", "sketch", "mass", MASSES, {"query_metric": True}),
    Line("Sketch, gain, query metric, pool 64", "sketch", "gain", GAINS, EIGHTH),
    Line("Sketch, gain, query metric, pool 128", "sketch", "gain", GAINS, {**EIGHTH, "query_pool": 128}),
    Line("Gather, gain", "gather", "gain", KEY_GAINS, KEYS),
    Line("Gather, gain, window of 512", "gather", "gain", KEY_GAINS, {**KEYS, "window_blocks": 16}),
    Line("Gather, gain, segments of 256", "gather", "gain", KEY_GAINS, {**KEYS, "segment": 256}),
    Line("Gather, gain, per query head", "gather", "gain", KEY_GAINS, {**KEYS, "share_heads": False}),
    Line("Gather, budget", "gather", "budget", (0.02, 0.05, 0.1, 0.2, 0.35), KEYS),
    Line("S2O", "s2o", "tau", TAUS),
    Line("S2O, per KV head", "s2o", "tau", TAUS, {"share_heads": True}),
    Line("FlexPrefill", "flexprefill", "gamma", GAMMAS),
    Line("MInference, vertical-slash", "minference", "slash", (100, 250, 500, 1000, 2000), {"vertical": 100}),
    Line(
        "MInference, tokens",
        "minference",
        "slash",
        (25, 75, 150, 300, 600),
        {"vertical": 400, "rounding": "tokens", "mean_correction": False},
    ),
    Line("XAttention, stride 16", "xattention", "threshold", (0.5, 0.75, 0.87, 0.94, 0.98)),
    Line("RRAttention, stride 8", "rrattention", "threshold", (0.5, 0.75, 0.87, 0.94, 0.98)),
    Line("SpargeAttn, stage 1", "spargeattn", "topk", (0.05, 0.1, 0.15, 0.2, 0.3)),
    Line("Prism", "prism", "mass", (0.5, 0.75, 0.9, 0.97)),
    Line("SampleAttention", "sampleattention", "coverage", (0.05, 0.15, 0.35, 0.7)),
    Line("Bounds (Quest-like)", "bounds", "alpha", (0.003, 0.01, 0.03, 0.08, 0.2, 0.5)),
    Line("Streaming", "streaming", "window_blocks", (4, 8, 12, 20, 32)),
    Line("Dense, skip", "dense", "skip", SKIPS),
)

# With --indexer: its weights come in as another field.
INDEXED = (
    Line(
        "VSPrefill, tokens",
        "vsprefill",
        "vertical_mass",
        INDEXED_MASSES,
        {"slash_mass": 0.01, "rounding": "tokens", "block_size": 128},
    ),
    Line(
        "VSPrefill, blocks",
        "vsprefill",
        "vertical_mass",
        (0.02, 0.1, 0.3, 0.5, 0.65, 0.8),
        {"slash_mass": 0.003, "rounding": "blocks", "block_size": 128},
    ),
)

# Studies: curves that answer one question, drawn and tabled apart.
STUDIES: dict[str, tuple[str, tuple[Line, ...]]] = {
    "alpha": (
        "FlashPrefill's alpha",
        (Line("FlashPrefill (V1)", "flashprefill", "alpha", ALPHAS),),
    ),
    "gamma": (
        "FlexPrefill's gamma",
        (Line("FlexPrefill", "flexprefill", "gamma", GAMMAS),),
    ),
    "tau": (
        "FlexPrefill's tau at gamma 0.9: 0 takes vertical-slash for every head, 1 query-aware",
        (Line("FlexPrefill", "flexprefill", "tau", (0.0, 0.05, 0.1, 0.2, 0.4, 1.0)),),
    ),
    "allocation": (
        "Dynamic or uniform: as many blocks as the scores ask for, or as many for every tile and head",
        (
            Line("FlashPrefill, dynamic", "flashprefill", "alpha", ALPHAS, {"query_pool": 16}),
            Line(
                "FlashPrefill, uniform",
                "flashprefill",
                "min_blocks",
                COUNTS,
                {"query_pool": 16, "alpha": NONE_BY_ALPHA},
            ),
            Line("Sketch, dynamic", "sketch", "mass", MASSES),
            Line("Sketch, uniform", "sketch", "min_blocks", COUNTS, {"alpha": NONE_BY_ALPHA}),
            Line("Oracle, dynamic", "oracle", "alpha", ORACLE_ALPHAS),
            Line("Oracle, uniform", "oracle", "blocks", COUNTS),
        ),
    ),
}


def _known(line: Line) -> bool:
    return line.scorer or line.method in named()


def methods(asked: Sequence[str] = (), indexer: Any = None) -> list[Line]:
    """Return the lines of the table, and one point for each policy that has none.

    Args:
        asked: only these methods, which may be functions, "module:function", or single lines by their labels.
        indexer: VSPrefill's weights; without them it has no line.
    """
    lines = [line for line in METHODS if _known(line)]
    if indexer is not None:
        lines += [dataclasses.replace(line, fixed={**line.fixed, "weights": indexer}) for line in INDEXED]
    swept, policies = {line.method for line in (*lines, *INDEXED)}, named()
    lines += [Line(kind.__name__, name, None, ()) for name, kind in policies.items() if name not in swept]
    lines += [Line(name, name, None, ()) for name in asked if ":" in name]  # functions of the user's
    lines = [line for line in lines if line.method != "dense"]
    return [line for line in lines if not asked or line.method in asked or line.label in asked]


def studies(asked: Sequence[str] = ()) -> dict[str, tuple[str, list[Line]]]:
    """The studies whose methods are here, by name, with their titles."""
    found = {}
    for name, (title, lines) in STUDIES.items():
        some = [line for line in lines if _known(line) and (not asked or line.method in asked)]
        if some:
            found[name] = (title, some)
    return found


def names() -> list[str]:
    """The methods that `--method` may name."""
    return list(dict.fromkeys(line.method for line in (*methods(), *INDEXED)))


def labels() -> list[str]:
    """The single lines that it may name."""
    return [line.label for line in methods()]


def thinned(line: Line, points: int) -> Line:
    """The same line with fewer values, its ends among them."""
    if len(line.values) <= points:
        return line
    step = (len(line.values) - 1) / max(1, points - 1)
    return dataclasses.replace(line, values=tuple(line.values[round(i * step)] for i in range(points)))


def check() -> None:
    """Every line's method, rule and fields exist."""
    for line in (*METHODS, *(line for _, lines in STUDIES.values() for line in lines)):
        if line.scorer:
            assert line.parameter in RULES, line
        elif line.method in named():
            for value in line.values:
                line.policy(value, {})


def forced_policy(forced: Mapping[str, Any], block_size: int = 128) -> Streaming:
    """The policy that keeps the forced blocks alone."""
    return Streaming(**forced, block_size=block_size)
