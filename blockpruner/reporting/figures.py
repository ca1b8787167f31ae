"""The plots of the report of targets, each with its caption. Decides what is drawn.

Quality is drawn relative to the dense model, with intervals. No line joins what was measured with noise.
"""

from __future__ import annotations

from collections.abc import Sequence

from blockpruner.core.blocks import Mask, parse_mask
from blockpruner.core.errors import extra
from blockpruner.core.plan import Plan
from blockpruner.reporting import plots
from blockpruner.reporting.comparison import Comparison
from blockpruner.reporting.findings import recommended
from blockpruner.reporting.formats import percent
from blockpruner.reporting.inputs import PrunedOption
from blockpruner.reporting.plots import MARKS, Plot

with extra("report"):
    from matplotlib.figure import Figure

RELATIVE = "perplexity, × dense"
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
    order = [parse_mask(unit) for unit in target.plan.order] if target.plan.nested else []
    return [removed_map(target.name, target.plan, order)]


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
