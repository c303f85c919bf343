"""Tables of heads by layer, as methods' authors ship them: JSON files, or their content."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..errors import refuse, refuse_type, shown

MAX_HEADS = 4096  # more than any model has; a damaged table must not become a list of millions


def read_table(config: Any, layer_type: type | tuple[type, ...], must_be: str) -> list[Any]:
    """Return a table's layers, from the path of a JSON file or from its content.

    Raises:
        OSError: the file cannot be opened.
        InvalidArgumentError, ArgumentTypeError: it is no JSON, or no list of such layers.
    """
    if isinstance(config, (str, os.PathLike)):
        path = config
        try:
            config = json.loads(Path(path).read_bytes())
        except RecursionError:
            refuse("config", f"{os.fspath(path)!r}, which is nested too deeply", "a table by layer")
        except ValueError as error:
            refuse("config", f"{os.fspath(path)!r}, which cannot be read ({error})", "a JSON file")
    if not isinstance(config, list) or not all(isinstance(layer, layer_type) for layer in config):
        refuse_type("config", shown(config)[:60], f"{must_be}, or a path to it")
    return config
