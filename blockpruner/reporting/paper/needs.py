"""Which models each table and figure of a study shows, and about what they take, before anything is
computed."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import pandas as pd

from blockpruner.core.budgets import read_budget
from blockpruner.evaluation.benchmarks import BENCHMARKS
from blockpruner.reporting.paper.curves import FIGURES
from blockpruner.reporting.paper.published import DENSE, read_published
from blockpruner.reporting.paper.tables import TABLES, beside, measured, plain_rows, rows_of_table
from blockpruner.settings import Run

CHECK, CERTAIN = "check", (DENSE, "shortgpt")
"""The methods without a search: model, texts and items decide their numbers."""

TOLERANCE = 1.0
"""In points, of perplexity in per cent. The paper's machine, kernels and versions are others."""


def items_of(
    frame: pd.DataFrame, runs: Mapping[str, Run], folder: Path
) -> dict[str, tuple[str, pd.DataFrame]]:
    """Find each table and figure that a study can make: its title, and the models that it shows,
    each at its budget, of the study's `models_frame`."""
    wanted = frame["budget"].map(
        lambda text: 100 * read_budget(text)[0] if text and read_budget(text)[1] == "" else 0
    )
    asked, found = frame.assign(removed_pct=wanted), {}
    for table in TABLES:
        tasks = BENCHMARKS.keys() & set(table.columns.values())
        able = [
            not tasks or not tasks.isdisjoint(runs[run].evaluate.zero_shot.tasks)
            for run in asked["run"]
        ]
        lines = [
            line
            for line in beside(table, rows_of_table(table, asked[able]), folder)
            if line["source"] == "here"
        ]
        found[table.name] = (table.title, pd.DataFrame(lines, columns=asked.columns))
    found |= {curve.name: (curve.title, curve.points(asked)) for curve in FIGURES}
    first, published = (
        found[TABLES[0].name][1],
        {row.model for row in read_published(folder, TABLES[0].source)},
    )
    certain = first["recipe"].isin(CERTAIN) & first["model"].isin(published)
    found[CHECK] = ("What --check compares with the paper", first[certain])
    found["all"] = ("Every model of the study", asked)
    return {name: item for name, item in found.items() if (item[1]["recipe"] != DENSE).any()}


def differences(frame: pd.DataFrame, folder: Path) -> tuple[int, list[str], list[str]]:
    """Compare our rows with the paper's Table 1: how many numbers agree, what differs and must not,
    what else differs.

    Of a search that goes another way at a near tie, also 64 samples in place of 256, other numbers
    are no fault.
    """
    table, agreed, faults, others = TABLES[0], 0, list[str](), list[str]()
    known = measured(frame)
    for here, theirs in pairwise(
        beside(table, plain_rows(known[known["recipe"].isin(table.methods)]), folder)
    ):
        if (here["source"], theirs["source"], here["method"]) != (
            "here",
            "paper",
            theirs["method"],
        ):
            continue
        for key in table.columns.values():
            own, paper = float(here.get(key, "nan")), theirs[key]
            apart = 100 * abs(own / paper - 1) if key.endswith("ppl") else abs(own - paper)
            if apart <= TOLERANCE:
                agreed += 1
            else:
                words = (
                    f"{here['model']}, {here['method']}: {key} is {own:.2f}, in the paper"
                    f" {paper:.2f}"
                )
                (faults if here["recipe"] in CERTAIN else others).append(words)
    return agreed, faults, others


def takes(models: pd.DataFrame) -> str:
    """Tell in words what models take."""
    searches = models[models["recipe"] != DENSE].groupby(["run", "recipe"]).ngroups
    trained, there = (
        models["healing"].str.contains("training").sum(),
        (models["reason"] == "").sum(),
    )
    return f"{len(models)} models ({there} measured); {searches} searches; {trained} trained"
