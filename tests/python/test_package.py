"""The package as such: what importing needs, that ctypes and the header agree, defaults and presets."""

import ctypes
import dataclasses
import itertools
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import flashprefill as fp
from flashprefill import _abi
from flashprefill.policies import library, text

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
        "fp_policy_field": _abi.PolicyField,
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


CLASSES = sorted(text.named().values(), key=lambda kind: kind.kind)


def fields_of(policy):
    """Read a policy's struct back, each field by what the library says of it."""
    memory, kind, name, raw = library.struct_of(policy.text), ctypes.c_int32(), "", _abi.PolicyField()
    index = itertools.count()
    while name != policy.kind:
        name = _abi.lib.fp_policy_name(next(index), ctypes.byref(kind)).decode()
    assert _abi.Policy.from_buffer(memory).kind == kind.value
    read = {}
    for number in itertools.count():
        if _abi.lib.fp_policy_field_at(kind, number, ctypes.byref(raw)) != 0:
            return read
        scalar = ctypes.c_float if raw.type in (_abi.FLOAT, _abi.FLOAT_TABLE) else ctypes.c_int32
        if raw.type in (_abi.INT_TABLE, _abi.FLOAT_TABLE):
            rows = ctypes.c_int32.from_buffer(memory, raw.count_offset).value
            address = ctypes.c_void_p.from_buffer(memory, raw.offset).value
            values = (scalar * (rows * raw.columns)).from_address(address) if rows else ()
            read[raw.name.decode()] = list(values)
        else:
            read[raw.name.decode()] = scalar.from_buffer(memory, raw.offset).value


def test_every_policy_of_the_library_has_a_class():
    assert [kind.kind for kind in CLASSES] == sorted(library.FIELDS)
    assert all(getattr(fp, kind.__name__) is kind and kind.__name__ in fp.__all__ for kind in CLASSES)


@pytest.mark.parametrize("policy", CLASSES)
def test_classes_have_the_library_s_fields_and_defaults(policy):
    known = {field.name: field for field in library.FIELDS[policy.kind]}
    own = {field.name for field in dataclasses.fields(policy)} - set(policy._extra_names)
    assert own == set(known) - {"indexer"}  # the number of what is an object in Python
    struct = fields_of(policy())
    for name, value in vars(policy()).items():
        if name not in known:
            continue
        if known[name].type == _abi.CHOICE:
            value = known[name].choices.index(value)
        if value is not None:
            assert struct[name] == pytest.approx(float(value)), name
        elif known[name].flags & (_abi.ALTERNATIVE | _abi.OPTIONAL):
            assert math.isnan(struct[name]), name
        else:
            assert struct[name] in (0, []), name


CHANGED = [
    fp.Sketch(
        alpha=0.3, outliers=3, query_pool=5, sink_blocks=7, window_blocks=8, dense_tail_blocks=9,
        block_size=64, share_heads=True, mean_correction=True, min_blocks=11,
    ),
    fp.Sketch(gain=0.001, query_metric=True),
    fp.FlashPrefill(alpha=1e-05, mean_correction=True),
    fp.FlashPrefill(share_heads=True, mean_correction="summary"),
    fp.FlexPrefill(gamma=0.5, cover="both", max_budget=2048),
    fp.MInference(heads=[("stream_llm", 30, 800), ("vertical_and_slash", 1, 2), ("block_sparse", 100, 0)]),
    fp.MInference(rounding="tokens", block_size=16),
    fp.XAttention(head_thresholds=[0.5, 0.75, 1], stride=8),
    fp.SpargeAttn(topk=0.25),
    fp.SpargeAttn(cdf=0.5, similarity=-1),
    fp.Prism(interleaved=True),
]  # fmt: skip


@pytest.mark.parametrize("policy", [*CHANGED, *(kind() for kind in CLASSES)], ids=repr)
def test_text_is_the_library_s_and_carries_every_field(policy):
    """What Python writes the library reads, and writes again as Python does."""
    memory = library.struct_of(policy.text)
    printed = _abi.text_of(_abi.lib.fp_policy_print, ctypes.byref(memory))
    assert text.parse(policy.text) == policy and text.parse(printed) == policy
    assert printed == policy.text
    assert repr(policy) == policy.text


def test_structs_carry_values_words_and_lists():
    struct = fields_of(CHANGED[0])
    assert struct["alpha"] == pytest.approx(0.3) and math.isnan(struct["mass"])
    assert (struct["outliers"], struct["query_pool"], struct["min_blocks"]) == (3, 5, 11)
    names = ["block_size", "sink_blocks", "window_blocks", "dense_tail_blocks", "share_heads"]
    assert [struct[n] for n in [*names, "mean_correction"]] == [64, 7, 8, 9, 1, 1]
    assert fields_of(CHANGED[3])["mean_correction"] == 2
    flex = fields_of(CHANGED[4])
    assert (flex["gamma"], flex["max_budget"], flex["cover"]) == (0.5, 2048, 1)
    assert fields_of(CHANGED[5])["heads"] == [1, 30, 800, 0, 1, 2, 2, 100, 0]
    assert fields_of(CHANGED[7])["head_thresholds"] == [0.5, 0.75, 1]
    assert fields_of(fp.XAttention())["head_thresholds"] == []


def test_the_correction_is_a_choice_that_takes_bools_as_they_are_written():
    for word, number in (("false", 0), ("False", 0), ("true", 1), ("True", 1), ("1", 1), ("summary", 2)):
        memory = library.struct_of(f"streaming(mean_correction={word})")
        assert _abi.Policy.from_buffer(memory).mean_correction == number
    assert text.parse("streaming(mean_correction=true)") == fp.Streaming(mean_correction=True)
    with pytest.raises(fp.InvalidArgumentError, match="must be one of false, true, summary"):
        library.struct_of("streaming(mean_correction=means)")


def test_policies_are_values():
    policy = fp.FlashPrefill(alpha=np.float32(0.25), block_size=np.int64(64))
    assert policy == fp.FlashPrefill(alpha=0.25, block_size=64) and type(policy.alpha) is float
    assert len({policy, fp.FlashPrefill(alpha=0.25, block_size=64), fp.Sketch()}) == 2
    assert dataclasses.replace(policy, alpha=0.5).alpha == 0.5
    assert dataclasses.replace(policy, alpha=0.5).text != policy.text
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


def test_unknown_fields_are_refused_with_the_known_ones():
    with pytest.raises(fp.ArgumentTypeError, match="aplha is unknown; FlashPrefill takes alpha, sink_blocks"):
        fp.FlashPrefill(aplha=0.1)
    with pytest.raises(TypeError, match="windows is unknown; Streaming takes sink_blocks, window_blocks"):
        fp.Streaming(windows=3)


@pytest.mark.parametrize("kind", [fp.FlashPrefill, fp.Sketch])
def test_an_alpha_that_no_block_reaches_is_a_warning(kind):
    with pytest.warns(UserWarning, match=r"alpha is 12, .*12 % is alpha=0\.12") as caught:
        kind(alpha=12)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kind(alpha=1)
        kind(alpha=12, min_blocks=4)  # they decide alone


@pytest.mark.parametrize("lacking", ["torch", "transformers"])
def test_what_needs_a_package_says_which(lacking):
    code = f"""
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == {lacking!r} else real(name, *rest)
import flashprefill as fp
try:
    fp.patch_model
except ModuleNotFoundError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"patch_model needs {lacking}: pip install {lacking}\n", done.stderr


def test_plot_without_matplotlib_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    mask = fp.BlockMask.from_dense(np.ones((1, 1, 1), bool), q_len=60, k_len=60)
    with pytest.raises(ModuleNotFoundError, match="plot needs matplotlib: pip install matplotlib"):
        mask.plot()


def test_docstrings_point_to_pages_that_are_there():
    root = Path(__file__).resolve().parents[2]
    if not (root / "docs").exists():
        pytest.skip("an sdist has no docs/")
    for kind in fp.Policy.__subclasses__():
        for page in re.findall(r"docs/[\w./-]+\.md", kind.__doc__ or ""):
            assert (root / page).exists(), (kind, page)
    for kind in (fp.FlashPrefill, fp.Sketch, fp.FlexPrefill, fp.MInference, fp.XAttention):
        assert "docs/methods/" in kind.__doc__


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
