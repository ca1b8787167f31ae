"""Everything but the description is in pyproject.toml.

A package index shows README.md apart from the repository. There relative links lead nowhere, so they become absolute.
While pyproject.toml names no `Source`, links become plain text and pictures are left out.
"""

import re
import tomllib
from pathlib import Path

RELATIVE = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)]+)\)")


def description(readme: str, source: str | None, version: str) -> str:
    """The README for a package index; `source` is the repository's address."""

    def replace(link: re.Match[str]) -> str:
        is_picture, words, place = link.groups()
        if source is None:
            return "" if is_picture else words
        return f"{is_picture}[{words}]({source}/{'raw' if is_picture else 'blob'}/v{version}/{place})"

    return RELATIVE.sub(replace, readme)


if __name__ == "__main__":
    from setuptools import setup

    root = Path(__file__).parent
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = description(
        (root / "README.md").read_text(encoding="utf-8"), project["urls"].get("Source"), project["version"]
    )
    setup(long_description=text, long_description_content_type="text/markdown")
