"""The number of prompts; and the part of the engine's log that belongs to a failing test, printed with it."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--prompts", type=int, default=20, help="prompts of test_greedy_tokens: 20, or fewer")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "number" in metafunc.fixturenames:
        every = 20 // metafunc.config.getoption("prompts")
        if "last_layer" in metafunc.function.__name__:
            every *= 3
        metafunc.parametrize("number", range(0, 20, every))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> object:
    from engine import log

    report = yield
    if report.failed:
        report.sections.append(("the engine's log", "".join(log[-15:])))
    if call.when == "setup":
        log.clear()
    return report
