"""README for PyPI, where links into the repository lead nowhere: they are made absolute, in place.

usage: pypi_readme.py FOLDER, which holds README.md and pyproject.toml, whose Source is the address.
"""

import re
import sys
from pathlib import Path

LINK = re.compile(r"(?P<before>(?P<image>!?)\[[^\]]*\]\()(?P<path>(?!https?:|#|mailto:)[^)\s]+)")


def absolute(text: str, source: str) -> str:
    """Text with every relative link leading into the repository at `source`."""

    def link(match: re.Match) -> str:
        kind = "raw" if match["image"] else "blob"
        return f"{match['before']}{source}/{kind}/main/{match['path']}"

    return LINK.sub(link, text)


def main() -> None:
    folder = Path(sys.argv[1])
    source = re.search(r'^Source = "(.*)"$', (folder / "pyproject.toml").read_text(), re.MULTILINE)[1]
    if "example.org" in source:
        print(
            f"pyproject.toml's project.urls are placeholders ({source}): fill them in to publish",
            file=sys.stderr,
        )
    readme = folder / "README.md"
    readme.write_text(absolute(readme.read_text(), source))


if __name__ == "__main__":
    main()
