"""Sphinx's settings for `make docs`: README and docs/ as a site.

The source folder is the repository itself, so every relative link means what it means there: pages become
pages of the site, other files (results, sources) downloads of it. Warnings are errors, and so is a link that
leads nowhere.
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
project = "flashprefill"
copyright = "the flashprefill authors"
version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]

extensions = ["myst_parser"]
root_doc = "README"
include_patterns = ["*.md", "docs/**.md", "bench/adapters/*.md"]
exclude_patterns = ["build", "out", "dist", ".*"]
myst_heading_anchors = 4
myst_links_external_new_tab = True

html_theme = "furo"
html_title = f"flashprefill {version}"

CONTENTS = """

```{toctree}
:hidden:
:caption: Use
docs/python
docs/policies
docs/transformers
docs/diffusers
docs/vllm
docs/sglang
docs/llama.cpp
docs/several-gpus
docs/guard
```
```{toctree}
:hidden:
:caption: Figures
docs/performance
docs/quality
docs/evaluation
bench/adapters/README
```
```{toctree}
:hidden:
:caption: The code
:glob:
docs/design
docs/glossary
docs/add-a-method
docs/*
docs/methods/*
CONTRIBUTING
SECURITY
CODE_OF_CONDUCT
CHANGELOG
```
"""


def add_contents(app, docname, source):
    """The side bar's contents, which README, as GitHub shows it, cannot carry."""
    if docname == root_doc:
        source[0] += CONTENTS


def write_index(app, exception):
    """A site begins at index.html; its first page is README.html."""
    if exception is None:
        page = '<!doctype html><meta http-equiv="refresh" content="0; url=README.html">\n'
        Path(app.outdir, "index.html").write_text(page)


def setup(app):
    app.connect("source-read", add_contents)
    app.connect("build-finished", write_index)
