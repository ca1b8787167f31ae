"""The pages of a study of targets: index.html, report.md, tables/*.csv, plots/*.svg and *.png."""

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from blockpruner.core.errors import extra
from blockpruner.reporting import plots
from blockpruner.reporting.pages import Page, Section, made_line, write_page
from blockpruner.reporting.paper.curves import FIGURES, Curve
from blockpruner.reporting.paper.evidence import Row
from blockpruner.reporting.paper.frames import COLUMNS, table_of_frame
from blockpruner.reporting.paper.published import DENSE
from blockpruner.reporting.paper.tables import measured, models_frame, paired, paper_tables
from blockpruner.reporting.plots import MANY_MARKS, Plot
from blockpruner.reporting.table import Table, to_csv

with extra("report"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def study_tables(rows: Sequence[Row], published: Path) -> list[Table]:
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
    ours = list(conditions(rows))
    made = made_line(made for row in rows if row.found for made in row.found.result.made)
    files = {f"tables/{table.name}.csv": to_csv(table) for table in tables}
    sections = [Section(table.title, (table,)) for table in tables]
    sections += [Section("Figures", tuple(figures(frame))), Section("Conditions", tuple(ours))]
    write_page(out, Page(title, PREFACE, tuple(sections), made), files)


SEED = re.compile(r"(?<=seed )\d+")


def conditions(rows: Sequence[Row]) -> Iterator[str]:
    """Say what the results of each run hold for; runs that differ by a seed alone have one line."""
    alike: dict[str, dict[str, str]] = {}
    for run, labels in {row.subject.run: row.subject.labels for row in rows}.items():
        done = {word for row in rows if row.subject.run == run for word in row.healing.split(" + ")}
        more = {"refit": labels.compensation, "training": labels.training}
        text = "; ".join(
            [labels.conditions, *(f"{word}: {how}" for word, how in more.items() if word in done)]
        )
        alike.setdefault(SEED.sub("", text), {})[run] = text
    for runs in alike.values():
        seeds = ", ".join(
            dict.fromkeys(seed for text in runs.values() for seed in SEED.findall(text))
        )
        yield f"{', '.join(runs)}: {SEED.sub(seeds, next(iter(runs.values())))}."


PREFACE = (
    "Measured by the pipeline of this project; nothing on this page is typed by hand. What holds"
    " for one model, and for a small one above all, need not hold for another."
)


def figures(frame: pd.DataFrame) -> list[Plot]:
    """Draw every figure of which something was measured."""
    known = measured(frame)
    drawn = (
        (curve, [own for _, own in curve.points(known).groupby("model", sort=False)])
        for curve in FIGURES
    )
    return [_draw(curve, models) for curve, models in drawn if models]


def _draw(curve: Curve, models: Sequence[pd.DataFrame]) -> Plot:
    def fill(figure: Figure) -> None:
        grid = figure.subplots(len(models), len(curve.y), squeeze=False)
        for line, own in zip(grid, models, strict=True):
            for axes, y in zip(line, curve.y, strict=True):
                _lines(curve, y, axes, own)
                axes.set_title(own["model"].iloc[0])

    caption, size = (
        f"{curve.title}. {curve.note}".rstrip(),
        (max(8.0, 5.0 * len(curve.y)), 4.2 * len(models)),
    )
    return plots.render(curve.name, caption, size, fill)


def _lines(curve: Curve, y: str, axes: Axes, own: pd.DataFrame) -> None:
    dense = own[own["recipe"] == DENSE]
    lines = own[own["recipe"] != DENSE].groupby(curve.line, sort=False)
    for (label, group), (colour, shape) in zip(lines, itertools.cycle(MANY_MARKS), strict=False):
        line = pd.concat([dense, group]).sort_values(curve.x)
        axes.plot(line[curve.x], line[y], color=colour, marker=shape, label=label)
    if y.endswith("ppl"):
        plots.scale_(axes, own[y].tolist())
    plots.label_(axes, COLUMNS[curve.x].title, COLUMNS[y].title)
    axes.legend()
