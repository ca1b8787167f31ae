"""The figures of a study, with panels for each model."""

import itertools
from collections.abc import Sequence

import pandas as pd

from blockpruner.core.errors import extra
from blockpruner.reporting import plots
from blockpruner.reporting.paper.curves import FIGURES, Curve
from blockpruner.reporting.paper.frames import COLUMNS
from blockpruner.reporting.paper.published import DENSE
from blockpruner.reporting.paper.tables import measured
from blockpruner.reporting.plots import MANY_MARKS, Plot

with extra("report"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def figures(frame: pd.DataFrame) -> list[Plot]:
    """Draw every figure of which something was measured."""
    known = measured(frame)
    drawn = ((curve, [own for _, own in curve.points(known).groupby("model", sort=False)]) for curve in FIGURES)
    return [_draw(curve, models) for curve, models in drawn if models]


def _draw(curve: Curve, models: Sequence[pd.DataFrame]) -> Plot:
    def fill(figure: Figure) -> None:
        grid = figure.subplots(len(models), len(curve.y), squeeze=False)
        for line, own in zip(grid, models, strict=True):
            for axes, y in zip(line, curve.y, strict=True):
                _lines(curve, y, axes, own)
                axes.set_title(own["model"].iloc[0])

    caption, size = f"{curve.title}. {curve.note}".rstrip(), (max(8.0, 5.0 * len(curve.y)), 4.2 * len(models))
    return plots.render(curve.name, caption, size, fill)


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
