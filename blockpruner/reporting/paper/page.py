"""The pages of a study of targets: index.html, report.md, tables/*.csv, plots/*.svg and *.png."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from blockpruner.reporting.pages import Page, Section, made_line, write_page
from blockpruner.reporting.paper.curves import FIGURES
from blockpruner.reporting.paper.evidence import Row
from blockpruner.reporting.paper.figures import figures
from blockpruner.reporting.paper.frames import table_of_frame
from blockpruner.reporting.paper.tables import measured, models_frame, paired, paper_tables
from blockpruner.reporting.table import Table, to_csv


def study_tables(rows: Sequence[Row], published: Path) -> list[Table]:
    """Make every table of a study."""
    frame = models_frame(rows)
    every = table_of_frame("models", "Every model", frame.drop(columns=["recipe"]))
    known = measured(frame)
    curves = [
        table_of_frame(curve.name, curve.title, points[list(curve.columns)], curve.note)
        for curve in FIGURES
        if len(points := curve.points(known))
    ]
    return [*paper_tables(frame, published), *curves, *paired(rows), every]


def write_study(out: Path, title: str, rows: Sequence[Row], published: Path) -> None:
    """Write the tables and figures of a study in the place of `out`, as a whole or not at all."""
    frame, tables = models_frame(rows), study_tables(rows, published)
    plots = figures(frame)
    ours = list(conditions(rows))
    made = made_line(made for row in rows if row.found for made in row.found.result.made)
    files = {f"tables/{table.name}.csv": to_csv(table) for table in tables}
    sections = [Section(table.title, (table,)) for table in tables]
    sections += [Section("Figures", tuple(plots)), Section("Conditions", tuple(ours))]
    write_page(out, Page(title, PREFACE, tuple(sections), made), files)


SEED = re.compile(r"(?<=seed )\d+")


def conditions(rows: Sequence[Row]) -> Iterator[str]:
    """Say what the results of each run hold for; runs that differ by a seed alone have one line."""
    alike: dict[str, dict[str, str]] = {}
    for run, labels in {row.subject.run: row.subject.labels for row in rows}.items():
        done = {word for row in rows if row.subject.run == run for word in row.healing.split(" + ")}
        more = {"refit": labels.compensation, "training": labels.training}
        text = "; ".join([labels.conditions, *(f"{word}: {how}" for word, how in more.items() if word in done)])
        alike.setdefault(SEED.sub("", text), {})[run] = text
    for runs in alike.values():
        seeds = ", ".join(dict.fromkeys(seed for text in runs.values() for seed in SEED.findall(text)))
        yield f"{', '.join(runs)}: {SEED.sub(seeds, next(iter(runs.values())))}."


PREFACE = (
    "Measured by the pipeline of this project; nothing on this page is typed by hand. What holds for one model, and "
    "for a small one above all, need not hold for another."
)
