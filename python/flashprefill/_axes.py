"""The order of axes: what ``layout`` says, and what a call is told whose tokens and heads are swapped."""

from __future__ import annotations

import warnings
from typing import Any

from .errors import refuse, refuse_type, shown

LAYOUTS = ("bthd", "bhtd")


def heads_first(layout: Any, **where: Any) -> bool:
    """Return whether heads stand before tokens. Refuse what is no layout, or has no other order.

    Args:
        layout: the argument of a verb; None is "bthd".
        **where: the arguments of packed and paged inputs, which have one order only.
    """
    if layout is not None and not isinstance(layout, str):
        refuse_type("layout", shown(layout), '"bthd" or "bhtd"')
    if layout not in (None, *LAYOUTS):
        refuse("layout", shown(layout), '"bthd", [batch, tokens, heads, head_dim], or "bhtd"')
    if layout != "bhtd":
        return False
    for name, value in where.items():
        if value is not None:
            refuse("layout", shown(layout), f'"bthd" with {name}: packed and paged inputs have tokens first')
    return True


def swapped(x: Any) -> Any:
    """Return a view with the axes of tokens and heads swapped; what has no such axes as it is."""
    return x.swapaxes(-3, -2) if getattr(x, "ndim", 0) >= 3 else x


def hint(q_shape: Any, k_shape: Any) -> str:
    """Return the question that a caller with swapped axes has to hear, where heads outnumber tokens."""
    if not (q_shape[-2] > q_shape[-3] or k_shape[-2] > k_shape[-3]):
        return ""
    batch, axes = ("batch, ", "1, 2") if len(q_shape) == 4 else ("", "0, 1")
    return (
        f". Axes are [{batch}tokens, heads, head_dim]; did you pass "
        f'[{batch}heads, tokens, head_dim]? transpose({axes}), or layout="bhtd"'
    )


def shapes(q_shape: Any, k_shape: Any) -> str:
    """Return the shapes as the end of a message, and the question if they look swapped."""
    return f"q.shape is {tuple(q_shape)}, k.shape is {tuple(k_shape)}{hint(q_shape, k_shape)}"


def check_lengths(q_shape: Any, k_shape: Any, causal: bool) -> None:
    """Refuse fewer keys than queries, for inputs that are neither packed nor paged."""
    tokens, keys = q_shape[-3], k_shape[-3]
    if causal and keys < tokens:
        refuse(
            "k's number of tokens",
            keys,
            f"at least q's ({tokens}), since the last query stands at the last key: "
            f"{shapes(q_shape, k_shape)}",
        )


def warn_if_swapped(q_shape: Any, k_shape: Any) -> None:
    """Warn where equal heads let swapped axes pass every check."""
    if q_shape[-2] > q_shape[-3] > 1 and k_shape[-2] > k_shape[-3]:
        warnings.warn(
            f"q, of shape {tuple(q_shape)}, has more heads than tokens{hint(q_shape, k_shape)}. "
            'layout="bthd" says that they are right',
            stacklevel=4,
        )


def as_given(out: Any, given: Any, flip: bool) -> Any:
    """Return the result in the caller's order of axes: the caller's own object, if there was one."""
    if given is not None:
        return given
    return swapped(out) if flip else out
