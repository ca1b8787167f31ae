"""Scores on tasks, each model against the dense one and against BlockPruner."""

import json

import pandas as pd

from blockpruner.methods.recipes import BLOCKPRUNER
from blockpruner.reporting.answers.claims import LEVEL
from blockpruner.reporting.answers.curves import title_of
from blockpruner.reporting.paper.frames import table_of_frame
from blockpruner.reporting.paper.tables import interval
from blockpruner.reporting.points import DENSE, Points
from blockpruner.reporting.statistics import (
    Effect,
    average,
    differences,
    holm,
    paired_bootstrap,
    paired_t,
    stratified_t,
)
from blockpruner.reporting.table import Table


def tasks(points: Points) -> Table | None:
    """Accuracy against the dense model; accuracy, and the p of the right answer, against
    BlockPruner of the same budget and healing."""
    own = points.frame[points.frame["items"] != "{}"]
    if not len(own):
        return None
    dense = {task: each["score"] for task, each in json.loads(points.dense["items"]).items()}
    lines, tests = list[dict[str, object]](), list[tuple[int, str, Effect]]()
    own = pd.concat([points.dense.to_frame().T.assign(heal="", budget=""), own])
    for (heal, _), group in own.groupby(["heal", "budget"], sort=False):
        base = group[group["method"] == BLOCKPRUNER]
        for _, point in group.iterrows():
            items = json.loads(point["items"])
            scores, golds = (
                {task: each[key] for task, each in items.items()} for key in ("score", "p_gold")
            )
            line: dict[str, object] = {"method": title_of(point["method"]), "healing": heal}
            mean, gold = average(scores), average(golds)
            line |= {
                "removed_pct": 100 * point["ratio"],
                "avg_pct": 100 * mean.value,
                "avg_pct_se": 100 * mean.stderr,
            }
            line |= {"p_gold_pct": 100 * gold.value}
            if point["method"] != DENSE:
                line |= interval("avg_vs_dense", paired_bootstrap(dense, scores), 100)
            if len(base) and point["method"] != BLOCKPRUNER:
                other = json.loads(base.iloc[0]["items"])
                before, p_before = (
                    {task: each[key] for task, each in other.items()} for key in ("score", "p_gold")
                )
                effect = paired_bootstrap(before, scores)
                line |= interval("avg_vs_blockpruner", effect, 100)
                line |= interval("p_gold_vs_blockpruner", stratified_t(p_before, golds), 100)
                line["detectable"] = 100 * DETECTABLE * average(differences(before, scores)).stderr
                tests += [
                    (len(lines), task, paired_t(before[task], scores[task])) for task in scores
                ]
            lines.append(line)
    for (number, task, effect), p in zip(
        tests, holm([effect.p for _, _, effect in tests]), strict=True
    ):
        if p <= LEVEL:
            word = f"{task} {'+' if effect.value > 0 else '-'}"
            lines[number]["tasks"] = ", ".join(
                filter(None, (str(lines[number].get("tasks", "")), word))
            )
    return table_of_frame("tasks", "Tasks", pd.DataFrame(lines), TASKS_NOTE)


DETECTABLE = 2.8
"""Standard errors of a difference that is found four times out of five, at 5 %."""

TASKS_NOTE = (
    "In points, against the dense model, and against BlockPruner with the same budget and healing."
    " Detectable: the difference to BlockPruner that these items would show four times out of five."
    " Tasks: those in which the method is better (+) or worse (-) than BlockPruner, 5 % with Holm's"
    " correction over the table."
)
