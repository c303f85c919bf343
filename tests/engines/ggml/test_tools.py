"""llama.cpp's own programs: with the plugin, with options, and all that can be wrong about either."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import llama_cpp
import pytest
from engine import LIBRARIES, MODELS, PLUGIN, Plugin, decode, prompt
from programs import LOADED, LOOK_FOR_PLUGINS, dense_config, environment

SOURCES = Path(os.environ["FLASHPREFILL_LLAMA_CPP"])
PREFIX = Path(os.environ["FLASHPREFILL_PREFIX"])  # where flashprefill is installed
INTEGRATION = Path(__file__).parents[3] / "integrations/ggml"
TEXT = decode(prompt(600))


def complete(tmp_path: Path, plugin: Path | None, config: Path | None = None) -> subprocess.CompletedProcess:
    text = tmp_path / "prompt.txt"
    text.write_text(TEXT)
    command = [LIBRARIES / "llama-completion", "-m", MODELS["f32"], "-f", text, "-n", "12", "--temp", "0"]
    command += ["-no-cnv", "--no-warmup", "-c", "1024", "-lv", "4", *LOOK_FOR_PLUGINS]
    done = subprocess.run(
        command, env=environment(plugin, config), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done


@pytest.fixture(scope="module")
def stock_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return complete(tmp_path_factory.mktemp("stock"), None).stdout


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return dense_config(tmp_path)


def test_completion(tmp_path: Path, dense: Path, stock_text: str) -> None:
    done = complete(tmp_path, PLUGIN, dense)
    assert LOADED in done.stderr
    assert "flashprefill: policy=dense" in done.stderr
    assert re.search(
        r"flashprefill: \d+ rows in \d+ nodes: sparse 0, dense \d+, left to the CPU backend 0;", done.stderr
    )
    assert done.stdout == stock_text


def test_backends_that_are_loaded(tmp_path: Path, dense: Path) -> None:
    """As llama.cpp's published binaries are built, GGML_BACKEND_PATH is enough."""
    folder = Path(os.environ["FLASHPREFILL_LOADING"])
    text = tmp_path / "prompt.txt"
    text.write_text(TEXT)
    command = [
        folder / "llama-completion",
        "-m",
        MODELS["q4_1"],
        "-f",
        text,
        "-n",
        "2",
        "-no-cnv",
        "-c",
        "1024",
    ]
    variables = environment(PLUGIN, dense) | {"LD_LIBRARY_PATH": f"{folder}:{LIBRARIES}"}
    done = subprocess.run([*command, "-lv", "4"], env=variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "loaded CPU backend" in done.stderr and LOADED in done.stderr
    assert "left to the CPU backend 0;" in done.stderr


def test_cli(tmp_path: Path, dense: Path) -> None:
    text = tmp_path / "prompt.txt"
    text.write_text(TEXT[:1500] + "\n\nGo on.")
    outputs = []
    for plugin in (None, PLUGIN):
        command = [LIBRARIES / "llama-cli", "-m", MODELS["f32"], "-f", text, "-n", "12", "--temp", "0"]
        command += ["--single-turn", "--no-warmup", "-c", "1024", "-lv", "4", *LOOK_FOR_PLUGINS]
        done = subprocess.run(
            command, env=environment(plugin, dense), capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr[-2000:]
        outputs.append((done.stdout, done.stderr))
    assert LOADED in outputs[1][1]
    # The turn: after the spinner, without the speeds.
    turns = [re.sub(r"\[ Prompt: .*\]", "", out.partition("\n> ")[2]) for out, _ in outputs]
    assert TEXT[:100] in turns[0]
    assert turns[0] == turns[1]


def test_bench(dense: Path) -> None:
    command = [LIBRARIES / "llama-bench", "-m", MODELS["q4_1"], "-p", "300", "-n", "4", "-fa", "1", "-r", "1"]
    command += ["-v", "-o", "jsonl"]
    done = subprocess.run(
        command, env=environment(PLUGIN, dense), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert LOADED in done.stderr
    assert "left to the CPU backend 0" in done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert {(row["n_prompt"], row["n_gen"]) for row in rows} == {(300, 0), (0, 4)}


def test_llama_cpp_python() -> None:
    """Its own class, with the plugin loaded by one call before the context is made."""
    texts = []
    for options in (None, "policy=dense"):
        plugin = Plugin() if options else None
        if plugin:
            assert plugin.set_options(options) is None
            plugin.reset_stats()
        llm = llama_cpp.Llama(MODELS["f32"], n_ctx=1024, flash_attn=True, verbose=False)
        texts.append(llm(TEXT, max_tokens=12, temperature=0)["choices"][0]["text"])
        llm.close()
        if plugin:
            assert plugin.stats()["dense_rows"] > 0
            plugin.unload()
    assert texts[0] == texts[1]


# ---------------------------------------------------------------- what can be wrong


def test_no_such_plugin(tmp_path: Path, stock_text: str) -> None:
    done = complete(tmp_path, tmp_path / "libggml-nothing.so")
    assert "failed to load" in done.stderr and "libggml-nothing.so" in done.stderr
    assert done.stdout == stock_text


def test_missing_library(tmp_path: Path, stock_text: str) -> None:
    """The plugin asks for a libflashprefill that is nowhere: its name is changed in the file."""
    alone = tmp_path / PLUGIN.name
    image = PLUGIN.read_bytes()
    assert b"libflashprefill.so.0" in image
    alone.write_bytes(image.replace(b"libflashprefill.so.0", b"libflashprefill.so.9"))
    done = complete(tmp_path, alone)
    assert "libflashprefill.so.9: cannot open shared object file" in done.stderr
    assert done.stdout == stock_text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("policy = best", "the name must be one of"),
        ("alpha = 0.1\nwindow = 3", "there is no option 'window'; policy flashprefill has alpha, "),
        ("block_size = 100", "block_size"),
        (None, "can't be read"),
    ],
)
def test_bad_option(tmp_path: Path, text: str | None, message: str, stock_text: str) -> None:
    config = tmp_path / "bad.conf"
    if text is not None:
        config.write_text(text)
    done = complete(tmp_path, PLUGIN, config)
    assert f"flashprefill: {config}: " in done.stderr and message in done.stderr
    assert "attention stays the CPU backend's" in done.stderr
    assert LOADED not in done.stderr
    assert done.stdout == stock_text


def test_config_beside_the_plugin(tmp_path: Path) -> None:
    shutil.copy(PLUGIN, tmp_path)
    (tmp_path / "flashprefill.conf").write_text("policy = streaming, window_blocks = 7")
    done = complete(tmp_path, tmp_path / PLUGIN.name)
    assert "policy=streaming" in done.stderr and "window_blocks=7" in done.stderr


# A plugin that was built against another release of ggml: one with another version of the backend interface,
# and one whose operators are numbered in another way.
@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        (
            "src/ggml-backend-impl.h",
            "#define GGML_BACKEND_API_VERSION 2",
            "#define GGML_BACKEND_API_VERSION 1",
            "incompatible API version (backend: 1, current: 2)",
        ),
        (
            "include/ggml.h",
            "        GGML_OP_FLASH_ATTN_EXT,",
            "        GGML_OP_OF_ANOTHER_RELEASE, GGML_OP_FLASH_ATTN_EXT,",
            "flashprefill: built for another ggml than this one",
        ),
    ],
)
def test_another_ggml(tmp_path: Path, file: str, old: str, new: str, message: str, stock_text: str) -> None:
    headers = tmp_path / "llama.cpp/ggml"
    (headers / "src").mkdir(parents=True)
    shutil.copytree(SOURCES / "ggml/include", headers / "include")
    for header in (SOURCES / "ggml/src").glob("*.h"):
        shutil.copy(header, headers / "src")
    changed = (headers / file).read_text()
    assert old in changed
    (headers / file).write_text(changed.replace(old, new))
    build = tmp_path / "build"
    for command in (
        [
            "cmake",
            "-S",
            INTEGRATION,
            "-B",
            build,
            f"-DLLAMA_CPP={headers.parent}",
            f"-DLLAMA_CPP_LIB={LIBRARIES}",
        ]
        + [f"-DCMAKE_PREFIX_PATH={PREFIX}"],
        ["cmake", "--build", build],
    ):
        subprocess.run(command, check=True, capture_output=True)
    done = complete(tmp_path, build / PLUGIN.name)
    assert message in done.stderr
    assert LOADED not in done.stderr
    assert done.stdout == stock_text
