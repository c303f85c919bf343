"""Aligned text tables: the first column to the left, figures to the right."""

from __future__ import annotations

from collections.abc import Sequence


def seconds(value: float) -> str:
    """Seconds, to the tenth of a millisecond where there is less than one."""
    return f"{value:.2f}" if value >= 1.0 else f"{value:.4f}"


def places(seconds: float) -> int:
    """Return the decimal places of milliseconds, where dense attention takes `seconds`."""
    return 3 if seconds < 0.05 else 0  # a GPU's


def render(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table as lines. A header cell may hold a newline; all cells of a column get one width."""
    heads = [cell.split("\n") for cell in header]
    lines = max(len(head) for head in heads)
    top = [
        [head[i - lines + len(head)] if i >= lines - len(head) else "" for head in heads]
        for i in range(lines)
    ]
    body = [list(row) for row in rows]
    widths = [max(len(row[i]) for row in top + body) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        return "  ".join(cells).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([*(line(row) for row in top), rule, *(line(row) for row in body)])
