"""All tests on a GPU can be run for one target: FLASHPREFILL_TEST_TARGET=portable python -m pytest ...

Calls on a GPU's memory that name no target get this one. An environment variable and not an option, since
programs that tests start get it too. Without it nothing is imported: llama.cpp's tests, which pytest brings
here too, have an environment without the package.
"""

import os

TARGET = os.environ.get("FLASHPREFILL_TEST_TARGET")

if TARGET:
    from flashprefill import _engine
    from flashprefill._arrays import is_numpy

    _exec_of = _engine.exec_of

    def _exec(q, threads, backend, target, *more):
        on_gpu = not is_numpy(q) and q.device.type == "cuda"
        return _exec_of(q, threads, backend, TARGET if on_gpu and target is None else target, *more)

    _engine.exec_of = _exec


def pytest_report_header():
    return f"FLASHPREFILL_TEST_TARGET: {TARGET}" if TARGET else None
