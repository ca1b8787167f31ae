"""The plots of the report of targets, each with its caption. Decides what is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from blockpruner.core.blocks import BlockKind, Mask, sorted_blocks
from blockpruner.core.errors import extra
from blockpruner.core.plan import Plan
from blockpruner.reporting import plots
from blockpruner.reporting.comparison import Comparison, Gain
from blockpruner.reporting.findings import jump_at, recommended
from blockpruner.reporting.inputs import PrunedOption, ReportedRun
from blockpruner.reporting.plots import BLUE, COLOURS, GREY, MARKS, ORANGE, REMOVED, Plot
from blockpruner.reporting.results import Option
from blockpruner.scoring.metrics import METRICS

with extra("report"):
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.colors import LogNorm, to_rgba
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch, Rectangle
    from matplotlib.ticker import MaxNLocator

CLIP = (2.0, 98.0)
"""Percentiles at which the heat map's colours end: block 0 alone may cost a thousand times the median."""

FLOORS = {False: 1e-3, True: 1e-5}
"""The lowest colour of the heat map holds everything up to this, by whether the metric is an influence. For losses in
nats per token, gains included. An influence is never below 0, and small ones still rank."""

CURVE_CAPTION = (
    "Perplexity against the share of parameters removed. Each dot is one removal, on the calibration rows; squares are "
    "the dense model and the targets on held-out text."
)
SINGLE_CAPTION = (
    "Perplexity against the share of parameters removed. Rings are the targets on the calibration rows, squares the "
    "dense model and the targets on held-out text."
)
HELDOUT_CAPTION = "Held-out perplexity of the dense model and the targets against the share of parameters removed."
ACCURACY_CAPTION = "Average zero-shot accuracy of the dense model and the targets, ± 1 standard error."
SPEED_CAPTION = (
    "What speed costs: held-out perplexity against generation speed-up, measured in turns with the dense model. The "
    "ring marks the recommended stopping point."
)
TASKS_CAPTION = "Accuracy by task, ± 1 standard error. The dashed line is what guessing scores."
STABILITY_CAPTION = (
    "How firmly the calibration rows decide each removal of {}. Left: the share of resampled row sets in which the "
    "same candidate is the best; below 50 % (dashed) another choice is as likely. Right: how many candidates were "
    "compared on the same rows, and how many of them the rows cannot tell from the one removed (paired t test, 95 %). "
    "{}"
)
ORDER_CAPTION = "Which blocks are gone in {}, and in which order: each removed block carries the number of its removal."
MAP_CAPTION = "Which blocks are gone in {}. The search chose all of them together, so they have no order."
PARETO_CAPTION = (
    "What pruning buys at which loss: lower and further right is better. The line joins the models that no other "
    "betters in both; the numbers are their rows in the upper table. Colour and shape: the method; the "
    "stronger the fill, the more of the removed blocks are attention (hollow: none). The star is the dense model."
)


def figures(study: ReportedRun) -> list[Plot]:
    """Draw all plots of one run, curves first."""
    known = study.dense.calibration_perplexity is not None
    curve = CURVE_CAPTION if study.traces else SINGLE_CAPTION if known else HELDOUT_CAPTION
    small, rows = (4.3, 3.3), -(-len(study.chance) // 5)
    drawn = [
        plots.render(f"{study.run}-{name}", caption, size, partial(draw, study=study), wide=size != small)
        for name, caption, size, draw in (
            ("perplexity", curve, small, _perplexity),
            ("accuracy", ACCURACY_CAPTION, small, _accuracy),
            ("speed", SPEED_CAPTION, small, _speed),
            ("tasks", TASKS_CAPTION, (10.5, 2.5 * rows), _tasks),
        )
        if study.dense.is_timed or draw is not _speed
    ]
    drawn += [_map(target) for target in study.traces]
    drawn += [_map(target) for target in study.targets if target.considered and not target.removals]
    for trace in study.traces:
        if any(removal.stability for removal in trace.removals):
            drawn.append(_stability(trace))
        if any(removal.costs for removal in trace.removals):
            drawn.append(_heat(trace))
    return drawn


def pareto_plot(comparison: Comparison) -> Plot:
    """Draw held-out perplexity against each gain, for all targets of one dense model."""
    dense, *targets = comparison.options
    methods = list(dict.fromkeys(option.recipe for option in targets))
    marks = dict(zip(methods, MARKS * len(methods), strict=False))

    def draw(figure: Figure) -> None:
        gains = comparison.gains
        panels = list(figure.subplots(1, len(gains), sharey=True, squeeze=False).flat)
        for axes, gain in zip(panels, gains, strict=True):
            plots.label_(axes, gain.title)
            _front(axes, comparison, gain)
            for option in targets:
                colour, shape = marks[option.recipe]
                axes.plot(
                    gain.of(option), option.model.perplexity, shape, markersize=8, markeredgecolor=colour,
                    markeredgewidth=1.4, markerfacecolor=to_rgba(colour, _attention(option)),
                )  # fmt: skip
            plots.star_(axes, gain.of(dense), dense.model.perplexity)
            axes.margins(x=0.08, y=0.1)
        panels[0].set_ylabel("held-out perplexity")
        plots.log_(panels[0], [option.model.perplexity for option in comparison.options])
        keys = [
            Line2D([], [], linestyle="none", marker=shape, color=colour, markersize=7, label=method)
            for method, (colour, shape) in marks.items()
        ]
        figure.legend(handles=keys, loc="outside lower left", ncols=2)

    height = 3.7 + 0.2 * -(-len(methods) // 2)
    return plots.render(f"{comparison.studies[0].run}-pareto", PARETO_CAPTION, (10.5, height), draw)


def _front(axes: Axes, comparison: Comparison, gain: Gain) -> None:
    front = comparison.front(gain)
    x, y = [gain.of(option) for option in front], [option.model.perplexity for option in front]
    axes.plot(x, y, color=GREY, linewidth=1.2, zorder=1)
    if gain is comparison.gains[0]:  # below and right of a member is free: what lay there would be better
        for number, place in enumerate(zip(x, y, strict=True), 1):
            axes.annotate(str(number), place, xytext=(5, -11), textcoords="offset points", fontsize=8.5)


def _attention(option: Option) -> float:
    """Compute the share of MHA among the removed blocks; it is 0 where none is removed."""
    return option.blocks[BlockKind.MHA] / (sum(option.blocks.values()) or 1)


def _percents(options: Sequence[Option]) -> list[float]:
    return [100 * option.ratio for option in options]


def _perplexity(figure: Figure, study: ReportedRun) -> None:
    axes, traces = figure.subplots(), study.traces
    plots.label_(axes, REMOVED, "perplexity")
    heldout = [option.model.perplexity for option in study.options]
    shown = list(heldout)
    for trace, line in zip(traces, ("-", "--", "-.", ":") * len(traces), strict=False):
        shown += trace.curve
        label = "calibration" if len(traces) == 1 else f"calibration, {trace.name}"
        ratios = [0.0, *(100 * r.ratio for r in trace.removals)]
        axes.plot(ratios, trace.curve, line, color=BLUE, marker="o", markersize=4, linewidth=1.4, label=label)
        jump = jump_at(trace)
        if jump is not None:
            axes.axvline(ratios[jump], color=GREY, linestyle=":", linewidth=1.5, label="last before a jump")
    single = [o for o in study.options if not isinstance(o, PrunedOption) or not o.removals]
    points = [(100 * o.ratio, value) for o in single if (value := o.calibration_perplexity) is not None]
    if any(option.plan and option.calibration_perplexity is not None for option in single):
        x, y = zip(*points, strict=True)
        shown += y
        axes.plot(x, y, "o", color=BLUE, markersize=6.5, markerfacecolor="none", label="calibration")
    axes.plot(_percents(study.options), heldout, "s", color=ORANGE, markersize=6.5, label="held-out")
    plots.scale_(axes, shown)
    axes.legend(loc="best")


def _accuracy(figure: Figure, study: ReportedRun) -> None:
    axes = figure.subplots()
    plots.label_(axes, REMOVED, "average accuracy, %")
    plots.accuracy_(axes, _percents(study.options), [option.model.average for option in study.options], BLUE, "o")


def _tasks(figure: Figure, study: ReportedRun) -> None:
    rows = -(-len(study.chance) // 5)
    panels = list(figure.subplots(rows, min(len(study.chance), 5), sharex=True, sharey=True, squeeze=False).flat)
    for axes, (task, chance) in zip(panels, study.chance.items(), strict=False):
        plots.grid_(axes)
        axes.set_title(task)
        axes.axhline(100 * chance, color=GREY, linestyle="--", linewidth=1.2)
        plots.accuracy_(
            axes, _percents(study.options), [option.model.tasks[task] for option in study.options], BLUE, "o"
        )
    for axes in panels[len(study.chance) :]:
        axes.set_visible(False)
    figure.supxlabel(REMOVED, fontsize=9.5)
    figure.supylabel("accuracy, %", fontsize=9.5)


def _speed(figure: Figure, study: ReportedRun) -> None:
    axes, best = figure.subplots(), recommended(study.targets)
    plots.label_(axes, "generation speed-up, ×", "held-out perplexity")
    speeds = [option.speedup for option in study.options]
    losses = [option.model.perplexity for option in study.options]
    axes.plot(speeds, losses, color=GREY, linewidth=1, zorder=1)
    axes.plot(speeds, losses, "o", color=BLUE, markersize=6)
    names = ["dense", *(f"{100 * target.ratio:.1f} %" for target in study.targets)]
    for i, (name, x, y) in enumerate(zip(names, speeds, losses, strict=True)):
        offset = (0, -17 if i % 2 else 9)
        axes.annotate(name, (x, y), xytext=offset, textcoords="offset points", ha="center", fontsize=8.5)
    plots.scale_(axes, losses)
    if best is not None:
        plots.ring_(axes, best.speedup, best.model.perplexity)
    axes.margins(x=0.14, y=0.16)


def removed_map(name: str, plan: Plan, order: Sequence[Mask]) -> Plot:
    """Draw which blocks a plan removes, with the removals in order where they have one."""
    caption, size = (ORDER_CAPTION if order else MAP_CAPTION).format(name), (max(10.2, 0.29 * plan.layers + 1.5), 1.75)
    return plots.render(
        f"{name}-map", caption, size, lambda figure: plots.block_map(figure, plan.layers, plan.mask, order)
    )


def _map(target: PrunedOption) -> Plot:
    return removed_map(target.name, target.plan, [removal.added for removal in target.removals])


def _stability(trace: PrunedOption) -> Plot:
    found = [(i, r.stability) for i, r in enumerate(trace.removals, 1) if r.stability]
    steps = [i for i, _ in found]
    unsure = sum(stability.kept < 0.5 for _, stability in found)
    result = f"{unsure} of {len(found)} removals are kept in fewer than half of them."

    def draw(figure: Figure) -> None:
        share, count = figure.subplots(1, 2)
        plots.label_(share, "removal", "same choice, %")
        share.axhline(50, color=GREY, linestyle="--", linewidth=1.2)
        share.plot(steps, [100 * stability.kept for _, stability in found], color=BLUE, marker="o", markersize=5)
        share.set_ylim(0, 104)
        plots.label_(count, "removal", "candidates")
        count.bar(steps, [s.compared for _, s in found], color="none", edgecolor=GREY, linewidth=0.8, label="compared")
        count.bar(steps, [len(s.rivals) for _, s in found], color=ORANGE, label="rivals of the one removed")
        for axes in (share, count):
            axes.xaxis.set_major_locator(MaxNLocator(12, integer=True, min_n_ticks=1))
        figure.legend(loc="outside lower right", ncols=2)

    return plots.render(f"{trace.name}-stability", STABILITY_CAPTION.format(trace.name, result), (10.2, 3.0), draw)


@dataclass(frozen=True)
class _Scores:
    """What a heat map shows of a search."""

    rows: tuple[Mapping[Mask, float], ...]
    """The costs of each scored iteration."""
    removed: tuple[Mask, ...]
    """For each of them the blocks outlined."""
    panels: Mapping[str, BlockKind]
    """Titles, and which blocks are in them."""
    floor: float
    """The lowest cost shown."""
    ranking: bool
    """Whether one row decided all removals."""


def _scores(trace: PrunedOption) -> _Scores:
    scored = [removal for removal in trace.removals if removal.costs]
    ranking = len(scored) < len(trace.removals)
    units = [unit for removal in scored for unit in removal.costs]
    titles = {BlockKind.MHA: "attention (MHA)", BlockKind.MLP: "feed-forward (MLP)"}
    kinds = [kind for kind in BlockKind if any(block.kind is kind for unit in units for block in unit)]
    layers = all(len(unit) > 1 for unit in units)
    return _Scores(
        rows=tuple(removal.costs for removal in scored),
        removed=(trace.plan.mask,) if ranking else tuple(removal.added for removal in scored),
        panels={"whole layers": BlockKind.MHA} if layers else {titles[kind]: kind for kind in kinds},
        floor=FLOORS[METRICS[trace.plan.metric].influence],
        ranking=ranking,
    )


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
    return f"{what}, on a logarithmic scale. {how}{empty}"


def _heat(trace: PrunedOption) -> Plot:
    scores, layers = _scores(trace), trace.plan.layers
    costs = np.array([cost for row in scores.rows for cost in row.values()])
    low = max(scores.floor, float(np.percentile(costs, CLIP[0])))
    high = max(float(np.percentile(costs, CLIP[1])), 2 * low)

    def draw(figure: Figure) -> None:
        panels = list(figure.subplots(1, len(scores.panels), sharey=True, squeeze=False).flat)
        for axes, (title, kind) in zip(panels, scores.panels.items(), strict=True):
            mesh = _heat_panel(axes, layers, scores, kind, LogNorm(low, high, clip=True))
            axes.set_title(title)
        panels[0].set_ylim(len(scores.rows) + 0.5, 0.5)
        if scores.ranking:
            panels[0].set_yticks([])
        else:
            panels[0].set_ylabel("removal")
            panels[0].yaxis.set_major_locator(MaxNLocator(min(len(scores.rows), 12), integer=True, min_n_ticks=1))
        bar = figure.colorbar(mesh, ax=panels, extend="both", aspect=18, pad=0.015, fraction=0.03)
        bar.set_label(f"{METRICS[trace.plan.metric].cost_title}\n{METRICS[trace.plan.metric].units_text}")
        steps = (1, 2, 5) if high < 300 * low else (1,)
        ticks = [t * 10.0**e for e in range(-5, 4) for t in steps if low <= t * 10.0**e <= high]
        bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        bar.minorticks_off()
        chosen = "removed" if scores.ranking else "chosen"
        keys = [Patch(facecolor="none", edgecolor=ORANGE, linewidth=1.6, label=chosen)]
        if not scores.ranking:
            keys.append(Patch(facecolor="none", edgecolor=GREY, hatch="/////", linewidth=0, label="already removed"))
        figure.legend(handles=keys, loc="outside lower right", ncols=2)

    size = (max(10.2, 0.155 * layers * len(scores.panels) + 2.0), 1.75 + 0.21 * len(scores.rows))
    return plots.render(f"{trace.name}-heat", _heat_caption(trace, scores.ranking), size, draw)


def _heat_panel(axes: Axes, layers: int, scores: _Scores, kind: BlockKind, norm: LogNorm) -> QuadMesh:
    count = len(scores.rows)
    cells = np.full((count, layers), np.nan)
    for i, row in enumerate(scores.rows):
        for unit, cost in row.items():
            for block in unit:
                if block.kind is kind:
                    cells[i, block.layer] = max(cost, scores.floor)
    x, y = np.arange(layers + 1) - 0.5, np.arange(count + 1) + 0.5
    mesh = axes.pcolormesh(x, y, np.ma.masked_invalid(cells), cmap=COLOURS, norm=norm)
    for i, block in ((i, block) for i, unit in enumerate(scores.removed) for block in sorted_blocks(unit)):
        if block.kind is not kind:
            continue
        left, rest = block.layer - 0.5, count - i - 1
        if rest:
            patch = Rectangle((left, i + 1.5), 1, rest, facecolor="none", edgecolor=GREY, hatch="/////", linewidth=0)
            axes.add_patch(patch)
        axes.add_patch(Rectangle((left, i + 0.5), 1, 1, facecolor="none", edgecolor=ORANGE, linewidth=2, zorder=3))
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(min(layers, 8), integer=True))
    axes.spines[:].set_visible(False)
    return mesh
