"""Fixtures: every test that takes `engine` runs on every backend and instruction set of the machine."""

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

import flashprefill as fp

settings.register_profile(
    "default",
    deadline=None,
    derandomize=True,
    max_examples=20,
    # `engine` is a dict that no test changes.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("default")


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The folder of a small model, for what the command line tool does with one."""
    import demo_model

    return demo_model.save(tmp_path_factory.mktemp("model"))


def pytest_addoption(parser):
    parser.addoption("--backend", help="only this backend of the library")
    parser.addoption("--target", help="only this instruction set")


def _works_on_host_memory(name):
    x = np.zeros((1, 1, 16), np.float32)
    try:
        fp.prefill_attention(x, x, x, fp.Dense(), backend=name)
    except fp.InvalidArgumentError:
        return False  # it is for a GPU's memory
    return True


def _engines(config):
    for backend in fp.backends():
        if not backend.available or config.getoption("--backend") not in (None, backend.name):
            continue
        if not _works_on_host_memory(backend.name):
            continue
        for target in backend.targets or (None,):
            if config.getoption("--target") in (None, target):
                yield {"backend": backend.name, "target": target}


def pytest_generate_tests(metafunc):
    if "engine" in metafunc.fixturenames:
        engines = list(_engines(metafunc.config))
        names = ["-".join(filter(None, (e["backend"], e["target"]))) for e in engines]
        metafunc.parametrize("engine", engines, ids=names)


def pytest_report_header():
    names = [f"{b.name} ({' '.join(b.targets) or '-'})" for b in fp.backends() if b.available]
    return (
        f"flashprefill: {fp.library_path()}, backends {', '.join(names)}, threads from {fp.thread_runtime()}"
    )
