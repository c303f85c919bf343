"""Models are made once and kept beside the engine's environment; an engine lives as long as its test."""

import os
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, so that it can be stepped

import models  # noqa: E402
import pytest  # noqa: E402
from started import engines  # noqa: E402, F401

FOLDER = Path(
    os.environ.get("FLASHPREFILL_MODELS", Path(__file__).resolve().parents[3] / "build/engines/vllm/models")
)


def pytest_addoption(parser):
    parser.addoption("--prompts", type=int, default=20, help="prompts of the real model: 20, or fewer")


@pytest.fixture(scope="session")
def folder():
    FOLDER.mkdir(parents=True, exist_ok=True)
    return FOLDER


@pytest.fixture(scope="session")
def llama(folder):
    return models.llama(folder / "llama")


@pytest.fixture(scope="session")
def smollm2(folder):
    return models.smollm2(folder / "smollm2")
