"""A plugin's place in its engine: the log it writes to, the versions it knows, its counters."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable

from ..policies import Policy
from .metrics import Metrics


class Host:
    """An engine that a plugin works in. There is one per plugin and process.

    Args:
        name: the engine's, as its users write it.
        logger: name of a logger that the engine's handlers print.
        supported: the versions whose private interfaces the plugin extends: "0.32" for all of 0.32.

    Attributes:
        announced: whether any layer of a model came to the plugin.
        metrics: the counters.
    """

    def __init__(self, name: str, logger: str, supported: tuple[str, ...]) -> None:
        self.name = name
        self.supported = supported
        self.logger = logging.getLogger(logger)
        self.metrics = Metrics(self.logger)
        self.announced = False
        self._said: set[str] = set()

    def say_once(self, level: int, message: str) -> None:
        """Log a line that each layer and step could repeat."""
        if message not in self._said:
            self._said.add(message)
            self.logger.log(level, message)

    def knows(self, version: str) -> bool:
        """Return whether the plugin knows a version of the engine; if not, the log says so."""
        if any(version == known or version.startswith(f"{known}.") for known in self.supported):
            return True
        self.logger.error(
            "flashprefill: this is %s %s, and the plugin knows %s only; nothing is changed, prompts are "
            "read densely",
            self.name,
            version,
            ", ".join(self.supported),
        )
        return False

    def announce(self, reasons: Iterable[str], policy: Policy) -> int:
        """Log how many layers of a kind are sparse and why the others are not.

        Args:
            reasons: for each layer why it is dense, "" if it is sparse.
            policy: how prompts are read.

        Returns:
            How many layers are sparse.
        """
        self.announced = True
        counts = Counter(reasons)
        layers = sum(counts.values())
        sparse = counts.pop("", 0)
        dense = "".join(f"; {count} stay dense: {reason}" for reason, count in counts.items())
        whose = f"flashprefill: {sparse} of {layers} layers of a kind read prompts with {policy}"
        self.say_once(logging.INFO if sparse else logging.WARNING, whose + dense)
        return sparse

    def announce_dense(self, count: int, reason: str) -> None:
        """Log that a whole group of layers stays dense."""
        self.announced = True
        self.say_once(logging.WARNING, f"flashprefill: {count} layers stay dense: {reason}")
