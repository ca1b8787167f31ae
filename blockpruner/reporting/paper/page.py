"""The pages of a study: everything for its own folder, and one page of results for docs/.

index.html, report.md, results.md, tables/*.csv and *.tex, plots/*.svg and *.png.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from blockpruner.methods.recipes import BLOCKPRUNER
from blockpruner.reporting.pages import Page, Section, made_line, write_page
from blockpruner.reporting.paper.curves import FIGURES
from blockpruner.reporting.paper.evidence import Row
from blockpruner.reporting.paper.figures import figures
from blockpruner.reporting.paper.frames import table_of_frame
from blockpruner.reporting.paper.published import DENSE
from blockpruner.reporting.paper.tables import (
    bands,
    draws,
    first_runs,
    front,
    measured,
    models_frame,
    paired,
    paper_tables,
)
from blockpruner.reporting.table import Number, Table, to_csv, to_latex, to_markdown

FRONT_NOTE = (
    "Of each size: the best trained and untrained model by held-out perplexity, each with its best rival healed alike, "
    "and plain BlockPruner if it was measured. Of several runs, the first. Brackets: 95 % over rows; ±: standard error."
)


def best_of_each_size(frame: pd.DataFrame) -> Table:
    return table_of_frame("front", "The best models of each size", front(frame), FRONT_NOTE)


def study_tables(rows: Sequence[Row], published: Path) -> list[Table]:
    """Make every table of a study, the front page's first."""
    frame = models_frame(rows)
    chosen = [best_of_each_size(frame)] if len(measured(frame)) else []
    every = table_of_frame("models", "Every model", frame.drop(columns=["recipe"]))
    known = measured(frame)
    curves = [
        table_of_frame(curve.name, curve.title, points[list(curve.columns)], curve.note)
        for curve in FIGURES
        if len(points := curve.points(known))
    ]
    return [*chosen, *paper_tables(frame, published), *curves, *paired(rows), *draws(frame), every]


def write_study(out: Path, title: str, rows: Sequence[Row], published: Path) -> None:
    """Write the tables and figures of a study in the place of `out`, as a whole or not at all."""
    frame, tables = models_frame(rows), study_tables(rows, published)
    plots = figures(frame)
    ours = list(conditions(rows))
    made = made_line(made for row in rows if row.found for made in row.found.result.made)
    summary = results_page(title, frame, [*ours, made], [plot.name for plot in plots])
    files = {f"tables/{table.name}.csv": to_csv(table) for table in tables}
    files |= {f"tables/{table.name}.tex": to_latex(table) for table in tables} | {"results.md": summary}
    sections = [Section("In short", tuple(verdict(frame)))]
    sections += [Section(table.title, (table,)) for table in tables]
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


def written(value: float, digits: int) -> str:
    return str(Number(value, digits))


PREFACE = (
    "Measured by the pipeline of this project; nothing on this page is typed by hand. What holds for one model, and "
    "for a small one above all, need not hold for another."
)

MARKED = "## {0.title}\n\n<!-- table: {0.name} -->\n{1}\n<!-- /table -->\n\n{2}"
"""`publish` fills such a block from docs/results/<name>.csv."""


def verdict(frame: pd.DataFrame) -> list[str]:
    """Sum up a study in at most five sentences for each model: three sizes, accuracy, speed; and say which runs."""
    found: list[str] = []
    for model, own in first_runs(measured(frame)).groupby("model", sort=False):
        several = f"{model}: " if frame["model"].nunique() > 1 else ""
        dense = own[own["recipe"] == DENSE].iloc[0]
        sizes = bands(own)
        for band in sizes[:3]:
            found.append(several + _size(band))
        if not sizes:
            continue
        pruned = pd.concat(sizes)
        low, high = (written(value, 1) for value in (pruned["avg_pct"].min(), pruned["avg_pct"].max()))
        at = f"{written(dense['avg_pct'], 1)} ± {written(dense['avg_pct_se'], 1)} %"
        found.append(f"{several}Accuracy is {low} to {high} % where dense has {at} (one standard error).")
        timed = pruned["generation_x"].dropna() if "generation_x" in pruned else pruned.iloc[:0]["avg_pct"]
        if len(timed):
            fast, slow = written(timed.max(), 2), written(timed.min(), 2)
            found.append(f"{several}Generation is {slow} to {fast} times as fast as dense.")
    if len(draws(frame)):
        found.append("These are numbers of first runs; the tables over calibration draws have all runs.")
    return found


def _size(band: pd.DataFrame) -> str:
    def quality(row: pd.Series[float]) -> str:
        return f"{written(row['heldout_ppl'], 2)} ({written(row['heldout_x'], 2)} × dense)"

    best = band.loc[band["heldout_ppl"].idxmin()]
    plain = band[(band["recipe"] == BLOCKPRUNER) & (band["healing"] == "") & (band.index != best.name)]
    more = f"; BlockPruner has {quality(plain.iloc[0])}" if len(plain) else ""
    at, lowest = f"At {written(best['removed_pct'], 1)} % removed", "has the lowest held-out perplexity"
    return f"{at}, {best['method']} {lowest}, {quality(best)}{more}."


def results_page(title: str, frame: pd.DataFrame, conditions: Sequence[str], plots: Sequence[str]) -> str:
    """Write docs/results.md: a verdict, tables of draws and of sizes, two figures, the conditions, and links to all
    numbers."""
    shown = [*draws(frame), best_of_each_size(frame)] if len(measured(frame)) else []
    unknown = frame[frame["reason"].fillna("") != ""].groupby("reason", sort=False)["target"]
    missing = [f"- {', '.join(targets)}: {reason}" for reason, targets in unknown]
    parts = [
        f"# {title}",
        PREFACE,
        "\n".join(f"- {line}" for line in verdict(frame)),
        *(MARKED.format(t, to_markdown(replace(t, title="", notes=())), "\n\n".join(t.notes)).rstrip() for t in shown),
        *([] if shown else ["Nothing is measured yet."]),
        *(f"![{name}](results/{name}.png)" for name in plots[:2]),
        *(["## Not measured", "\n".join(missing)] if missing else []),
        "## Conditions",
        "\n".join(f"- {line}" for line in conditions if line),
        "All numbers are in CSV files: [results/](results/).",
    ]
    return "\n\n".join(parts) + "\n"
