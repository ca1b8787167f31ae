"""The pages of a study of targets: index.html, report.md, tables/*.csv, plots/*.svg and *.png."""

import re
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path

import pandas as pd

from blockpruner.core.errors import extra
from blockpruner.reporting.frames import COLUMNS, table_of_frame
from blockpruner.reporting.pages import Page, Section, provenance_line, write_page
from blockpruner.reporting.plots import MANY_MARKS, Plot, label_, render, scale_
from blockpruner.reporting.table import Table, to_csv
from study.paper.curves import FIGURES, Curve
from study.paper.evidence import Row
from study.paper.pairs import paired
from study.paper.published import DENSE
from study.paper.tables import measured, models_frame, paper_tables

with extra("report"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


SEED = re.compile(r"(?<=seed )\d+")

PREFACE = (
    "Measured by the pipeline of this project; nothing on this page is typed by hand. What holds"
    " for one model, and for a small one above all, need not hold for another."
)


def study_tables(rows: Sequence[Row], published: Path) -> list[Table]:
    frame = models_frame(rows)
    tables = paper_tables(frame, published)
    for curve in FIGURES:
        points = curve.points(measured(frame))
        if len(points):
            points = points[list(curve.columns)]
            tables.append(table_of_frame(curve.name, curve.title, points, curve.note))
    models = table_of_frame("models", "Every model", frame.drop(columns=["recipe"]))
    return [*tables, *paired(rows), models]


def write_study(out: Path, title: str, rows: Sequence[Row], published: Path) -> None:
    """Write the tables and figures of a study in the place of `out`, as a whole or not at all."""
    tables = study_tables(rows, published)
    files = {f"tables/{table.name}.csv": to_csv(table) for table in tables}
    sections = [
        *(Section(table.title, (table,)) for table in tables),
        Section("Figures", tuple(figures(models_frame(rows)))),
        Section("Conditions", tuple(conditions(rows))),
    ]
    results = [row.measured.result for row in rows if row.measured]
    provenance = provenance_line(record for result in results for record in result.provenance)
    write_page(out, Page(title, PREFACE, tuple(sections), provenance), files)


def conditions(rows: Sequence[Row]) -> Iterator[str]:
    """Write what the results of each run hold for; runs that differ by a seed alone have one
    line."""
    texts: dict[str, str] = {}
    runs_by_text: dict[str, list[str]] = {}
    labels_by_run = {row.subject.run: row.subject.labels for row in rows}
    # Seeds are cut out of the text, and runs of equal texts are grouped.
    for run, labels in labels_by_run.items():
        healings = {step for row in rows if row.subject.run == run for step in row.steps}
        texts[run] = labels.conditions
        if "refit" in healings:
            texts[run] += f"; refit: {labels.compensation}"
        if "training" in healings:
            texts[run] += f"; training: {labels.training}"
        seedless = SEED.sub("", texts[run])
        runs_by_text.setdefault(seedless, []).append(run)
    for runs in runs_by_text.values():
        seeds = [seed for run in runs for seed in SEED.findall(texts[run])]
        distinct = ", ".join(dict.fromkeys(seeds))
        text = SEED.sub(distinct, texts[runs[0]])
        yield f"{', '.join(runs)}: {text}."


def figures(frame: pd.DataFrame) -> list[Plot]:
    """Draw every figure of which something was measured."""
    plots = []
    for curve in FIGURES:
        points = curve.points(measured(frame))
        models = [rows for _, rows in points.groupby("model", sort=False)]
        if models:
            plots.append(_draw(curve, models))
    return plots


def _draw(curve: Curve, models: Sequence[pd.DataFrame]) -> Plot:
    def fill(figure: Figure) -> None:
        grid = figure.subplots(len(models), len(curve.y), squeeze=False)
        for panels, rows in zip(grid, models, strict=True):
            for axes, y in zip(panels, curve.y, strict=True):
                _draw_lines(curve, y, axes, rows)
                axes.set_title(rows["model"].iloc[0])

    caption = f"{curve.title}. {curve.note}".rstrip()
    size = max(8.0, 5.0 * len(curve.y)), 4.2 * len(models)
    return render(curve.name, caption, size, fill)


def _draw_lines(curve: Curve, y: str, axes: Axes, rows: pd.DataFrame) -> None:
    is_dense = rows["recipe"] == DENSE
    groups = rows[~is_dense].groupby(curve.line, sort=False)
    for (label, group), (colour, shape) in zip(groups, cycle(MANY_MARKS), strict=False):
        # Every line begins at the dense model.
        line = pd.concat([rows[is_dense], group]).sort_values(curve.x)
        axes.plot(line[curve.x], line[y], color=colour, marker=shape, label=label)
    if y.endswith("ppl"):
        scale_(axes, rows[y].tolist())
    label_(axes, COLUMNS[curve.x].title, COLUMNS[y].title)
    axes.legend()
