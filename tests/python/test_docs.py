"""The Python blocks of README.md and of all pages in docs/, run as they stand.

The blocks of a page share their names, as they do for a reader who pastes one after the other. A line with
print and a comment must print that comment; numbers may differ in the second digit after the point, since a
block of keys near its threshold may fall on either side. A block after `<!-- needs: model -->` gets the path
of a tiny random model, and the model. One that needs what a test doesn't have (a GPU, an engine) says so in
the same way, and is only compiled.
"""

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
ALL_PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
BLOCK = re.compile(
    r"^(?:<!-- needs: (?P<needs>[^\n]+) -->\n)?```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
PRINTS = re.compile(r"^print\(.*\)  # (?P<printed>.+)$", re.MULTILINE)
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def blocks(page):
    """What a block needs, the line it begins in, and its code."""
    text = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        yield found["needs"], text.count("\n", 0, found.start("code")), found["code"]


# add-a-method.md's reader writes files; test_add_a_method.py does what it says.
PAGES = [page for page in ALL_PAGES if page.name != "add-a-method.md" and any(blocks(page))]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """The path of a tiny random model."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    path = tmp_path_factory.mktemp("docs") / "model"
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


def with_model(path):
    """The names that a block about a model begins with."""
    import torch
    from transformers import AutoModelForCausalLM

    inputs = {"input_ids": torch.arange(200)[None] % 64}
    return {"path": path, "model": AutoModelForCausalLM.from_pretrained(path), "inputs": inputs}


def same(printed, said):
    """Whether two lines differ in nothing but numbers, and in these by little."""
    ours, theirs = (np.array(NUMBER.findall(line), float) for line in (printed, said))
    return NUMBER.sub("#", printed) == NUMBER.sub("#", said) and np.allclose(ours, theirs, rtol=0.02)


def test_lines_are_compared_by_their_numbers():
    assert same("density 0.292: 4856 of 16640", "density 0.291: 4850 of 16640")
    assert not same("density 0.292", "density 0.392") and not same("True", "False")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_run_and_print_what_they_say(page, request):
    names = {"__name__": page.name}
    for needs, line, code in blocks(page):
        code = code.replace('from_pretrained("...")', "from_pretrained(path)")
        compiled = compile("\n" * line + code, str(page), "exec")
        if needs == "model" and "path" not in names:
            names |= with_model(request.getfixturevalue("tiny_model"))
        elif needs and needs != "model":
            continue
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compiled, names)
        said = [found["printed"] for found in PRINTS.finditer(code)]
        printed = output.getvalue().splitlines()
        if said:
            assert len(printed) == len(said), f"{page.name}:{line + 1} printed {printed}"
        for ours, theirs in zip(printed, said, strict=bool(said)):
            assert same(ours, theirs), f"{page.name}:{line + 1} says {theirs!r} and prints {ours!r}"


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Files exist, and headings of the pages that links name."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if heading:
            titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}
            assert heading in slugs, f"{page.name}: {target}"


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: page.name)
def test_linked_pages_are_in_the_site(page):
    """Sphinx, which the tests do not run, refuses a link to a page that the site leaves out."""
    settings = (ROOT / "tools/site/conf.py").read_text(encoding="utf-8")
    patterns = re.findall(
        r'"([^"]+)"', re.search(r"^include_patterns = \[(.*)\]$", settings, re.MULTILINE)[1]
    )
    known = {file.resolve() for pattern in patterns for file in ROOT.glob(pattern.replace("**.", "**/*."))}
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for path in re.findall(r"\]\((?!https?:)([^)\s#]+\.md)", text):
        assert (page.parent / path).resolve() in known, f"{page.name}: {path}"


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: page.name)
def test_files_that_pages_name_are_there(page):
    """Paths in backticks; add-a-method.md names files that its reader makes, and has a test of its own."""
    if page.name == "add-a-method.md":
        return
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    folders = "bench|cmake|docs|examples|include|integrations|python|src|tests|tools"
    for path in re.findall(rf"`((?:{folders})/[\w./-]+)`", text):
        assert (ROOT / path).exists(), f"{page.name}: {path}"


def test_the_table_of_fields_is_the_librarys():
    tool = ROOT / "tools" / "policy_fields.py"
    if not tool.exists():
        pytest.skip("needs the source tree")
    assert subprocess.run([sys.executable, tool, "--check"], check=False).returncode == 0
