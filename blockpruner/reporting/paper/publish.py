"""`python -m blockpruner.reporting.paper.publish [STUDY ...]`: the results of studies into docs/.

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
from blockpruner.reporting.paper.frames import table_of_frame
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
    if (rows := source / "rows.json").exists():
        known = read_json(out / PUBLISHED) if (out / PUBLISHED).exists() else {}
        before = {path.name: path.read_bytes() for path in out.glob("*.csv")}
        if any(before.get(path.name) != path.read_bytes() for path in source.glob("tables/*.csv")):
            count = 1 + known.get(study, {}).get("count", 0)
            write_json(out / PUBLISHED, {**known, study: {"count": count, "rows": read_json(rows)}})
    for path in (*source.glob("tables/*.csv"), *source.glob("plots/*.png")):
        shutil.copy(path, out / path.name)


def filled(text: str, folder: Path) -> str:
    """Fill the marked blocks and numbers of a page from the CSV files of `folder`."""

    def read(name: str) -> pd.DataFrame:
        path = folder / f"{name}.csv"
        if not path.exists():
            raise InputError(f"a page has a block of table {name!r}, and {path} does not exist")
        return pd.read_csv(path, dtype={"budget": str})

    def chosen(found: re.Match[str], parts: Sequence[str]) -> pd.DataFrame:
        frame = read(found["name"])
        for key, values in (part.split("=") for part in parts):
            own = frame[key].astype(str) if key in frame else pd.Series(dtype=str)
            if missing := [value for value in values.split("|") if not (own == value).any()]:
                raise InputError(
                    f"{found['name']}.csv has no row with {key}={missing[0]}", rule="no-rows"
                )
            frame = frame[own.isin(values.split("|"))]
        return frame

    def table(found: re.Match[str]) -> str:
        parts = found["where"].split("; ")[1:]
        frame = chosen(found, [part for part in parts if "=" in part]).dropna(axis=1, how="all")
        for start in (part.removeprefix("-") for part in parts if not re.search("=|: ", part)):
            left = [name for name in frame if not name.startswith(start)]
            if len(left) == len(frame.columns):
                raise InputError(
                    f"{found['name']}.csv has no column {start!r} to leave out", rule="no-column"
                )
            frame = frame[left]
        frame = frame.replace(dict(part.split(": ") for part in parts if ": " in part))
        lines = to_markdown(table_of_frame("", "", frame)).splitlines()
        head, *_, tail = found[0].splitlines()
        return "\n".join([head, *(found["indent"] + line for line in lines), tail])

    def value(found: re.Match[str]) -> str:
        *where, column = found["where"].split("; ")
        frame = chosen(found, where)
        if len(frame) != 1:
            raise InputError(
                f"a page has a number of {len(frame)} rows: {found['where']!r} in"
                f" {found['name']}.csv; name one row",
                rule="not-one-row",
            )
        shown = [key for key in frame if f"{key}!" == column or key.startswith(column)]
        cell = table_of_frame("", "", frame[shown]).rows[0][0]
        return f"<!-- value: {found['name']}; {found['where']} -->{cell}<!-- / -->"

    return VALUE.sub(value, BLOCK.sub(table, text))


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
