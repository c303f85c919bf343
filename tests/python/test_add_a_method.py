"""docs/add-a-method.md, followed literally: its code put into a copy of the tree, built, and run.

The build is not optimised and makes only the library and the C++ tests.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "add-a-method.md"
FOLDERS = ("include", "src", "cmake", "python", "tests")
STEP = re.compile(
    r"^`(?P<path>[^`]+)`, (?:a new file|(?P<side>after|before) the line that begins `(?P<line>[^`]+)`):\n"
    r"```\w+\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


def put(tree, path, side, line, code):
    """Do one step of the page."""
    file = tree / path
    if side is None:
        assert not file.exists(), f"{path} is there already"
        file.parent.mkdir(exist_ok=True)
        file.write_text(code)
        return
    lines = file.read_text().splitlines(keepends=True)
    found = [number for number, text in enumerate(lines) if text.strip().startswith(line)]
    assert len(found) == 1, f"{path}: {len(found)} lines begin {line!r}"
    lines.insert(found[0] + (side == "after"), code)
    file.write_text("".join(lines))


def run(command, **options):
    """Run a command; what it printed is the message if it fails."""
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    assert result.returncode == 0, f"{command}\n{result.stdout[-6000:]}"
    return result.stdout


def test_every_block_of_code_is_a_step():
    page = PAGE.read_text()
    assert page.count("```") == 2 * len(STEP.findall(page)) > 0


def test_a_method_is_six_files_and_three_edits():
    steps = [step for step in STEP.finditer(PAGE.read_text()) if step["path"] != "prototype.py"]
    edits = [step for step in steps if step["side"]]
    assert (len(steps) - len(edits), len(edits)) == (6, 3)


@pytest.mark.skipif(
    not PAGE.exists() or not all(map(shutil.which, ("cmake", "ninja", "c++"))),
    reason="needs the source tree, CMake, Ninja and a compiler",
)
def test_the_page_works(tmp_path):
    ignore = shutil.ignore_patterns("__pycache__", "lib", "build")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
    shutil.copy(ROOT / "CMakeLists.txt", tmp_path)
    for step in STEP.finditer(PAGE.read_text()):
        put(tmp_path, step["path"], step["side"], step["line"], step["code"])

    build = tmp_path / "build"
    options = ["-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS=-g0", "-DFLASHPREFILL_TESTS=ON"]
    run(["cmake", "-S", tmp_path, "-B", build, "-G", "Ninja", *options])
    run(["cmake", "--build", build, "--target", "flashprefill", "flashprefill_tests"])
    printed = run(
        [
            build / "tests" / "flashprefill_tests",
            "--gtest_filter=Loud*:*Lengths/loud:*Dtypes/loud",
            "--small",
        ]
    )
    assert "[  PASSED  ] 3 tests" in printed

    library = next(build.glob("libflashprefill.so*"))
    environment = {
        **os.environ,
        "FLASHPREFILL_LIBRARY": str(library),
        "PYTHONPATH": str(tmp_path / "python"),
    }
    tests = tmp_path / "tests" / "python"
    printed = run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests / "test_loud.py"],
        env=environment,
        cwd=tmp_path,
    )
    assert "1 passed" in printed
    where = "import flashprefill; print(flashprefill.library_path(), flashprefill.Loud(blocks=3))"
    printed = run([sys.executable, "-c", where], env=environment, cwd=tmp_path)
    assert str(library.name.split(".so")[0]) in printed and "loud(blocks=3)" in printed
