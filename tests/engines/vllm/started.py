"""A fixture that both folders of vLLM's tests have, here and ../vllm_cuda."""

import pytest


@pytest.fixture
def engines():
    """Start engines that end with the test."""
    from engine import Engine

    started = []

    def start(*arguments, **keywords):
        started.append(Engine(*arguments, **keywords))
        return started[-1]

    yield start
    for one in started:
        one.close()
