"""The plots of the report of targets, each with its caption. Decides what is drawn.

Quality is drawn relative to the dense model, with intervals. No line joins what was measured with noise; only the
removals of one search, on rows that are the same for all of them, are joined.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from blockpruner.core.blocks import Mask
from blockpruner.core.errors import extra
from blockpruner.core.plan import Plan
from blockpruner.reporting import plots
from blockpruner.reporting.comparison import Comparison
from blockpruner.reporting.findings import jump_at, recommended
from blockpruner.reporting.formats import percent
from blockpruner.reporting.inputs import PrunedOption, ReportedRun
from blockpruner.reporting.plots import BLUE, GREY, MARKS, ORANGE, REMOVED, Plot

with extra("report"):
    from matplotlib.figure import Figure

RELATIVE = "perplexity, × dense"
CURVE_CAPTION = (
    "Perplexity as a multiple of the dense model's. Dots: each removal, on the calibration rows, before any healing. "
    "Rings: targets on the calibration rows. Squares: targets on held-out text, with 95 % intervals of the paired rows."
)
MAP_CAPTION = "The blocks of {}: filled ones are gone"
ORDER_CAPTION = ", and bear the number of their removal."
SET_CAPTION = ". The search chose all of them together, so they have no order."
TRADE_CAPTION = (
    "What pruning buys at which loss of held-out perplexity: lower and further right is better. Bars are 95 % "
    "intervals, labels are the share of the parameters removed. The star is the dense model."
)
RING_CAPTION = " The ring marks the recommended model."


def removed_map(name: str, plan: Plan, order: Sequence[Mask]) -> Plot:
    """Draw which blocks a plan removes, with the removals in order where they have one."""
    caption = MAP_CAPTION.format(name) + (ORDER_CAPTION if order else SET_CAPTION)
    size = (max(10.2, 0.29 * plan.layers + 1.5), 1.45)
    return plots.render(
        f"{name}-map", caption, size, lambda figure: plots.block_map(figure, plan.layers, plan.mask, order)
    )


def map_of(target: PrunedOption) -> list[Plot]:
    """Draw which blocks of a target are gone; nothing where it removes none as a whole."""
    if not target.plan.removed:
        return []
    return [removed_map(target.name, target.plan, [removal.added for removal in target.removals])]


def trade_off(comparison: Comparison) -> Plot:
    """Draw held-out perplexity against speed, for all targets of one dense model; against size if nothing is timed."""
    targets, gain = comparison.targets, comparison.gain
    methods = list(dict.fromkeys(option.recipe for option in targets))
    marks = dict(zip(methods, MARKS * len(methods), strict=False))
    best = recommended(targets)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        plots.label_(axes, gain.title, RELATIVE)
        for option in targets:
            x, ratio = gain.of(option), option.model.perplexity / option.dense.perplexity
            spread = option.race.interval("generation") if option.is_timed else None
            plots.dot_(axes, x, ratio, *marks[option.recipe], spread, option.heldout_interval)
            label = percent(option.ratio)
            axes.annotate(label, (x, ratio), xytext=(6, 5), textcoords="offset points", fontsize=8)
            if option is best:
                plots.ring_(axes, x, ratio)
        plots.star_(axes, gain.of(comparison.options[0]), 1)
        axes.margins(x=0.12, y=0.1)
        plots.scale_(axes, [1, *(option.model.perplexity / option.dense.perplexity for option in targets)])
        if len(methods) > 1:
            keys = [plots.key(method, *marks[method]) for method in methods]
            figure.legend(handles=keys, loc="outside lower left", ncols=2)

    height = 3.4 + 0.2 * -(-len(methods) // 2)
    caption = TRADE_CAPTION + (RING_CAPTION if best else "")
    return plots.render(f"{comparison.runs[0].run}-pareto", caption, (7.0, height), draw)


def quality(reported: ReportedRun) -> Plot:
    """Draw perplexity against the share of parameters removed, of one run."""

    def draw(figure: Figure) -> None:
        axes, shown = figure.subplots(), [1.0]
        plots.label_(axes, REMOVED, RELATIVE)
        keys = {}
        for trace, line in zip(reported.traces, ("-", "--", "-.", ":") * len(reported.traces), strict=False):
            curve = [value / trace.curve[0] for value in trace.curve]
            shown += curve
            label = "calibration" if len(reported.traces) == 1 else f"calibration, {trace.name}"
            ratios = [0.0, *(100 * removal.ratio for removal in trace.removals)]
            keys[label] = axes.plot(ratios, curve, line, color=BLUE, linewidth=1.2, marker="o", markersize=4)[0]
            jump = jump_at(trace)
            if jump is not None:
                keys["last before a jump"] = axes.axvline(ratios[jump], color=GREY, linestyle=":", linewidth=1.5)
        for option in reported.targets:
            ratio, rise = option.model.perplexity / option.dense.perplexity, option.calibration_rise
            if not option.removals and rise is not None:
                shown.append(np.exp(rise))
                plots.dot_(axes, 100 * option.ratio, shown[-1], BLUE, "o", fill="none")
                keys["calibration"] = plots.key("", BLUE, "o", fill="none")
            shown.append(ratio)
            plots.dot_(axes, 100 * option.ratio, ratio, ORANGE, "s", None, option.heldout_interval)
        keys["held-out"] = plots.key("", ORANGE, "s")
        plots.star_(axes, 0, 1)
        plots.scale_(axes, shown)
        axes.legend(keys.values(), keys)

    return plots.render(f"{reported.run}-perplexity", CURVE_CAPTION, (5.0, 3.6), draw, wide=False)
