"""Whether the mask still matters after healing: masks of one size, before and after."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from blockpruner.core.errors import extra
from blockpruner.reporting import plots
from blockpruner.reporting.answers.curves import CRITICAL, MASKS, PLAIN, REFIT
from blockpruner.reporting.paper.frames import table_of_frame
from blockpruner.reporting.paper.tables import interval
from blockpruner.reporting.plots import MARKS, Plot
from blockpruner.reporting.points import Points
from blockpruner.reporting.statistics import SEED, Effect, Floats, percentiles, two_sided
from blockpruner.reporting.table import Table

with extra("report"):
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator


@dataclass(frozen=True)
class Signal:
    """How far the loss of a mask before healing tells its loss after it: over masks, with intervals
    of a bootstrap."""

    heal: str
    tokens: float
    """Tokens of training, in thousands."""
    before: Floats
    after: Floats
    """Log perplexity over dense, of each mask."""
    refitted: Floats
    """That after a refit alone; NaN where it was not measured."""
    searched: NDArray[np.bool_]
    """Whether a search found it."""

    @property
    def title(self) -> str:
        return f"{REFIT}, then {self.tokens:,.0f} thousand tokens" if self.tokens else self.heal

    def of(self, statistic: Callable[[Floats, Floats], float]) -> Effect:
        chance, count = np.random.default_rng(SEED), len(self.before)
        draws = chance.integers(count, size=(MASK_RESAMPLES, count))
        values = np.array([statistic(self.before[own], self.after[own]) for own in draws])
        return Effect(
            statistic(self.before, self.after), percentiles(values, 0.95), two_sided(values, 0.0)
        )


MASK_RESAMPLES = 2000
SEARCHED_MASK = "searched"
"""So begin the names of masks that a search found."""


def slope(before: Floats, after: Floats) -> float:
    return float(np.polyfit(before, after, 1)[0]) if np.ptp(before) else 0.0


def rank(before: Floats, after: Floats) -> float:
    return (
        float(stats.spearmanr(before, after).statistic) if np.ptp(before) and np.ptp(after) else 0.0
    )


def signals(points: Points) -> list[Signal]:
    """Of every healing of the given masks."""
    own = points.frame[points.frame["calibration"] == MASKS]
    if not len(own):
        return []
    own = own.assign(log=[math.log(points.over(nll - points.dense["nll"])) for nll in own["nll"]])
    wide = own.pivot_table(index="method", columns="heal", values="log", sort=False)
    found = []
    for heal in (heal for heal in wide.columns if heal != PLAIN):
        pair = wide[[PLAIN, heal]].dropna()
        tokens = re.match(r"(\d+)k", heal)
        refitted = wide[REFIT].reindex(pair.index) if REFIT in wide else pair[heal] * math.nan
        logs = pair[PLAIN].to_numpy(), pair[heal].to_numpy(), refitted.to_numpy()
        searched = pair.index.str.startswith(SEARCHED_MASK)
        found.append(Signal(heal, float(tokens[1]) if tokens else 0.0, *logs, searched))
    return sorted(found, key=lambda signal: signal.tokens)


def masks(points: Points) -> Table | None:
    """Whether the mask still matters after healing."""
    lines = []
    for signal in signals(points):
        ends = {"lowest_x": math.exp(signal.after.min()), "highest_x": math.exp(signal.after.max())}
        line = {"healing": signal.title, "masks": len(signal.before), **ends}
        line |= interval("slope", signal.of(slope)) | interval("rank_correlation", signal.of(rank))
        lines.append(
            line
            | ({"rank_with_refit": rank(signal.refitted, signal.after)} if signal.tokens else {})
        )
    return (
        table_of_frame("masks", "Masks of one size after healing", pd.DataFrame(lines), MASKS_NOTE)
        if lines
        else None
    )


def critical(points: Points) -> Table | None:
    """What single blocks are worth: the model without each."""
    own, lines = points.frame[points.frame["calibration"] == CRITICAL], []
    for method, cells in own.groupby("method", sort=False):
        line: dict[str, object] = {"model": method, "removed_pct": 100 * cells["ratio"].iloc[0]}
        for _, cell in cells.iterrows():
            line |= interval(f"{cell['heal']}_x", points.of(cell))
        lines.append(line)
    return table_of_frame("critical", "Single blocks", pd.DataFrame(lines)) if lines else None


MASKS_NOTE = (
    "Slope and rank correlation of log perplexity after healing on that before it, over masks;"
    " brackets: 95 % over resampled masks. A slope of 1: healing leaves every ratio as it was; of"
    " 0: the mask does not matter any more. Rank with refit: rank correlation of log perplexity"
    " with that after the refit alone."
)


def healed_masks(points: Points) -> Plot | None:
    """Perplexity after healing over that before, of every mask."""
    if not (found := signals(points)):
        return None

    def fill(figure: Figure) -> None:
        axes = figure.subplots()
        for signal, (colour, shape) in zip(found, MARKS, strict=False):
            x, y = np.exp(signal.before), np.exp(signal.after)
            style = {"color": colour, "markersize": 4.5, "alpha": 0.8}
            axes.plot(
                x[~signal.searched],
                y[~signal.searched],
                shape,
                **style,
                label=f"{signal.title}: random masks",
            )
            label = f"{signal.title}: found by a search"
            axes.plot(
                x[signal.searched],
                y[signal.searched],
                shape,
                **style,
                markerfacecolor="none",
                label=label,
            )
            line = np.polyfit(signal.before, signal.after, 1)
            ends = np.array([signal.before.min(), signal.before.max()])
            axes.plot(np.exp(ends), np.exp(np.polyval(line, ends)), color=colour, linewidth=1)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:,g}")
            axis.set_minor_formatter("")
        plots.label_(axes, "perplexity without healing, × dense", "after healing, × dense")
        axes.legend(loc="upper left")

    return plots.render("masks", HEALED_CAPTION, (7.5, 4.4), fill)


HEALED_CAPTION = (
    "Each mark is a mask; all remove the same share of the parameters. Lines: least squares of the"
    " logs."
)
