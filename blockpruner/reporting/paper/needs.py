"""Which models each table and figure of a study shows, and about what they take, before anything is computed."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import pandas as pd

from blockpruner.core.budgets import read_budget
from blockpruner.evaluation.benchmarks import BENCHMARKS
from blockpruner.methods.recipes import recipe
from blockpruner.reporting.paper.curves import FIGURES
from blockpruner.reporting.paper.published import DENSE, MODELS, Known, read_published
from blockpruner.reporting.paper.tables import TABLES, beside, measured, plain_rows, rows_of_table
from blockpruner.scoring.metrics import METRICS
from blockpruner.scoring.settings import Score
from blockpruner.settings import Run

ITEMS: Mapping[str, tuple[int, float]] = {
    "piqa": (1838, 0.14), "winogrande": (1267, 0.07), "hellaswag": (10042, 3.86), "arc_easy": (2376, 0.37),
    "arc_challenge": (1172, 0.21), "truthfulqa_mc1": (817, 0.2), "race": (1045, 1.7), "swag": (20006, 2.0),
    "openbookqa": (500, 0.03), "agieval_aqua_rat": (254, 0.1),
}  # fmt: skip
"""The items of a task, and their tokens in millions: of the first five at four characters a token, of the others a
guess. More tasks are not counted."""

CHECK, CERTAIN = "check", (DENSE, "shortgpt")
"""The methods without a search: model, texts and items decide their numbers."""

TOLERANCE = 1.0
"""In points, of perplexity in per cent. The paper's machine, kernels and versions are others."""

TEXT = 0.34
"""Millions of tokens of WikiText-2's test split."""


def items_of(frame: pd.DataFrame, runs: Mapping[str, Run], folder: Path) -> dict[str, tuple[str, pd.DataFrame]]:
    """Find each table and figure that a study can make: its title, and the models that it shows.

    Args:
        frame: `tables.models_frame` of the study; a model is taken at its budget.
        folder: of the paper's numbers.
    """
    wanted = frame["budget"].map(lambda text: 100 * read_budget(text)[0] if text and read_budget(text)[1] == "" else 0)
    asked, found = frame.assign(removed_pct=wanted), {}
    for table in TABLES:
        tasks = BENCHMARKS.keys() & set(table.columns.values())
        able = [not tasks or not tasks.isdisjoint(runs[run].evaluate.zero_shot.tasks) for run in asked["run"]]
        lines = [line for line in beside(table, rows_of_table(table, asked[able]), folder) if line["source"] == "here"]
        found[table.name] = (table.title, pd.DataFrame(lines, columns=asked.columns))
    found |= {curve.name: (curve.title, curve.points(asked)) for curve in FIGURES}
    first, published = found[TABLES[0].name][1], {row.model for row in read_published(folder, TABLES[0].source)}
    certain = first["recipe"].isin(CERTAIN) & first["model"].isin(published)
    found[CHECK] = ("What --check compares with the paper", first[certain])
    found["all"] = ("Every model of the study", asked)
    return {name: item for name, item in found.items() if (item[1]["recipe"] != DENSE).any()}


def differences(frame: pd.DataFrame, folder: Path) -> tuple[int, list[str], list[str]]:
    """Compare our rows with the paper's Table 1: how many numbers agree, what differs and must not, what else differs.

    Of a search that goes another way at a near tie, also 64 samples in place of 256, other numbers are no fault.
    """
    table, agreed, faults, others = TABLES[0], 0, list[str](), list[str]()
    known = measured(frame)
    for here, theirs in pairwise(beside(table, plain_rows(known[known["recipe"].isin(table.methods)]), folder)):
        if (here["source"], theirs["source"], here["method"]) != ("here", "paper", theirs["method"]):
            continue
        for key in table.columns.values():
            own, paper = float(here.get(key, "nan")), theirs[key]
            apart = 100 * abs(own / paper - 1) if key.endswith("ppl") else abs(own - paper)
            if apart <= TOLERANCE:
                agreed += 1
            else:
                words = f"{here['model']}, {here['method']}: {key} is {own:.2f}, in the paper {paper:.2f}"
                (faults if here["recipe"] in CERTAIN else others).append(words)
    return agreed, faults, others


def takes(models: pd.DataFrame, runs: Mapping[str, Run]) -> str:
    """Tell in words what models take. Masks are counted for the models of the paper."""
    pruned, masks, tokens = models[models["recipe"] != DENSE], 0, 0.0
    searches = list(pruned.groupby(["run", "recipe"]))
    known = {run: MODELS.get(getattr(runs[run].model, "repo", "")) for run in models["run"]}
    for (run, name), own in searches:
        if (model := known[run]) is not None:
            masks += _masks(name, own["removed_pct"].max(), model)
    for asked in (runs[run].evaluate.zero_shot for run in models["run"]):
        sizes = [ITEMS.get(task, (1, 0.0)) for task in asked.tasks]
        tokens += TEXT + sum(millions * min(1, (asked.limit or items) / items) for items, millions in sizes)
    trained, there = pruned["healing"].str.contains("training").sum(), (models["reason"] == "").sum()
    return (
        f"{len(models)} models ({there} measured); {len(searches)} searches, about {masks:,} masks; evaluation "
        f"of about {tokens:.0f} million tokens; {trained} trained"
    )


def _masks(name: str, removed: float, model: Known) -> int:
    """Count about how many masks a search scores on all calibration rows, if it is exact."""
    searches = (Score.model_validate(dict(fields)) for fields in recipe(name).searches.values())
    return sum(_masks_of(score, removed, model) for score in searches)


def _masks_of(score: Score, removed: float, model: Known) -> int:
    if score.method not in ("greedy", "one_shot"):
        return 0
    kinds = {"mha": (model.mha_pct,), "mlp": (model.mlp_pct,), "all": (model.mha_pct, model.mlp_pct)}[score.candidates]
    units, size = model.layers * len(kinds), sum(kinds) / len(kinds)
    if score.unit != "block":
        units, size = model.layers, sum(kinds)
    steps = 1 if score.method == "one_shot" else round(removed / size)
    return steps if METRICS[score.metric].influence else 1 + sum(units - step for step in range(steps))
