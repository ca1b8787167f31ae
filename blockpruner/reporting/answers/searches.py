"""What searches find on the same rows."""

import math

import numpy as np
import pandas as pd

from blockpruner.reporting.answers.curves import SEARCHED, at_size, title_of
from blockpruner.reporting.paper.frames import table_of_frame
from blockpruner.reporting.points import Points
from blockpruner.reporting.table import Table


def searched(points: Points) -> Table | None:
    """What searches find on the same rows, and what that is worth on the test texts."""
    own = points.frame[points.frame["calibration"] == SEARCHED]
    if not len(own):
        return None
    best, lines = own.groupby(["seed", "budget"])["search_ppl"].min(), []
    for method, each in own.groupby("method", sort=False):
        line: dict[str, object] = {"search": title_of(method), "draws": each["seed"].nunique()}
        for budget, at in each.groupby("budget"):
            name = f"{100 * float(budget):.0f}"
            over = (
                at["search_ppl"].to_numpy()
                / best.loc[list(zip(at["seed"], at["budget"], strict=True))].to_numpy()
            )
            line[f"trials_{name}"] = at["trials_asked"].mean()
            line[f"over_best_{name}"] = math.exp(np.log(over).mean())
            where = {"method": method, "heal": "plain", "calibration": SEARCHED}
            line |= at_size(points, f"at_{name}_x", float(budget), **where)
        lines.append(line)
    return table_of_frame(
        "searches", "Searches on the same rows", pd.DataFrame(lines), SEARCHED_NOTE
    )


SEARCHED_NOTE = (
    "Over best: perplexity on the rows of the search over that of the best mask of this size that"
    " any search here has found on them. At 10 and 20: on the test texts, × dense."
)
