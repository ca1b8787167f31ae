"""What searches find on the same rows, and where one ends from many starts."""

import math

import numpy as np
import pandas as pd

from blockpruner.reporting.answers.curves import SEARCHED, STARTS, at_size, title_of
from blockpruner.reporting.paper.frames import table_of_frame
from blockpruner.reporting.points import Points
from blockpruner.reporting.table import Table


def searched(points: Points) -> Table | None:
    """What searches find on the same rows, and what that is worth on the test texts."""
    own = points.frame[points.frame["calibration"] == SEARCHED]
    if not len(own):
        return None
    every = points.frame[points.frame["calibration"].isin((SEARCHED, STARTS))]
    best, lines = every.groupby(["seed", "budget"])["search_ppl"].min(), []
    for method, each in own.groupby("method", sort=False):
        line: dict[str, object] = {"search": title_of(method), "draws": each["seed"].nunique()}
        for budget, at in each.groupby("budget"):
            name = f"{100 * float(budget):.0f}"
            over = at["search_ppl"].to_numpy() / best.loc[list(zip(at["seed"], at["budget"], strict=True))].to_numpy()
            line[f"trials_{name}"] = at["trials_asked"].mean()
            line[f"over_best_{name}"] = math.exp(np.log(over).mean())
            where = {"method": method, "heal": "plain", "calibration": SEARCHED}
            line |= at_size(points, f"at_{name}_x", float(budget), **where)
        lines.append(line)
    return table_of_frame("searches", "Searches on the same rows", pd.DataFrame(lines), SEARCHED_NOTE)


SEARCHED_NOTE = (
    "Over best: perplexity on the rows of the search over that of the best mask of this size that any search here has "
    "found on them. At 10 and 20: on the test texts, × dense."
)


def starts(points: Points) -> Table | None:
    """Where one search ends from many random starts."""
    own = points.frame[points.frame["calibration"] == STARTS].sort_values("search_ppl")
    if not len(own):
        return None
    others = points.frame[(points.frame["calibration"] == SEARCHED) & points.frame["seed"].isin(own["seed"])]
    others = others[others["budget"].isin(own["budget"])]
    found, rises = own["search_ppl"].to_numpy(), np.stack(own["nll"]) - points.dense["nll"]
    heldout = [points.over(rise) for rise in rises]
    line = {"starts": len(own), "masks": own["plan"].nunique()}
    line |= {"within_2_pct": int((found <= 1.02 * found[0]).sum())}
    line |= {"median_over_best": np.median(found) / found[0], "worst_over_best": found[-1] / found[0]}
    line |= {"other_searches_over_best": others["search_ppl"].min() / found[0]} if len(others) else {}
    line |= {"lowest_x": min(heldout), "highest_x": max(heldout), "lowest_on_search_rows_x": heldout[0]}
    title = f"One search from {len(own)} starts, {float(own['budget'].iloc[0]):.0%} removed"
    return table_of_frame("starts", title, pd.DataFrame([line]), STARTS_NOTE)


STARTS_NOTE = "Over best: perplexity on the rows of the search over that of the best start; × dense: on the test texts."
