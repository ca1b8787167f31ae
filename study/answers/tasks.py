"""Scores on tasks, each model against the dense one and against BlockPruner."""

import json

import numpy as np
import pandas as pd

from blockpruner.methods.recipes import BLOCKPRUNER
from blockpruner.reporting.frames import interval, table_of_lines
from blockpruner.reporting.statistics import (
    Floats,
    average,
    differences,
    holm,
    paired_bootstrap,
    paired_t,
    stratified_t,
)
from blockpruner.reporting.table import Table
from study.answers.claims import LEVEL
from study.answers.curves import title_of
from study.points import DENSE, Points

DETECTABLE = 2.8
"""Standard errors of a difference that is found four times out of five, at 5 %."""

TASKS_NOTE = (
    "In points, against the dense model, and against BlockPruner with the same budget and healing."
    " Detectable: the difference to BlockPruner that these items would show four times out of five."
    " Tasks: those in which the method is better (+) or worse (-) than BlockPruner, 5 % with Holm's"
    " correction over the table."
)


def tasks(points: Points) -> Table | None:
    """Accuracy against the dense model; accuracy, and the p of the right answer, against
    BlockPruner of the same budget and healing."""
    lines: list[dict[str, object]] = []
    baselines: list[pd.Series | None] = []
    frame = points.frame[points.frame["items"] != "{}"]
    if frame.empty:
        return None
    dense = points.dense.to_frame().T.assign(heal="", budget="")
    frame = pd.concat([dense, frame])
    models = []
    for _, group in frame.groupby(["heal", "budget"], sort=False):
        of_blockpruner = group[group["method"] == BLOCKPRUNER]
        baseline = None if of_blockpruner.empty else of_blockpruner.iloc[0]
        for _, model in group.iterrows():
            line = _line(model, points.dense)
            # BlockPruner may not have been measured at every budget.
            is_compared = baseline is not None and model["method"] != BLOCKPRUNER
            if is_compared:
                line |= _comparison(model, baseline)
            models.append(model)
            baselines.append(baseline if is_compared else None)
            lines.append(line)
    for line, text in zip(lines, _different_tasks(models, baselines), strict=True):
        if text:
            line["tasks"] = text
    return table_of_lines("tasks", "Tasks", lines, TASKS_NOTE)


def _values(model: pd.Series, key: str) -> dict[str, Floats]:
    """By task, the "score" or the "p_gold" of each item."""
    items = json.loads(model["items"])
    return {task: np.asarray(values[key], float) for task, values in items.items()}


def _line(model: pd.Series, dense: pd.Series) -> dict[str, object]:
    scores = _values(model, "score")
    accuracy = average(scores)
    line: dict[str, object] = {
        "method": title_of(model["method"]),
        "healing": model["heal"],
        "removed_pct": 100 * model["ratio"],
        "avg_pct": 100 * accuracy.value,
        "avg_pct_se": 100 * accuracy.stderr,
        "p_gold_pct": 100 * average(_values(model, "p_gold")).value,
    }
    if model["method"] != DENSE:
        line |= interval("avg_vs_dense", paired_bootstrap(_values(dense, "score"), scores), 100)
    return line


def _comparison(model: pd.Series, baseline: pd.Series) -> dict[str, float]:
    """The columns of a model against BlockPruner of the same budget and healing."""
    baseline_scores, scores = _values(baseline, "score"), _values(model, "score")
    p_gold = stratified_t(_values(baseline, "p_gold"), _values(model, "p_gold"))
    error = average(differences(baseline_scores, scores)).stderr
    return {
        **interval("avg_vs_blockpruner", paired_bootstrap(baseline_scores, scores), 100),
        **interval("p_gold_vs_blockpruner", p_gold, 100),
        "detectable": 100 * DETECTABLE * error,
    }


def _different_tasks(models: list[pd.Series], baselines: list[pd.Series | None]) -> list[str]:
    """For each model the tasks that differ from those of its baseline, with + or -."""
    tests = []
    for index, (model, baseline) in enumerate(zip(models, baselines, strict=True)):
        if baseline is None:
            continue
        baseline_scores = _values(baseline, "score")
        for task, scores in _values(model, "score").items():
            tests.append((index, task, paired_t(baseline_scores[task], scores)))
    # The family of Holm's correction is the whole table.
    corrected = holm([effect.p for _, _, effect in tests])
    different: list[list[str]] = [[] for _ in models]
    for (index, task, effect), p in zip(tests, corrected, strict=True):
        if p <= LEVEL:
            different[index].append(f"{task} {'+' if effect.value > 0 else '-'}")
    return [", ".join(names) for names in different]
