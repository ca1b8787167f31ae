"""What searches find on the same rows."""

import numpy as np

from blockpruner.reporting.frames import table_of_lines
from blockpruner.reporting.table import Table
from study.answers.curves import SEARCHED, at_size, title_of
from study.points import Points

SEARCHED_NOTE = (
    "Over best: perplexity on the rows of the search over that of the best mask of this size that"
    " any search here has found on them. At 10 and 20: on the test texts, × dense."
)


def searched(points: Points) -> Table | None:
    """What searches find on the same rows, and what that is worth on the test texts."""
    lines = []
    frame = points.frame[points.frame["calibration"] == SEARCHED]
    best = frame.groupby(["seed", "budget"])["search_ppl"].transform("min")
    ratios = frame["search_ppl"] / best
    frame = frame.assign(log_over_best=np.log(ratios.to_numpy(float)))
    for method, models in frame.groupby("method", sort=False):
        draw_count = models["seed"].nunique()
        line: dict[str, object] = {"search": title_of(method), "draws": draw_count}
        columns = {"method": method, "heal": "plain", "calibration": SEARCHED}
        for budget, draws in models.groupby("budget"):
            size = f"{100 * float(budget):.0f}"
            line[f"trials_{size}"] = draws["trials_asked"].mean()
            log_ratio = draws["log_over_best"].mean()
            line[f"over_best_{size}"] = float(np.exp(log_ratio))
            line |= at_size(points, f"at_{size}_x", float(budget), **columns)
        lines.append(line)
    return table_of_lines("searches", "Searches on the same rows", lines, SEARCHED_NOTE)
