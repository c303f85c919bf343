"""Policies of the command line, as text."""

from __future__ import annotations

import os
import sys

from ..errors import FlashPrefillError
from ..policies import Policy
from ..policies.text import parse
from .errors import UsageError


def parse_policy(text: str) -> Policy:
    """The policy that a text describes, or a UsageError of one line. Modules in the current folder count."""
    if ":" in text and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return parse(text)
    except FlashPrefillError as error:
        raise UsageError(str(error)) from None
