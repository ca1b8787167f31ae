"""Which models each table and figure of a study shows, and about what they take, before anything is
computed."""

from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path

import pandas as pd

from blockpruner.config.sections import Run
from blockpruner.core.budgets import read_budget
from blockpruner.evaluation.benchmarks import BENCHMARKS
from study.paper.curves import FIGURES
from study.paper.published import DENSE, read_published
from study.paper.tables import (
    TABLES,
    PaperTable,
    beside,
    measured,
    plain_rows,
    rows_of_table,
)

CHECK = "check"
CERTAIN = (DENSE, "shortgpt")
"""The methods without a search: model, texts and items decide their numbers."""

TOLERANCE = 1.0
"""In points, of perplexity in per cent. The paper's machine, kernels and versions are others."""


def items_of(
    frame: pd.DataFrame, runs: Mapping[str, Run], folder: Path
) -> dict[str, tuple[str, pd.DataFrame]]:
    """Find each table and figure that a study can make: its title, and the models that it shows,
    each at its budget, of the study's `models_frame`."""
    models = frame.assign(removed_pct=frame["budget"].map(_removed_pct))
    items = {}
    for table in TABLES:
        rows = rows_of_table(table, models[_has_tasks(table, models["run"], runs)])
        lines = beside(table, rows, folder)
        ours = [line for line in lines if line["source"] == "here"]
        items[table.name] = (table.title, pd.DataFrame(ours, columns=models.columns))
    for curve in FIGURES:
        items[curve.name] = (curve.title, curve.points(models))
    main_table = TABLES[0]
    papers = {row.model for row in read_published(folder, main_table.source)}
    _, rows = items[main_table.name]
    checked = rows[rows["recipe"].isin(CERTAIN) & rows["model"].isin(papers)]
    items[CHECK] = ("What --check compares with the paper", checked)
    items["all"] = ("Every model of the study", models)
    # Dense models alone show nothing.
    return {
        name: (title, rows)
        for name, (title, rows) in items.items()
        if (rows["recipe"] != DENSE).any()
    }


def _removed_pct(budget: str) -> float:
    """The share that a budget removes; 0 for the dense model and for budgets in other units."""
    if not budget:
        return 0
    value, unit = read_budget(budget)
    return 100 * value if unit == "" else 0


def _has_tasks(table: PaperTable, names: Iterable[str], runs: Mapping[str, Run]) -> list[bool]:
    """Whether each of these runs evaluates a task of the table; a table without tasks is of all."""
    tasks = BENCHMARKS.keys() & set(table.columns.values())
    if not tasks:
        return [True for _ in names]
    return [not tasks.isdisjoint(runs[name].evaluate.zero_shot.tasks) for name in names]


def differences(frame: pd.DataFrame, folder: Path) -> tuple[int, list[str], list[str]]:
    """Compare our rows with the paper's Table 1: how many numbers agree, what differs and must not,
    what else differs.

    Of a search that goes another way at a near tie, also 64 samples in place of 256, other numbers
    are no fault.
    """
    agreed = 0
    errors: list[str] = []
    notes: list[str] = []
    table = TABLES[0]
    models = measured(frame)
    rows = plain_rows(models[models["recipe"].isin(table.methods)])
    for ours, paper in pairwise(beside(table, rows, folder)):
        is_pair = (ours["source"], paper["source"]) == ("here", "paper")
        # `beside` puts the row of the paper after ours of the same method.
        if not is_pair or ours["method"] != paper["method"]:
            continue
        for key in table.columns.values():
            value = float(ours.get(key, "nan"))
            if _distance(key, value, paper[key]) <= TOLERANCE:
                agreed += 1
                continue
            text = f"{ours['model']}, {ours['method']}: {key} is {value:.2f}"
            lines = errors if ours["recipe"] in CERTAIN else notes
            lines.append(f"{text}, in the paper {paper[key]:.2f}")
    return agreed, errors, notes


def _distance(key: str, value: float, paper: float) -> float:
    """In the unit of TOLERANCE."""
    return 100 * abs(value / paper - 1) if key.endswith("ppl") else abs(value - paper)


def takes(models: pd.DataFrame) -> str:
    """Write what models take."""
    pruned = models[models["recipe"] != DENSE]
    searches = pruned.groupby(["run", "recipe"]).ngroups
    trained = models["healing"].str.contains("training").sum()
    measured = (models["reason"] == "").sum()
    return f"{len(models)} models ({measured} measured); {searches} searches; {trained} trained"
