"""The plots of the report of targets, each with its caption. Decides what is drawn.

Quality is drawn relative to the dense model, with intervals. No line joins what was measured with noise; only the
removals of one search, on rows that are the same for all of them, are joined.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from blockpruner.core.blocks import BlockKind, Mask, format_mask, sorted_blocks
from blockpruner.core.errors import extra
from blockpruner.core.plan import Plan
from blockpruner.reporting import plots
from blockpruner.reporting.comparison import SPEED, Comparison
from blockpruner.reporting.findings import jump_at, paired, paired_confidence, recommended
from blockpruner.reporting.formats import number, percent
from blockpruner.reporting.inputs import PrunedOption, ReportedRun
from blockpruner.reporting.plots import BLUE, COLOURS, GREY, MARKS, ORANGE, REMOVED, Plot
from blockpruner.reporting.statistics import Interval
from blockpruner.scoring.metrics import METRICS

with extra("report"):
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle
    from matplotlib.ticker import MaxNLocator

CLIP = (2.0, 98.0)
"""Percentiles at which the heat map's colours end: block 0 alone may cost a thousand times the median."""

FLOORS = {False: 1e-3, True: 1e-5}
"""The lowest colour of the heat map holds everything up to this, by whether the metric is an influence. For losses in
nats per token, gains included. An influence is never below 0, and small ones still rank."""

RELATIVE = "perplexity, × dense"
CURVE_CAPTION = (
    "Perplexity as a multiple of the dense model's. Dots: each removal, on the calibration rows, before any healing. "
    "Rings: targets on the calibration rows. Squares: targets on held-out text, with 95 % intervals of the paired rows."
)
DIFFERENCES_CAPTION = (
    "Scores of the targets minus the dense model's, with 95 % intervals of the paired items. An interval that holds 0 "
    "is within noise."
)
MAP_CAPTION = "The blocks of {}: filled ones are gone"
ORDER_CAPTION = ", and bear the number of their removal."
SET_CAPTION = ". The search chose all of them together, so they have no order."
TRADE_CAPTION = (
    "What pruning buys at which loss of held-out perplexity: lower and further right is better. Bars are 95 % "
    "intervals, labels are the share of the parameters removed. The star is the dense model."
)
RING_CAPTION = " The ring marks the recommended model."


def of_search(target: PrunedOption) -> list[Plot]:
    """Draw which blocks are gone, and what the search of this target saw."""
    if not target.considered:
        return []
    return [_map(target), *([_heat(target)] if any(removal.costs for removal in target.removals) else [])]


def figures(study: ReportedRun) -> list[Plot]:
    """Draw perplexity and scores of one run."""
    most = max(len(study.chance) + 2, 8)
    height = 1.0 + 0.26 * most + 0.07 * most * (len(study.targets) - 1)
    return [
        plots.render(f"{study.run}-{name}", caption, (5.0, height), partial(draw, study=study), wide=False)
        for name, caption, draw in (
            ("perplexity", CURVE_CAPTION, _perplexity),
            ("differences", DIFFERENCES_CAPTION, _differences),
        )
    ]


def trade_off(comparison: Comparison) -> Plot:
    """Draw held-out perplexity against each gain, for all targets of one dense model."""
    targets = comparison.targets
    methods = list(dict.fromkeys(option.recipe for option in targets))
    marks = dict(zip(methods, MARKS * len(methods), strict=False))
    best = recommended(targets)

    def draw(figure: Figure) -> None:
        gains = comparison.gains
        panels = list(figure.subplots(1, len(gains), sharey=True, squeeze=False).flat)
        for axes, gain in zip(panels, gains, strict=True):
            plots.label_(axes, gain.title)
            for option in targets:
                x, ratio = gain.of(option), option.model.perplexity / option.dense.perplexity
                tip = f"{option.name}: perplexity {number(ratio)}× dense, {gain.title} {number(x)}"
                spread = option.race.interval("generation") if gain is SPEED else None
                plots.dot_(axes, x, ratio, *marks[option.recipe], tip, spread, option.heldout_interval)
                label = percent(option.ratio)
                axes.annotate(label, (x, ratio), xytext=(6, 5), textcoords="offset points", fontsize=8)
                if option is best:
                    plots.ring_(axes, x, ratio)
            plots.star_(axes, gain.of(comparison.options[0]), 1)
            axes.margins(x=0.12, y=0.1)
        panels[0].set_ylabel(RELATIVE)
        plots.scale_(panels[0], [1, *(option.model.perplexity / option.dense.perplexity for option in targets)])
        if len(methods) > 1:
            keys = [plots.key(method, *marks[method]) for method in methods]
            figure.legend(handles=keys, loc="outside lower left", ncols=2)

    height = 3.4 + 0.2 * -(-len(methods) // 2)
    caption = TRADE_CAPTION + (RING_CAPTION if best else "")
    return plots.render(f"{comparison.studies[0].run}-pareto", caption, (10.5, height), draw)


def _perplexity(figure: Figure, study: ReportedRun) -> None:
    axes, shown = figure.subplots(), [1.0]
    plots.label_(axes, REMOVED, RELATIVE)
    keys = {}
    for trace, line in zip(study.traces, ("-", "--", "-.", ":") * len(study.traces), strict=False):
        curve = [value / trace.curve[0] for value in trace.curve]
        shown += curve
        label = "calibration" if len(study.traces) == 1 else f"calibration, {trace.name}"
        ratios = [0.0, *(100 * removal.ratio for removal in trace.removals)]
        keys[label] = axes.plot(ratios, curve, line, color=BLUE, linewidth=1.2)[0]
        for i, removal in enumerate(trace.removals, 1):
            tip = f"removal {i}, {format_mask(removal.added)}: {number(curve[i])}× dense on calibration rows"
            plots.dot_(axes, ratios[i], curve[i], BLUE, "o", tip, size=4)
        jump = jump_at(trace)
        if jump is not None:
            keys["last before a jump"] = axes.axvline(ratios[jump], color=GREY, linestyle=":", linewidth=1.5)
    for option in study.targets:
        ratio, rise = option.model.perplexity / option.dense.perplexity, option.calibration_rise
        if not option.removals and rise is not None:
            shown.append(np.exp(rise))
            tip = f"{option.name}: {number(shown[-1])}× dense on calibration rows"
            plots.dot_(axes, 100 * option.ratio, shown[-1], BLUE, "o", tip, fill="none")
            keys["calibration"] = plots.key("", BLUE, "o", fill="none")
        shown.append(ratio)
        tip = f"{option.name}: {number(ratio)}× dense on held-out text"
        plots.dot_(axes, 100 * option.ratio, ratio, ORANGE, "s", tip, None, option.heldout_interval)
    keys["held-out"] = plots.key("", ORANGE, "s")
    plots.star_(axes, 0, 1)
    plots.scale_(axes, shown)
    axes.legend(keys.values(), keys)


def _differences(figure: Figure, study: ReportedRun) -> None:
    """Rows are sorted by the most pruned target."""
    axes = figure.subplots()
    rows = {task: [paired(o.dense, o.model, task) for o in study.targets] for task in study.chance}
    rows = dict(sorted(rows.items(), key=lambda row: row[1][-1].value))
    rows = {"average": [paired(option.dense, option.model) for option in study.targets], **rows}
    if study.dense.model.p_gold:
        rows = {"p of the right answer": [paired_confidence(o.dense, o.model) for o in study.targets], **rows}
    plots.label_(axes, "difference to dense, points")
    axes.axvline(0, color=GREY, linewidth=1.2)
    step = 0.7 / len(study.targets)
    for row, found in enumerate(rows.values()):
        for i, (target, gap) in enumerate(zip(study.targets, found, strict=True)):
            colour, shape = MARKS[i % len(MARKS)]
            interval = Interval(100 * gap.interval.low, 100 * gap.interval.high)
            tip = f"{target.name}, {list(rows)[row]}: {100 * gap.value:+.1f} points"
            y = row + (i - (len(found) - 1) / 2) * step
            plots.dot_(axes, 100 * gap.value, y, colour, shape, tip, interval, size=5)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    if len(study.targets) > 1:
        keys = [plots.key(o.name, *MARKS[i % len(MARKS)]) for i, o in enumerate(study.targets)]
        figure.legend(handles=keys, loc="outside lower left", ncols=2)


def removed_map(name: str, plan: Plan, order: Sequence[Mask]) -> Plot:
    """Draw which blocks a plan removes, with the removals in order where they have one."""
    caption = MAP_CAPTION.format(name) + (ORDER_CAPTION if order else SET_CAPTION)
    size = (max(10.2, 0.29 * plan.layers + 1.5), 1.45)
    return plots.render(
        f"{name}-map", caption, size, lambda figure: plots.block_map(figure, plan.layers, plan.mask, order)
    )


def _map(target: PrunedOption) -> Plot:
    return removed_map(target.name, target.plan, [removal.added for removal in target.removals])


def _heat_caption(trace: PrunedOption, ranking: bool) -> str:
    metric = METRICS[trace.plan.metric]
    name, unit = metric.cost_title, metric.units_text
    where = "in the dense model" if ranking else "in what earlier removals left"
    if metric.influence:
        what = f"{name} of each candidate {where} ({unit})"
    else:
        what = f"What each candidate would have cost {where}: {name} on the calibration rows ({unit})"
    how = (
        "This one ranking decided all removals, which are outlined."
        if ranking
        else "Outlined: the block chosen; hatched: already removed."
    )
    empty = " Empty: left out early, not scored on all rows." if any(r.partial for r in trace.removals) else ""
    firm = (
        " On the right: the block removed, and the share of resampled calibration rows that choose it, too."
        if not ranking and any(r.stability for r in trace.removals)
        else ""
    )
    return f"{what}, on a logarithmic scale. {how}{empty}{firm}"


def _heat(trace: PrunedOption) -> Plot:
    scored = [removal for removal in trace.removals if removal.costs]
    ranking = len(scored) < len(trace.removals)
    removed = (trace.plan.mask,) if ranking else tuple(removal.added for removal in scored)
    units = [unit for removal in scored for unit in removal.costs]
    titles = {BlockKind.MHA: "attention (MHA)", BlockKind.MLP: "feed-forward (MLP)"}
    kinds = [kind for kind in BlockKind if any(block.kind is kind for unit in units for block in unit)]
    layers = all(len(unit) > 1 for unit in units)
    shown = {"whole layers": BlockKind.MHA} if layers else {titles[kind]: kind for kind in kinds}
    metric = METRICS[trace.plan.metric]
    costs = np.array([cost for removal in scored for cost in removal.costs.values()])
    low = max(FLOORS[metric.influence], float(np.percentile(costs, CLIP[0])))
    norm = LogNorm(low, max(float(np.percentile(costs, CLIP[1])), 2 * low), clip=True)

    def draw(figure: Figure) -> None:
        panels = list(figure.subplots(1, len(shown), sharey=True, squeeze=False).flat)
        for axes, (title, kind) in zip(panels, shown.items(), strict=True):
            axes.set_title(title)
            _cells(axes, [removal.costs for removal in scored], removed, kind, norm)
            axes.set_xlim(-0.5, trace.plan.layers - 0.5)
            axes.set_xlabel("layer")
            axes.xaxis.set_major_locator(MaxNLocator(min(trace.plan.layers, 8), integer=True))
            axes.spines[:].set_visible(False)
        panels[0].set_ylim(len(scored) + 0.5, 0.5)
        if ranking:
            panels[0].set_yticks([])
        else:
            panels[0].set_ylabel("removal")
            panels[0].yaxis.set_major_locator(MaxNLocator(min(len(scored), 12), integer=True, min_n_ticks=1))
            for i, r in enumerate(scored, 1):
                text = format_mask(r.added) + (f"  {percent(r.stability.kept, 0)}" if r.stability else "")
                panels[-1].text(trace.plan.layers - 0.2, i, text, va="center", fontsize=8)
        colours = ScalarMappable(norm, COLOURS)
        bar = figure.colorbar(colours, ax=panels, extend="both", aspect=18, pad=0.015, fraction=0.03)
        bar.set_label(f"{metric.cost_title}\n{metric.units_text}")
        steps = (1, 2, 5) if norm.vmax < 300 * low else (1,)
        ticks = [t * 10.0**e for e in range(-5, 4) for t in steps if low <= t * 10.0**e <= norm.vmax]
        bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        bar.minorticks_off()
        keys = [Patch(facecolor="none", edgecolor=ORANGE, linewidth=1.6, label="removed" if ranking else "chosen")]
        if not ranking:
            keys.append(Patch(facecolor="none", edgecolor=GREY, hatch="/////", linewidth=0, label="already removed"))
        figure.legend(handles=keys, loc="outside upper left", ncols=2)

    size = (max(10.2, 0.155 * trace.plan.layers * len(shown) + 2.6), 1.75 + 0.21 * len(scored))
    return plots.render(f"{trace.name}-heat", _heat_caption(trace, ranking), size, draw)


def _cells(
    axes: Axes, rows: list[Mapping[Mask, float]], removed: tuple[Mask, ...], kind: BlockKind, norm: LogNorm
) -> None:
    """Draw the costs of blocks of one kind, a row each iteration, and outline what was removed."""
    colour = colormaps[COLOURS]

    def box(block_layer: int, top: float, height: float, **style: object) -> Rectangle:
        return axes.add_patch(Rectangle((block_layer - 0.5, top), 1, height, **style))

    for i, row in enumerate(rows, 1):
        for unit, cost in row.items():
            for block in (block for block in sorted_blocks(unit) if block.kind is kind):
                cell = box(block.layer, i - 0.5, 1, facecolor=colour(norm(cost)), edgecolor="none")
                plots.tip_(cell, f"removal {i}: {format_mask(unit)} {cost:.4g}")
    for i, block in ((i, block) for i, unit in enumerate(removed, 1) for block in sorted_blocks(unit)):
        if block.kind is kind:
            if i < len(rows):
                box(block.layer, i + 0.5, len(rows) - i, facecolor="none", edgecolor=GREY, hatch="/////", linewidth=0)
            box(block.layer, i - 0.5, 1, facecolor="none", edgecolor=ORANGE, linewidth=2, zorder=3)
