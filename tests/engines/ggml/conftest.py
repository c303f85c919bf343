"""Prints the part of the engine's log that belongs to a failing test."""

from __future__ import annotations

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> object:
    from engine import log

    report = yield
    if report.failed:
        report.sections.append(("the engine's log", "".join(log[-15:])))
    if call.when == "setup":
        log.clear()
    return report
