"""`python -m blockpruner.reporting.paper.publish [STUDY ...]`: the results of studies into docs/.

The first study's results.md goes to docs/, its tables and figures to docs/results/; those of any other have a folder of
their own there. Then, and without a study, every marked block of README.md and docs/*.md is filled from
docs/results/<name>.csv:

    <!-- table: front -->
    ...
    <!-- /table -->
"""

import re
import shutil
import sys
from pathlib import Path

import pandas as pd

from blockpruner.core.errors import InputError
from blockpruner.reporting.paper.frames import table_of_frame
from blockpruner.reporting.table import to_markdown
from blockpruner.store.files import write_text

BLOCK = re.compile(r"(?P<indent>[ ]*)<!-- table: (?P<name>[\w-]+) -->\n.*?(?P=indent)<!-- /table -->", re.DOTALL)


def publish(study: str, root: Path = Path(), place: str = "docs") -> None:
    """Copy the results of a study to a folder; raises InputError if its tables are not made."""
    source, out = root / "data" / "tables" / study, root / place / "results"
    if not (source / "results.md").exists():
        fix = f"`python -m flows.paper --study {study}` makes it"
        raise InputError(f"{source} has no results.md; {fix}", rule="no-results", value=study)
    out.mkdir(parents=True, exist_ok=True)
    for path in (*source.glob("tables/*.csv"), *source.glob("plots/*.png")):
        shutil.copy(path, out / path.name)
    shutil.copy(source / "results.md", root / place / "results.md")


def filled(text: str, folder: Path) -> str:
    """Fill the marked blocks of a page from the CSV files of `folder`; raises InputError if one is not there."""

    def table(found: re.Match[str]) -> str:
        path = folder / f"{found['name']}.csv"
        if not path.exists():
            raise InputError(f"a page has a block of table {found['name']!r}, and {path} does not exist")
        lines = to_markdown(table_of_frame("", "", pd.read_csv(path, dtype={"budget": str}))).splitlines()
        head, *_, tail = found[0].splitlines()
        return "\n".join([head, *(found["indent"] + line for line in lines), tail])

    return BLOCK.sub(table, text)


def pages(root: Path = Path()) -> list[Path]:
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def fill(root: Path = Path()) -> list[Path]:
    """Fill the blocks of all pages; the pages that this changed."""
    changed = []
    for path in pages(root):
        before = path.read_text(encoding="utf-8")
        after = filled(before, root / "docs" / "results")
        if after != before:
            write_text(path, after)
            changed.append(path)
    return changed


def main(arguments: list[str]) -> int:
    try:
        for number, study in enumerate(arguments):
            publish(study, place=f"docs/results/{study}" if number else "docs")
        for path in fill():
            print(f"written: {path}")
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
