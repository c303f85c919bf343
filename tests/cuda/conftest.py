"""Kernels on a GPU. Everything here is skipped, visibly, where there is none."""

import pytest

import flashprefill as fp

AVAILABLE = any(b.name == "cuda" and b.available for b in fp.backends())


def pytest_collection_modifyitems(items):
    """Mark every test, and skip them without a GPU that the CUDA backend knows."""
    for item in items:
        if item.path.parent.name != "cuda":
            continue
        item.add_marker(pytest.mark.gpu)
        if not AVAILABLE:
            item.add_marker(pytest.mark.skip(reason="needs the CUDA backend and a GPU that it knows"))
