"""What the calibration decides: how many samples, which text, which rows, and chance."""

import math
from itertools import product

import numpy as np

from blockpruner.methods.recipes import BLOCKPRUNER
from blockpruner.reporting.frames import interval, table_of_lines
from blockpruner.reporting.table import Table
from study.answers.curves import is_measured, title_of
from study.points import Points

SIZE = 0.1
"""The share removed at which calibrations are compared."""

PUBLISHED = ("as published", "24 samples")
"""Names of calibrations: that of the paper, and that of a draw of this study."""

GROUPS = {
    "number of samples": ("16 samples", "64 samples", "256 samples", "1024 samples"),
    "kind of text": ("encyclopaedia", "instructions", "program text", "stories", "64 samples"),
    "length of rows": ("rows of 64", "64 samples", "rows of 1024"),
}
"""Calibrations that differ in one thing."""

VARIATION_NOTE = (
    "Standard deviations of log perplexity: between the values of what varies, draws taken out; and"
    " between draws of one value. The share is that of the variance."
)


def calibrations(points: Points) -> Table | None:
    """What other calibration rows lose: over all kinds of text alike with the range of draws, and
    on each kind."""
    lines = []
    names = {name for group in GROUPS.values() for name in group}
    frame = points.frame[points.frame["calibration"].isin(names)]
    cells = frame.groupby(["heal", "calibration", "method"], sort=False)
    for heal, calibration, method in cells.groups:
        rises = points.curve(SIZE, method=method, heal=heal, calibration=calibration)
        if not is_measured(rises):
            continue
        line = {
            "calibration": calibration,
            "method": title_of(method),
            "healing": heal,
            "draws": len(rises),
        }
        line |= interval("at_10_pct_x", points.against(rises))
        # One draw has no range.
        if len(rises) > 1:
            ratios = [points.over(rise) for rise in rises]
            line["lowest_x"] = min(ratios)
            line["highest_x"] = max(ratios)
        for kind in points.texts:
            line[f"{kind}_x"] = points.against(rises, kind=kind).value
        lines.append(line)
    return table_of_lines("calibration", "Calibration rows, 10% removed", lines)


def published(points: Points) -> Table | None:
    """The search in the paper's own setting, and beside it that of few short rows: what each
    removes and loses."""
    lines = []
    frame = points.frame[points.frame["calibration"].isin(PUBLISHED)]
    for _, model in frame.sort_values(["budget", "calibration"]).iterrows():
        line = {
            "calibration": model["calibration"],
            "removed_pct": 100 * model["ratio"],
            "blocks": model["plan"],
        }
        lines.append(line | interval("plain_x", points.of(model)))
    return table_of_lines("published", "The setting of the paper", lines)


def variation(points: Points) -> Table | None:
    """What moves the result of a calibration, and how much draws alone move it."""
    lines = []
    heals = points.frame["heal"].unique()
    for heal, (factor, names) in product(heals, GROUPS.items()):
        logs = []
        for name in names:
            rises = points.curve(SIZE, method=BLOCKPRUNER, heal=heal, calibration=name)
            if is_measured(rises) and len(rises) > 1:
                logs.append([math.log(points.over(rise)) for rise in rises])
        if len(logs) < 2:
            continue
        # One-way analysis of variance: the means of n draws vary by the variance within / n, too.
        values = np.array(logs)
        within = values.var(axis=1, ddof=1).mean()
        of_means = values.mean(axis=1).var(ddof=1)
        between = max(0.0, of_means - within / values.shape[1])
        lines.append(
            {
                "what varies": factor,
                "healing": heal,
                "between_pct": 100 * math.sqrt(between),
                "draws_pct": 100 * math.sqrt(within),
                "share_pct": 100 * between / (between + within),
            }
        )
    title = "What calibration decides, 10% removed"
    return table_of_lines("variation", title, lines, VARIATION_NOTE)
