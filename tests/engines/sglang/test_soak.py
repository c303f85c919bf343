"""A short soak in both ways to serve; --soak 600 makes it ten minutes each."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.mark.parametrize("way", ["whole", "chunks"])
def test_soak(llama, tmp_path, pytestconfig, way):
    seconds = str(pytestconfig.getoption("soak"))
    log = tmp_path / "server.log"
    command = [
        sys.executable,
        HERE / "soak.py",
        "--model",
        llama,
        "--seconds",
        seconds,
        "--way",
        way,
        "--log",
        log,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr + log.read_text(errors="replace")[-5000:]
