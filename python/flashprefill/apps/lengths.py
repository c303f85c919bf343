"""Numbers of tokens as people write them: 6000, 4K, 128k."""

from __future__ import annotations

import re


def length(text: str) -> int:
    """Return a number of tokens; a K at the end multiplies by 1,024. Anything else is a ValueError."""
    found = re.fullmatch(r"(\d[\d,_]*)([kK]?)", text.strip())
    if not found:
        raise ValueError(text)
    return int(found[1].replace(",", "").replace("_", "")) * (1024 if found[2] else 1)
