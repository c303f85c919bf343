"""The package as such: what importing needs, that ctypes and the header agree, defaults and presets."""

import ctypes
import dataclasses
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import flashprefill as fp
from flashprefill import _abi, _engine

ROOT = Path(__file__).resolve().parents[2]
HEADER = ROOT / "include" / "flashprefill" / "flashprefill.h"
NUMPY_ONLY = """
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "matplotlib", "ml_dtypes", "tqdm"}:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
import numpy as np
import flashprefill as fp

x = np.random.default_rng(0).standard_normal((700, 2, 16), dtype=np.float32)
out, lse, stats = fp.prefill_attention(
    x, x, x, fp.FlashPrefill(block_size=32, dense_tail_blocks=0), return_lse=True, return_stats=True
)
mask = fp.select(x, x, fp.Sketch())
assert np.isfinite(fp.attend(x, x, x, mask)).all() and mask.dense().dtype == bool and stats.mean_density <= 1
assert fp.BlockMask.from_dense(mask.dense(), q_len=700, k_len=700).density == mask.density
try:
    fp.prefill_attention([1.0], x, x)
except TypeError as error:
    print(error)
assert "torch" not in sys.modules
"""


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_import_and_use_without_torch():
    done = run(NUMPY_ONLY)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "q is a list; it must be a NumPy array or a torch tensor\n"


def test_a_missing_library_says_what_to_do(tmp_path):
    shutil.copytree(Path(fp.__file__).parent, tmp_path / "flashprefill", ignore=shutil.ignore_patterns("lib"))
    broken = tmp_path / "broken.so"
    broken.write_text("no library" * 1000)
    for named, why in (("", "(empty)"), (tmp_path / "none.so", "no such file"), (broken, "invalid ELF")):
        done = run("import flashprefill", PYTHONPATH=str(tmp_path), FLASHPREFILL_LIBRARY=str(named))
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("ImportError: flashprefill cannot load its library") and why in last
        assert "pip install" in last and "FLASHPREFILL_LIBRARY" in last


def test_a_library_that_is_named_is_the_one(tmp_path):
    named = tmp_path / "libflashprefill.so"
    shutil.copy(fp.library_path(), named)
    done = run("import flashprefill as fp; print(fp.library_path())", FLASHPREFILL_LIBRARY=str(named))
    assert done.stdout.strip() == str(named), done.stderr


def test_versions_agree():
    assert fp.__version__ == fp.library_version()
    if HEADER.exists():
        numbers = re.findall(r"#define FP_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", HEADER.read_text())
        assert ".".join(numbers) == fp.__version__


@pytest.mark.skipif(not HEADER.exists() or not shutil.which("cc"), reason="needs the header and a C compiler")
def test_structs_are_those_of_the_header(tmp_path):
    """Sizes and offsets as a C compiler sees them."""
    structs = {
        "fp_tensor": _abi.Tensor,
        "fp_problem": _abi.Problem,
        "fp_timings": _abi.Timings,
        "fp_exec": _abi.Exec,
        "fp_policy": _abi.Policy,
        "fp_flashprefill": _abi.FlashPrefill,
        "fp_sketch": _abi.Sketch,
        "fp_flexprefill": _abi.FlexPrefill,
        "fp_minference_head": _abi.MInferenceHead,
        "fp_minference": _abi.MInference,
        "fp_xattention": _abi.XAttention,
        "fp_rrattention": _abi.RRAttention,
        "fp_sparge_attn": _abi.SpargeAttn,
        "fp_prism": _abi.Prism,
        "fp_sample_attention": _abi.SampleAttention,
        "fp_block_mask": _abi.BlockMask,
        "fp_stats": _abi.Stats,
        "fp_output": _abi.Output,
    }
    lines, expected = [], []
    for name, struct in structs.items():
        lines.append(f'printf("%zu\\n", sizeof({name}));')
        expected.append(ctypes.sizeof(struct))
        for field, _ in struct._fields_:
            lines.append(f'printf("%zu\\n", offsetof({name}, {field}));')
            expected.append(getattr(struct, field).offset)
    source = tmp_path / "sizes.c"
    source.write_text(
        f'#include <stdio.h>\n#include "{HEADER}"\nint main(void) {{ {" ".join(lines)} return 0; }}\n'
    )
    subprocess.run(["cc", "-o", tmp_path / "sizes", source], check=True)
    printed = subprocess.run([tmp_path / "sizes"], check=True, capture_output=True, text=True).stdout
    assert [int(n) for n in printed.split()] == expected


@pytest.mark.parametrize(
    "policy",
    [
        fp.Dense,
        fp.Streaming,
        fp.FlashPrefill,
        fp.Sketch,
        fp.FlexPrefill,
        fp.MInference,
        fp.XAttention,
        fp.RRAttention,
        fp.SpargeAttn,
        fp.Prism,
        fp.SampleAttention,
    ],
)
def test_defaults_are_the_library_s(policy):
    number, struct = _engine._STRUCTS[policy.kind]
    theirs = struct()
    _abi.check(_abi.lib.fp_policy_init(number, ctypes.byref(theirs), ctypes.sizeof(theirs)))
    common = theirs if struct is _abi.Policy else theirs.common
    ours = policy()
    for field in dataclasses.fields(ours):
        if field.name in ("cover", "heads", "head_thresholds", "rounding"):  # words and lists: the next tests
            continue
        value = getattr(ours, field.name)
        other = getattr(common if hasattr(common, field.name) else theirs, field.name)
        if value is None:
            assert other == 0 if field.name == "max_budget" else math.isnan(other), field.name
        else:
            assert float(other) == pytest.approx(float(value)), field.name


def test_specs_carry_every_field():
    changed = fp.Sketch(
        alpha=0.3, outliers=3, query_pool=5, sink_blocks=7, window_blocks=8, dense_tail_blocks=9,
        block_size=64, share_heads=True, mean_correction=True, min_blocks=11,
    )  # fmt: skip
    struct = _engine._policy(changed._spec)
    assert struct.alpha == pytest.approx(0.3) and math.isnan(struct.mass)
    assert (struct.outliers, struct.query_pool, struct.min_blocks) == (3, 5, 11)
    names = ["kind", "block_size", "sink_blocks", "window_blocks", "dense_tail_blocks", "share_heads"]
    assert [getattr(struct.common, n) for n in [*names, "mean_correction"]] == [3, 64, 7, 8, 9, 1, 1]


def test_specs_carry_words_and_lists():
    flex = _engine._policy(fp.FlexPrefill(gamma=0.5, cover="both")._spec)
    assert (flex.gamma, flex.tau, flex.min_budget, flex.max_budget, flex.cover) == (
        0.5,
        pytest.approx(0.1),
        512,
        0,
        1,
    )
    assert _engine._policy(fp.FlexPrefill(max_budget=2048)._spec).max_budget == 2048
    heads = [("stream_llm", 30, 800), ("vertical_and_slash", 1, 2), ("block_sparse", 100, 0)]
    listed = _engine._policy(fp.MInference(heads=heads)._spec)
    assert [(h.pattern, h.a, h.b) for h in listed.heads[: listed.head_count]] == [
        (1, 30, 800),
        (0, 1, 2),
        (2, 100, 0),
    ]
    assert _engine._policy(fp.MInference()._spec).head_count == 0
    each = _engine._policy(fp.XAttention(head_thresholds=[0.5, 0.75, 1])._spec)
    assert each.head_thresholds[: each.head_count] == [0.5, 0.75, 1]
    assert _engine._policy(fp.XAttention(head_thresholds=[0.5])._spec).head_thresholds[:1] == [0.5]
    assert _engine._policy(fp.XAttention()._spec).head_count == 0


def test_policies_are_values():
    policy = fp.FlashPrefill(alpha=np.float32(0.25), block_size=np.int64(64))
    assert policy == fp.FlashPrefill(alpha=0.25, block_size=64) and type(policy.alpha) is float
    assert len({policy, fp.FlashPrefill(alpha=0.25, block_size=64), fp.Sketch()}) == 2
    assert dataclasses.replace(policy, alpha=0.5).alpha == 0.5
    assert dataclasses.replace(policy, alpha=0.5)._spec != policy._spec
    more = (
        fp.FlexPrefill(cover="both"),
        fp.MInference(heads=[("stream_llm", 1, 2)]),
        fp.XAttention(head_thresholds=[1, 0.5]),
    )
    for each in (policy, fp.Sketch(), fp.Sketch(alpha=0.1), fp.Dense(), fp.Streaming(1, 2, 3), *more):
        assert pickle.loads(pickle.dumps(each)) == each
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.alpha = 1.0
    assert fp.Sketch().mass == 0.95 and fp.Sketch(alpha=0.1).mass is None
    assert fp.Streaming(1, 2, 3) == fp.Streaming(sink_blocks=1, window_blocks=2, dense_tail_blocks=3)


@pytest.mark.parametrize(
    "name,alpha",
    [
        ("llama-3.1", 0.18),
        ("qwen2", 0.08),
        ("qwen2.5", 0.08),
        ("Qwen2.5", 0.08),
        ("qwen3-30b", 0.12),
        ("qwen3-moe", 0.12),
        ("qwen2.5-vl", 0.10),
        ("qwen3-vl-30b", 0.22),
    ],
)
def test_presets(name, alpha):
    assert fp.FlashPrefill.for_model(name) == fp.FlashPrefill(alpha=alpha)
    assert fp.FlashPrefill.for_model(name, query_pool=16) == fp.FlashPrefill(alpha=alpha, query_pool=16)


def test_what_is_here():
    names = {b.name: b for b in fp.backends()}
    assert names["reference"].available and names["reference"].description
    assert Path(fp.library_path()).is_file()
    assert fp.thread_runtime()
    assert set(fp.__all__) <= set(dir(fp))


def test_calls_let_other_threads_run():
    """ctypes gives up the GIL: a Python thread goes on counting while the library computes."""
    x = np.random.default_rng(0).standard_normal((1500, 4, 64), dtype=np.float32)
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    begin = time.perf_counter()
    fp.prefill_attention(x, x, x, fp.Dense(), backend="reference", threads=1)
    end = time.perf_counter()
    stop.set()
    thread.join()
    during = [t for t in ticks if begin + 0.1 * (end - begin) < t < end - 0.1 * (end - begin)]
    assert len(during) >= 3


def test_concurrent_calls_agree():
    """Many Python threads, each with its own outputs and errors."""
    x = np.random.default_rng(0).standard_normal((200, 2, 32), dtype=np.float32)
    expected = fp.prefill_attention(x, x, x, fp.Dense())

    def call(i):
        if i % 3 == 0:
            with pytest.raises(ValueError, match=f"^softmax_scale is -{i + 1};"):
                fp.prefill_attention(x, x, x, softmax_scale=-(i + 1))
        return np.array_equal(fp.prefill_attention(x, x, x, fp.Dense(), threads=1 + i % 2), expected)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(call, range(48)))
