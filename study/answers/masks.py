"""Whether the mask still matters after healing: masks of one size, before and after."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from blockpruner.core.errors import extra
from blockpruner.reporting import plots
from blockpruner.reporting.frames import interval, table_of_lines
from blockpruner.reporting.plots import MARKS, Plot
from blockpruner.reporting.statistics import SEED, Effect, Floats, percentiles, two_sided
from blockpruner.reporting.table import Table
from study.answers.curves import CRITICAL, MASKS, PLAIN, REFIT
from study.points import Points

with extra("report"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator


MASK_RESAMPLES = 2000
SEARCHED_MASK = "searched"
"""So begin the names of masks that a search found."""

MASKS_NOTE = (
    "Slope and rank correlation of log perplexity after healing on that before it, over masks;"
    " brackets: 95 % over resampled masks. A slope of 1: healing leaves every ratio as it was; of"
    " 0: the mask does not matter any more. Rank with refit: rank correlation of log perplexity"
    " with that after the refit alone."
)
HEALED_CAPTION = (
    "Each mark is a mask; all remove the same share of the parameters. Lines: least squares of the"
    " logs."
)


@dataclass(frozen=True)
class Signal:
    """How far the loss of a mask before healing tells its loss after it: over masks, with intervals
    of a bootstrap."""

    heal: str
    tokens: float
    """Tokens of training, in thousands."""
    plain: Floats
    healed: Floats
    """Log perplexity over dense, of each mask."""
    refitted: Floats
    """That after a refit alone; NaN where it was not measured."""
    searched: NDArray[np.bool_]
    """Whether a search found it."""

    @property
    def title(self) -> str:
        return f"{REFIT}, then {self.tokens:,.0f} thousand tokens" if self.tokens else self.heal

    def effect(self, statistic: Callable[[Floats, Floats], float]) -> Effect:
        """A statistic of the losses before and after healing, by a bootstrap over masks."""
        rng = np.random.default_rng(SEED)
        count = len(self.plain)
        samples = rng.integers(count, size=(MASK_RESAMPLES, count))
        values = [statistic(self.plain[rows], self.healed[rows]) for rows in samples]
        draws = np.array(values)
        value = statistic(self.plain, self.healed)
        return Effect(value, percentiles(draws, 0.95), two_sided(draws, 0.0))


def slope(x: Floats, y: Floats) -> float:
    # Masks of one loss have no line.
    return float(np.polyfit(x, y, 1)[0]) if np.ptp(x) else 0.0


def rank(x: Floats, y: Floats) -> float:
    if not np.ptp(x) or not np.ptp(y):
        return 0.0
    return float(stats.spearmanr(x, y).statistic)


def signals(points: Points) -> list[Signal]:
    """List those of every healing of the given masks, the least trained first."""
    frame = points.frame[points.frame["calibration"] == MASKS]
    if frame.empty:
        return []
    logs = [math.log(ratio) for ratio in points.ratios(frame)]
    frame = frame.assign(log=logs)
    by_heal = frame.pivot_table(index="method", columns="heal", values="log", sort=False)
    healings = []
    for heal in by_heal.columns.drop(PLAIN):
        both = by_heal[[PLAIN, heal]].dropna()
        tokens = re.match(r"(\d+)k", heal)
        refitted = np.full(len(both), math.nan)
        if REFIT in by_heal:
            refitted = by_heal[REFIT].reindex(both.index).to_numpy()
        signal = Signal(
            heal=heal,
            tokens=float(tokens[1]) if tokens else 0.0,
            plain=both[PLAIN].to_numpy(),
            healed=both[heal].to_numpy(),
            refitted=refitted,
            searched=both.index.str.startswith(SEARCHED_MASK),
        )
        healings.append(signal)
    return sorted(healings, key=lambda signal: signal.tokens)


def masks(points: Points) -> Table | None:
    """Whether the mask still matters after healing."""
    lines = []
    for signal in signals(points):
        line = {
            "healing": signal.title,
            "masks": len(signal.plain),
            "lowest_x": math.exp(signal.healed.min()),
            "highest_x": math.exp(signal.healed.max()),
        }
        line |= interval("slope", signal.effect(slope))
        line |= interval("rank_correlation", signal.effect(rank))
        if signal.tokens:
            line["rank_with_refit"] = rank(signal.refitted, signal.healed)
        lines.append(line)
    return table_of_lines("masks", "Masks of one size after healing", lines, MASKS_NOTE)


def critical(points: Points) -> Table | None:
    """What single blocks are worth: the model without each."""
    lines = []
    frame = points.frame[points.frame["calibration"] == CRITICAL]
    for method, models in frame.groupby("method", sort=False):
        removed = 100 * models["ratio"].iloc[0]
        line: dict[str, object] = {"model": method, "removed_pct": removed}
        for _, model in models.iterrows():
            line |= interval(f"{model['heal']}_x", points.of(model))
        lines.append(line)
    return table_of_lines("critical", "Single blocks", lines)


def healed_masks(points: Points) -> Plot | None:
    """Perplexity after healing over that before, of every mask."""
    healings = signals(points)
    if not healings:
        return None

    def fill(figure: Figure) -> None:
        axes = figure.subplots()
        for signal, (colour, shape) in zip(healings, MARKS, strict=False):
            _draw_signal(axes, signal, colour, shape)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:,g}")
            axis.set_minor_formatter("")
        plots.label_(axes, "perplexity without healing, × dense", "after healing, × dense")
        axes.legend(loc="upper left")

    return plots.render("masks", HEALED_CAPTION, (7.5, 4.4), fill)


def _draw_signal(axes: Axes, signal: Signal, colour: str, shape: str) -> None:
    x, y = np.exp(signal.plain), np.exp(signal.healed)
    style: dict[str, Any] = {"color": colour, "markersize": 4.5, "alpha": 0.8}
    style["label"] = f"{signal.title}: random masks"
    random = ~signal.searched
    axes.plot(x[random], y[random], shape, **style)
    style["label"] = f"{signal.title}: found by a search"
    searched = signal.searched
    axes.plot(x[searched], y[searched], shape, **style, markerfacecolor="none")
    line = np.polyfit(signal.plain, signal.healed, 1)
    ends = np.array([signal.plain.min(), signal.plain.max()])
    fitted = np.polyval(line, ends)
    axes.plot(np.exp(ends), np.exp(fitted), color=colour, linewidth=1)
