"""What the calibration decides: how many samples, which text, which rows, and chance."""

import math
from itertools import product

import numpy as np
import pandas as pd

from blockpruner.methods.recipes import BLOCKPRUNER
from blockpruner.reporting.answers.curves import known, title_of
from blockpruner.reporting.paper.frames import table_of_frame
from blockpruner.reporting.paper.tables import interval
from blockpruner.reporting.points import Points
from blockpruner.reporting.table import Table


def calibrations(points: Points, size: float = 0.1) -> Table | None:
    """What other calibration rows lose: over all kinds of text alike with the range of draws, and
    on each kind."""
    lines = []
    own = points.frame[
        points.frame["calibration"].isin([name for names in GROUPS.values() for name in names])
    ]
    for (heal, name, method), _ in own.groupby(["heal", "calibration", "method"], sort=False):
        rises = points.curve(size, method=method, heal=heal, calibration=name)
        if known(rises):
            line = {
                "calibration": name,
                "method": title_of(method),
                "healing": heal,
                "draws": len(rises),
            }
            each = [points.over(rise) for rise in rises]
            line |= interval(f"at_{100 * size:.0f}_pct_x", points.against(rises))
            line |= {"lowest_x": min(each), "highest_x": max(each)} if len(each) > 1 else {}
            lines.append(
                line
                | {f"{kind}_x": points.against(rises, kind=kind).value for kind in points.texts}
            )
    if not lines:
        return None
    return table_of_frame(
        "calibration", f"Calibration rows, {size:.0%} removed", pd.DataFrame(lines)
    )


def published(points: Points) -> Table | None:
    """The search in the paper's own setting, and beside it that of few short rows: what each
    removes and loses."""
    own, lines = points.frame[points.frame["calibration"].isin(PUBLISHED)], []
    for _, cell in own.sort_values(["budget", "calibration"]).iterrows():
        line = {
            "calibration": cell["calibration"],
            "removed_pct": 100 * cell["ratio"],
            "blocks": cell["plan"],
        }
        lines.append(line | interval("plain_x", points.of(cell)))
    return (
        table_of_frame("published", "The setting of the paper", pd.DataFrame(lines))
        if lines
        else None
    )


PUBLISHED = ("as published", "24 samples")
"""Names of calibrations: that of the paper, and that of a draw of this study."""

GROUPS = {
    "number of samples": ("16 samples", "64 samples", "256 samples", "1024 samples"),
    "kind of text": ("encyclopaedia", "instructions", "program text", "stories", "64 samples"),
    "length of rows": ("rows of 64", "64 samples", "rows of 1024"),
}
"""Calibrations that differ in one thing."""


def variation(points: Points, size: float = 0.1) -> Table | None:
    """What moves the result of a calibration, and how much draws alone move it."""
    lines, frame = [], points.frame
    for heal, (thing, names) in product(frame["heal"].unique(), GROUPS.items()):
        found = [
            points.curve(size, method=BLOCKPRUNER, heal=heal, calibration=name) for name in names
        ]
        found = [rises for rises in found if known(rises) and len(rises) > 1]
        if len(found) < 2:
            continue
        logs = np.array([[math.log(points.over(rise)) for rise in rises] for rises in found])
        within = logs.var(axis=1, ddof=1).mean()
        between = max(0.0, logs.mean(axis=1).var(ddof=1) - within / logs.shape[1])
        spread = {"between_pct": 100 * math.sqrt(between), "draws_pct": 100 * math.sqrt(within)}
        lines.append(
            {
                "what varies": thing,
                "healing": heal,
                **spread,
                "share_pct": 100 * between / (between + within),
            }
        )
    if not lines:
        return None
    return table_of_frame(
        "variation", f"What calibration decides, {size:.0%} removed", pd.DataFrame(lines), VARIATION
    )


VARIATION = (
    "Standard deviations of log perplexity: between the values of what varies, draws taken out; and"
    " between draws of one value. The share is that of the variance."
)
