"""SGLang is imported once, before anything else computes: engines are forked from this process
(engine.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sglang.srt.entrypoints.engine
import sglang.srt.managers.scheduler
import sglang.srt.models.registry  # noqa: F401

HERE = Path(__file__).resolve().parent
FOLDER = Path(os.environ.get("FLASHPREFILL_MODELS", HERE.parents[2] / "build/engines/sglang/models"))


def pytest_addoption(parser):
    parser.addoption("--prompts", type=int, default=4, help="prompts of the real model: 4, or fewer")
    parser.addoption("--soak", type=float, default=60, help="seconds of the soak")


@pytest.fixture(scope="session")
def models():
    """Make a model by a function of models.py, in another process, and return its folder.

    Keywords are for its config.json: what SGLang reads there and Transformers does not write.
    """

    def make(name, **more):
        folder = FOLDER / name
        if not (folder / "config.json").exists():
            call = f"models.{name}(pathlib.Path({str(folder)!r}))"
            subprocess.run([sys.executable, "-c", f"import models, pathlib; {call}"], check=True)
        file = folder / "config.json"
        written = json.loads(file.read_text())
        if any(written.get(name) != value for name, value in more.items()):
            file.write_text(json.dumps({**written, **more}))
        return folder

    FOLDER.mkdir(parents=True, exist_ok=True)
    return make


@pytest.fixture(scope="session")
def llama(models):
    return models("llama")


@pytest.fixture
def serve(tmp_path):
    """Serve requests with an engine of their own: `engine.serve`."""
    from engine import serve

    return lambda model, requests, policy=None, **arguments: serve(
        model, requests, tmp_path / "log", policy, **arguments
    )
