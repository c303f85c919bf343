"""Why this folder's other files are left out, where they are."""

import pytest

import conftest


def test_there_is_an_engine_and_a_gpu():
    reason = conftest.why_not()
    if reason:
        pytest.skip(reason)
    import vllm

    from flashprefill.vllm.host import host

    assert host.knows(vllm.__version__)
