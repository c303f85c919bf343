"""Readers of text and files against mutated inputs: two seconds for each target of tests/fuzz/readers.py.

`make fuzz` runs them longer.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "fuzz"))
import mutations
import readers

NAMES = ("policy_text", "minference_table", "xattention_table", "reuse_plan", "indexer", "vllm_options")
NAMES += ("model_name", "length", "dump_npz", "dump_safetensors", "dump_pt", "gguf")


@pytest.fixture(scope="module")
def targets():
    for package in ("torch", "safetensors", "gguf", "transformers"):
        pytest.importorskip(package)
    return readers.targets()


def test_all_targets_are_here(targets):
    assert tuple(targets) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_reader(name, targets, tmp_path):
    target = targets[name]
    seeds = len(target.seeds)
    count = mutations.run(name, target, tmp_path, seconds=2.0)
    more = mutations.run(name, target, tmp_path, seconds=600.0, most=seeds) if count.inputs < seeds else count
    assert 0 < more.read < more.inputs  # else it would test one side only


def test_a_finding_is_found(targets, tmp_path):
    def read(data, _folder):
        return {}["no such key"] if data == b"b" else True

    target = mutations.Target(read, (ValueError,), [b"a"], [b"b"])
    with pytest.raises(mutations.Finding, match="KeyError"):
        mutations.run("a target", target, tmp_path, seconds=60.0)
