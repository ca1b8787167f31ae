"""`python -m study.publish [STUDY ...]`: the results of studies into docs/.

Their tables and figures go to docs/results/. Then, and without a study, every marked block of
README.md and docs/*.md is filled from docs/results/<name>.csv:

    <!-- table: texts-10; healing=refit|trained; -draws -->
    ...
    <!-- /table -->

keeps the rows with one of these values, and leaves out columns that begin so. `BlockPruner:
BlockPruner, lazy` writes a cell in another way. Each may be missing.

A single number is filled likewise, of the only row that has these values; `!` leaves its interval
out:

    <!-- value: sizes; method=BlockPruner; at_20_x! -->1.71<!-- / -->
"""

import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from blockpruner.core.errors import InputError
from blockpruner.reporting.frames import table_of_frame
from blockpruner.reporting.table import to_markdown
from blockpruner.store.files import read_json, write_json, write_text

PUBLISHED = "published.json"
"""By study: the count of its publications, and by run the digest of its held-out rows."""

VALUE = re.compile(r"<!-- value: (?P<name>[\w-]+); (?P<where>[^>]+) -->.*?<!-- / -->", re.DOTALL)
BLOCK = re.compile(
    r"(?P<indent>[ ]*)<!-- table: (?P<name>[\w-]+)(?P<where>(?:; [^;>]+?)*) -->\n.*?(?P=indent)<!--"
    r" /table -->",
    re.DOTALL,
)


def publish(study: str, root: Path = Path()) -> None:
    """Copy the results of a study to docs/results/; raises InputError if its tables are not made.
    PUBLISHED counts how often the tables of a study of experiments have changed there: test texts
    are looked at once a release."""
    source, out = root / "data" / "tables" / study, root / "docs" / "results"
    if not (source / "index.html").exists():
        fix = f"`python -m flows.paper --study {study}` makes it"
        raise InputError(f"{source} has no tables; {fix}", rule="no-results", value=study)
    out.mkdir(parents=True, exist_ok=True)
    if (source / "rows.json").exists() and _has_changed(source / "tables", out):
        _count(study, source / "rows.json", out / PUBLISHED)
    for path in (*source.glob("tables/*.csv"), *source.glob("plots/*.png")):
        shutil.copy(path, out / path.name)


def _has_changed(source: Path, out: Path) -> bool:
    for path in source.glob("*.csv"):
        published = out / path.name
        if not published.exists() or published.read_bytes() != path.read_bytes():
            return True
    return False


def _count(study: str, rows: Path, path: Path) -> None:
    publications = read_json(path) if path.exists() else {}
    count = publications.get(study, {}).get("count", 0)
    publications[study] = {"count": count + 1, "rows": read_json(rows)}
    write_json(path, publications)


def filled(text: str, folder: Path) -> str:
    """Fill the marked blocks and numbers of a page from the CSV files of `folder`."""
    text = BLOCK.sub(lambda mark: _table(mark, folder), text)
    return VALUE.sub(lambda mark: _value(mark, folder), text)


def _read(name: str, folder: Path) -> pd.DataFrame:
    path = folder / f"{name}.csv"
    if not path.exists():
        raise InputError(f"a page has a block of table {name!r}, and {path} does not exist")
    return pd.read_csv(path, dtype={"budget": str})


def _matching_rows(frame: pd.DataFrame, name: str, filters: Sequence[str]) -> pd.DataFrame:
    """Keep the rows that have one of the values of each filter, such as healing=refit|trained."""
    for text in filters:
        key, _, values = text.partition("=")
        alternatives = values.split("|")
        column = frame[key].astype(str) if key in frame else pd.Series(dtype=str)
        missing = [value for value in alternatives if not (column == value).any()]
        if missing:
            raise InputError(f"{name}.csv has no row with {key}={missing[0]}", rule="no-rows")
        frame = frame[column.isin(alternatives)]
    return frame


def _table(mark: re.Match[str], folder: Path) -> str:
    """A marked block, filled."""
    name, options = mark["name"], mark["where"].split("; ")[1:]
    filters = [option for option in options if "=" in option]
    replacements = dict(option.split(": ") for option in options if ": " in option)
    frame = _matching_rows(_read(name, folder), name, filters).dropna(axis=1, how="all")
    removed = [option for option in options if not re.search("=|: ", option)]
    for start in (option.removeprefix("-") for option in removed):
        columns = [column for column in frame if not column.startswith(start)]
        if len(columns) == len(frame.columns):
            raise InputError(f"{name}.csv has no column {start!r} to leave out", rule="no-column")
        frame = frame[columns]
    markdown = to_markdown(table_of_frame("", "", frame.replace(replacements)))
    lines = [mark["indent"] + line for line in markdown.splitlines()]
    opening, *_, closing = mark[0].splitlines()
    return "\n".join([opening, *lines, closing])


def _value(mark: re.Match[str], folder: Path) -> str:
    """A marked number, filled."""
    name = mark["name"]
    *filters, column = mark["where"].split("; ")
    frame = _matching_rows(_read(name, folder), name, filters)
    if len(frame) != 1:
        message = f"a page has a number of {len(frame)} rows: {mark['where']!r} in {name}.csv"
        raise InputError(f"{message}; name one row", rule="not-one-row")
    # Without the "!", the columns of the interval begin like that of the number.
    columns = [key for key in frame if f"{key}!" == column or key.startswith(column)]
    cell = table_of_frame("", "", frame[columns]).rows[0][0]
    return f"<!-- value: {name}; {mark['where']} -->{cell}<!-- / -->"


def pages(root: Path = Path()) -> list[Path]:
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def fill(root: Path = Path()) -> list[Path]:
    """Fill the blocks of all pages; the pages that this changed."""
    changed = []
    for path in pages(root):
        text = path.read_text(encoding="utf-8")
        filled_text = filled(text, root / "docs" / "results")
        if filled_text != text:
            write_text(path, filled_text)
            changed.append(path)
    return changed


def main(arguments: list[str]) -> int:
    try:
        for study in arguments:
            publish(study)
        for path in fill():
            print(f"written: {path}")
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
