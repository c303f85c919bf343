"""Real vLLM on a GPU. Without one, or without vLLM, it skips and says so; --rehearse uses the CPU.

The engine that is driven step by step is that of ../vllm, models and how answers are compared ../common's.
"""

import importlib.util
import os
import sys
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, so that it can be stepped
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")  # needs a compiler on the machine
sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("vllm", "common")]

import pytest  # noqa: E402
from started import engines  # noqa: E402, F401

REHEARSE = "--rehearse" in sys.argv


def pytest_addoption(parser):
    parser.addoption("--rehearse", action="store_true", help="on the CPU's backend, where there is no GPU")


def why_not():
    """Why no test of this folder can run here."""
    if importlib.util.find_spec("vllm") is None:
        return "needs vLLM"
    import torch

    if not REHEARSE and not torch.cuda.is_available():
        return "needs a GPU; --rehearse runs these tests on vLLM's CPU backend"
    return ""


if why_not():
    # Files that import vLLM are not imported; one that does not says why.
    collect_ignore_glob = ["test_[!w]*.py"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def llama(folder):
    """Three layers of head_dim 128, eight heads over two."""
    import models

    changes = {
        "hidden_size": 512,
        "num_attention_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 65536,
        "initializer_range": 0.1,  # scores of a standard deviation of 5: peaked, and bf16 is not drowned
    }
    return models.llama(folder / "llama-d128", **changes)
