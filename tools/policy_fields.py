"""Writes the table of all fields of all policies into docs/policies.md, from the library's own rows.

    .venv/bin/python tools/policy_fields.py [--check]

The table stands between two HTML comments of that page. With --check nothing is written; the exit status is 1
if the page is behind the library.
"""

from __future__ import annotations

import ctypes
import math
import sys
from pathlib import Path

from flashprefill import _abi

PAGE = Path(__file__).resolve().parents[1] / "docs" / "policies.md"
BEGIN, END = "<!-- tools/policy_fields.py writes this -->\n", "<!-- to here -->\n"


def value_of(number: float, field: _abi.PolicyField) -> str:
    """Return a value as the text form has it."""
    if math.isnan(number):
        return "none"
    if field.type == _abi.BOOL:
        return "true" if number else "false"
    if field.type == _abi.CHOICE:
        return field.choices.decode().split()[int(number)]
    if field.flags & _abi.ZERO_IS_NONE and number == 0:
        return "none"
    return f"{number:.10g}"


def range_of(field: _abi.PolicyField) -> str:
    """Return the values that a field may have."""
    if field.type == _abi.BOOL:
        return "true, false"
    if field.type == _abi.CHOICE:
        return ", ".join(field.choices.decode().split())
    if field.type in (_abi.INT_TABLE, _abi.FLOAT_TABLE):
        return "a list" if field.columns == 1 else f"a list of lists of {field.columns}"
    left = "(" if field.flags & _abi.ABOVE_LEAST else "["
    if math.isinf(field.most):
        return f"{left}{field.least:.10g}, inf)"
    right = ")" if field.flags & _abi.BELOW_MOST else "]"
    return f"{left}{field.least:.10g}, {field.most:.10g}{right}"


def rows() -> list[str]:
    """Return the table's lines."""
    lines = ["| policy | field | default | values | what it is |", "|---|---|---|---|---|"]
    kind, index = ctypes.c_int32(), 0
    while name := _abi.lib.fp_policy_name(index, ctypes.byref(kind)):
        memory = (ctypes.c_uint64 * 64)()
        _abi.check(_abi.lib.fp_policy_init(kind.value, memory, ctypes.sizeof(memory)))
        field, number = _abi.PolicyField(), 0
        while _abi.lib.fp_policy_field_at(kind.value, number, ctypes.byref(field)) == 0:
            if field.type in (_abi.INT_TABLE, _abi.FLOAT_TABLE):
                default = "none"
            else:
                of = ctypes.c_float if field.type == _abi.FLOAT else ctypes.c_int32
                stored = of.from_buffer(memory, field.offset).value
                default = value_of(field.initial if field.type == _abi.FLOAT else stored, field)
            shown = f"`{name.decode()}`" if number == 0 else ""
            what = field.about.decode()
            lines.append(f"| {shown} | `{field.name.decode()}` | {default} | {range_of(field)} | {what} |")
            number += 1
        index += 1
    return lines


def main() -> int:
    """Write the page, or check it."""
    text = PAGE.read_text()
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    new = text[:begin] + "\n".join(rows()) + "\n" + text[end:]
    if "--check" in sys.argv:
        return int(new != text)
    PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
