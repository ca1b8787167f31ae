"""The figures of a study: quality against size and against speed, with panels for each model."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from blockpruner.core.errors import extra
from blockpruner.reporting import plots
from blockpruner.reporting.paper.curves import FIGURES, Curve
from blockpruner.reporting.paper.frames import COLUMNS
from blockpruner.reporting.paper.published import DENSE
from blockpruner.reporting.paper.tables import first_runs, measured
from blockpruner.reporting.plots import MARKS, REMOVED, Plot

with extra("report"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACCURACY, PERPLEXITY = "accuracy, %", "held-out perplexity"
QUALITY_CAPTION = (
    "Held-out perplexity and accuracy (± 1 standard error) against the share of parameters removed. Dotted and hollow: "
    "as pruned; dashed and half filled: compensated; solid and filled: trained after that."
)
SPEED_CAPTION = (
    "Held-out perplexity against the speed of generation, with 95 % intervals; lower and further right is better. The "
    "star is the dense model, numbers are % of the parameters removed."
)
STYLES = ((":", "none"), ("--", "bottom"), ("-", "full"))
"""Line and filling of a marker: as pruned, compensated, trained after that."""
SHAPES = [shape for _, shape in MARKS]
MANY_MARKS = [*MARKS, *((colour, shape) for (colour, _), shape in zip(MARKS, SHAPES[3:] + SHAPES[:3], strict=True))]
"""MARKS, then their colours with other shapes: twice as many methods stay apart."""
LEGEND: dict[str, Any] = {"fontsize": 7.5, "loc": "upper left", "bbox_to_anchor": (1.01, 1.0)}


def figures(frame: pd.DataFrame) -> list[Plot]:
    """Draw every figure of which something was measured."""
    known = measured(frame)
    models = [own for _, own in first_runs(known).groupby("model", sort=False) if (own["recipe"] != DENSE).any()]
    timed = [own for own in models if "generation_x" in own and own["generation_x"].notna().any()]
    found = []
    if models:
        found.append(_draw("quality", QUALITY_CAPTION, models, (_perplexity, _accuracy)))
    if timed:
        found.append(_draw("speed", SPEED_CAPTION, timed, (_speed,)))
    for curve in FIGURES:
        own = [points for _, points in curve.points(known).groupby("model", sort=False)]
        panels = [partial(_lines, curve, y) for y in curve.y]
        found += [_draw(curve.name, f"{curve.title}. {curve.note}".rstrip(), own, panels)] if own else []
    return found


Draw = Callable[[Axes, pd.DataFrame], None]


def _draw(name: str, caption: str, models: Sequence[pd.DataFrame], panels: Sequence[Draw]) -> Plot:
    def fill(figure: Figure) -> None:
        grid = figure.subplots(len(models), len(panels), squeeze=False)
        for line, own in zip(grid, models, strict=True):
            for axes, panel in zip(line, panels, strict=True):
                panel(axes, own)
                axes.set_title(own["model"].iloc[0])

    return plots.render(name, caption, (max(8.0, 5.0 * len(panels)), 4.2 * len(models)), fill)


def _groups(own: pd.DataFrame) -> list[tuple[str, dict[str, Any], pd.DataFrame]]:
    """Give each method and healing of a model its label, its mark and its rows, from the least pruned on."""
    pruned = own[own["recipe"] != DENSE].sort_values("removed_pct")
    marks = dict(zip(dict.fromkeys(pruned["recipe"]), itertools.cycle(MANY_MARKS), strict=False))
    found = []
    for (recipe, healing), group in pruned.groupby(["recipe", "healing"], sort=False):
        (colour, shape), (line, fill) = marks[recipe], STYLES[2 if "training" in healing else bool(healing)]
        style = {"color": colour, "marker": shape, "linestyle": line, "fillstyle": fill, "markersize": 6}
        found.append((group["method"].iloc[0], {**style, "markerfacecoloralt": "none", "linewidth": 1.2}, group))
    return found


def _lines(curve: Curve, y: str, axes: Axes, own: pd.DataFrame) -> None:
    dense = own[own["recipe"] == DENSE]
    lines = own[own["recipe"] != DENSE].groupby(curve.line, sort=False)
    for (label, group), (colour, shape) in zip(lines, itertools.cycle(MANY_MARKS), strict=False):
        line = pd.concat([dense, group]).sort_values(curve.x)
        axes.plot(line[curve.x], line[y], color=colour, marker=shape, label=label)
    if y.endswith("ppl"):
        plots.scale_(axes, own[y].tolist())
    plots.label_(axes, COLUMNS[curve.x].title, COLUMNS[y].title)
    axes.legend()


def _perplexity(axes: Axes, own: pd.DataFrame) -> None:
    dense = own[own["recipe"] == DENSE].iloc[:1]
    for label, style, group in _groups(own):
        line = pd.concat([dense, group])
        axes.plot(line["removed_pct"], line["heldout_ppl"], label=label, **style)
    plots.scale_(axes, own["heldout_ppl"].tolist())
    plots.label_(axes, REMOVED, PERPLEXITY)


def _accuracy(axes: Axes, own: pd.DataFrame) -> None:
    for label, style, group in _groups(own):
        errors = group["avg_pct_se"].replace(np.inf, np.nan)
        points = {**style, "linestyle": "none", "label": label}
        axes.errorbar(group["removed_pct"], group["avg_pct"], errors, capsize=2, **points)
    for _, dense in own[own["recipe"] == DENSE].iloc[:1].iterrows():
        low, high = dense["avg_pct"] - dense["avg_pct_se"], dense["avg_pct"] + dense["avg_pct_se"]
        axes.axhspan(low, high, color=plots.GREY, alpha=0.25, label="dense")
    plots.label_(axes, REMOVED, ACCURACY)
    axes.legend(**LEGEND)


def _speed(axes: Axes, own: pd.DataFrame) -> None:
    plots.star_(axes, 1.0, own[own["recipe"] == DENSE]["heldout_ppl"].iloc[0], "dense")
    for label, style, group in _groups(own[own["generation_x"].notna() | (own["recipe"] == DENSE)]):
        x, y = group["generation_x"], group["heldout_ppl"]
        ends = np.abs(np.array([x - group["generation_x_low"], group["generation_x_high"] - x], float))
        axes.errorbar(x, y, xerr=np.where(np.isfinite(ends), ends, 0), label=label, **{**style, "linestyle": "none"})
        for at, value, removed in zip(x, y, group["removed_pct"], strict=True):
            axes.annotate(f"{removed:.0f}", (at, value), xytext=(4, 4), textcoords="offset points", fontsize=8)
    plots.scale_(axes, own["heldout_ppl"].tolist())
    plots.label_(axes, "generation, × dense", PERPLEXITY)
    axes.legend(**LEGEND)
