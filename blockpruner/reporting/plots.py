"""The plots of a report, each a matplotlib figure with its caption, and how a figure becomes bytes.

Decides what is drawn and in which colours. The same figure gives the same bytes every time. Lines and text are drawn
in INK on PAPER, two colours that occur nowhere else, so that a page can put the reader's own in their place.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from blockpruner.core.blocks import BlockId, BlockKind, Mask
from blockpruner.reporting.comparison import GAINS, SPEED, Comparison, Gain, Option
from blockpruner.reporting.findings import first_jump, recommended
from blockpruner.reporting.inputs import Estimate, Study, Target
from blockpruner.reporting.methods import cost_words
from blockpruner.scoring.metrics import METRICS

INK, PAPER = "#010203", "#fefdfc"
BLUE, ORANGE, GREY = "#2a86c8", "#d9662b", "#8a8f98"
"""Blue and orange stay apart for every common colour blindness (after Okabe and Ito), on white and on black."""

MARKS = (
    (BLUE, "o"), (ORANGE, "s"), ("#2e9e78", "^"), ("#b463a6", "D"), ("#b8901f", "v"), ("#5b6fd0", "P"),
    ("#c2455a", "X"), (GREY, "h"),
)  # fmt: skip
"""One a method, its colour never alone: a shape goes with it."""

COLOURS = "cividis"
"""Perceptually even, and the same to colour-blind eyes; dark is low."""

CLIP = (2.0, 98.0)
"""Percentiles at which the heat map's colours end: block 0 alone may cost a thousand times the median."""

FLOORS = {False: 1e-3, True: 1e-5}
"""By whether the metric is an influence: the lowest colour of the heat map holds everything up to this. For losses, in
nats per token, gains included; an influence is never below 0, and small ones still rank."""

STYLE: dict[Any, Any] = {
    "svg.hashsalt": "blockpruner",
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "hatch.linewidth": 0.5,
    "figure.facecolor": PAPER,
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class Plot:
    """name: of its files; wide: it keeps its size on a small screen, which scrolls; width: inches."""

    name: str
    caption: str
    wide: bool
    width: float
    svg: str
    png: bytes


def plots(study: Study) -> list[Plot]:
    """All plots of one run, curves first."""
    known = study.dense_calibration is not None
    curve = CURVE_CAPTION if study.traces else SINGLE_CAPTION if known else HELDOUT_CAPTION
    drawn = [
        render(f"{study.run}-perplexity", curve, False, (4.3, 3.3), lambda figure: _perplexity(figure, study)),
        render(f"{study.run}-accuracy", ACCURACY_CAPTION, False, (4.3, 3.3), lambda figure: _accuracy(figure, study)),
        render(f"{study.run}-speed", SPEED_CAPTION, False, (4.3, 3.3), lambda figure: _speed(figure, study)),
        render(
            f"{study.run}-tasks",
            TASKS_CAPTION,
            True,
            (10.5, 2.5 * -(-len(study.dense.tasks) // 5)),
            lambda figure: _tasks(figure, study),
        ),
    ]
    drawn += [_map_plot(target) for target in study.traces]
    drawn += [_map_plot(target) for target in study.targets if target.plan.kind == "mask" and not target.removals]
    drawn += [_heat_plot(trace) for trace in study.traces if any(removal.costs for removal in trace.removals)]
    return drawn


def pareto_plot(comparison: Comparison) -> Plot:
    """Held-out perplexity against each gain, all targets of one dense model."""
    methods = list(dict.fromkeys(option.method for option in comparison.options[1:]))
    return render(
        f"{comparison.studies[0].run}-pareto",
        PARETO_CAPTION,
        True,
        (10.5, 3.7 + 0.2 * -(-len(methods) // 2)),
        lambda figure: _pareto(figure, comparison, methods),
    )


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
ORDER_CAPTION = "Which blocks are gone in {}, and in which order: each removed block carries the number of its removal."
MAP_CAPTION = "Which blocks are gone in {}. The search chose all of them together, so they have no order."
PARETO_CAPTION = (
    "What pruning buys at which loss: lower and further right is better. The line joins the models that no other "
    "betters in both; the numbers are their rows in the upper table. Colour and shape: the method; the "
    "stronger the fill, the more of the removed blocks are attention (hollow: none). The star is the dense model."
)


def render(name: str, caption: str, wide: bool, size: tuple[float, float], draw: Callable[[Figure], None]) -> Plot:
    svg, png = io.StringIO(), io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size)
        draw(figure)
        bare = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(svg, format="svg", metadata=bare)
        figure.savefig(png, format="png", dpi=180, metadata={"Software": None})
    text = "\n".join(line.rstrip() for line in svg.getvalue().splitlines()) + "\n"
    return Plot(name, caption, wide, size[0], text, png.getvalue())


def _perplexity(figure: Figure, study: Study) -> None:
    axes = _axes(figure, "parameters removed, %", "perplexity")
    traces = study.traces
    heldout = [study.dense.perplexity, *(t.result.perplexity for t in study.targets)]
    shown = list(heldout)
    for trace, line in zip(traces, ("-", "--", "-.", ":") * len(traces), strict=False):
        values = [trace.removals[0].before, *(r.perplexity for r in trace.removals)]
        shown += values
        label = "calibration" if len(traces) == 1 else f"calibration, {trace.name}"
        ratios = [0.0, *(100 * r.ratio for r in trace.removals)]
        axes.plot(ratios, values, line, color=BLUE, marker="o", markersize=4, linewidth=1.4, label=label)
        jump = first_jump(trace.removals)
        if jump is not None:
            axes.axvline(ratios[jump], color=GREY, linestyle=":", linewidth=1.5, label="last before a jump")
    single = [(100 * t.plan.ratio, p) for t in study.targets if not t.removals and (p := t.calibration_perplexity)]
    if single:
        dense = [] if study.dense_calibration is None else [(0.0, study.dense_calibration)]
        x, y = zip(*dense, *single, strict=True)
        shown += y
        axes.plot(
            x, y, linestyle="none", color=BLUE, marker="o", markersize=6.5, markerfacecolor="none", label="calibration"
        )
    ratios = [0.0, *(100 * t.plan.ratio for t in study.targets)]
    axes.plot(ratios, heldout, linestyle="none", color=ORANGE, marker="s", markersize=6.5, label="held-out")
    scale_(axes, shown)
    axes.legend(loc="best")


def _accuracy(figure: Figure, study: Study) -> None:
    axes = _axes(figure, "parameters removed, %", "average accuracy, %")
    _errors(axes, study, [study.dense.average, *(t.result.average for t in study.targets)])


def _tasks(figure: Figure, study: Study) -> None:
    names = list(study.dense.tasks)
    rows = -(-len(names) // 5)
    grid = figure.subplots(rows, min(len(names), 5), sharex=True, sharey=True, squeeze=False)
    for axes, name in zip(grid.flat, names, strict=False):
        grid_(axes)
        axes.set_title(name)
        axes.axhline(100 * study.dense.chance[name], color=GREY, linestyle="--", linewidth=1.2)
        _errors(axes, study, [study.dense.tasks[name], *(t.result.tasks[name] for t in study.targets)])
    for axes in list(grid.flat)[len(names) :]:
        axes.set_visible(False)
    figure.supxlabel("parameters removed, %", fontsize=9.5)
    figure.supylabel("accuracy, %", fontsize=9.5)


def _speed(figure: Figure, study: Study) -> None:
    axes = _axes(figure, "generation speed-up, ×", "held-out perplexity")
    best = recommended(study)
    speeds = [1.0, *(t.speedups.generation for t in study.targets)]
    losses = [study.dense.perplexity, *(t.result.perplexity for t in study.targets)]
    axes.plot(speeds, losses, color=GREY, linewidth=1, zorder=1)
    axes.plot(speeds, losses, linestyle="none", color=BLUE, marker="o", markersize=6)
    names = ["dense", *(f"{100 * t.plan.ratio:.1f} %" for t in study.targets)]
    for i, (name, x, y) in enumerate(zip(names, speeds, losses, strict=True)):
        offset = (0, -17 if i % 2 else 9)
        axes.annotate(name, (x, y), xytext=offset, textcoords="offset points", ha="center", fontsize=8.5)
    scale_(axes, losses)
    if best is not None:
        axes.plot(
            best.speedups.generation, best.result.perplexity, "o", markersize=13, markerfacecolor="none",
            markeredgecolor=ORANGE, markeredgewidth=1.8,
        )  # fmt: skip
    axes.margins(x=0.14, y=0.16)


def _pareto(figure: Figure, comparison: Comparison, methods: Sequence[str]) -> None:
    options = comparison.options
    panels = list(figure.subplots(1, len(GAINS), sharey=True))
    for axes, gain in zip(panels, GAINS, strict=True):
        axes.set_xlabel(gain.title)
        grid_(axes)
        _front(axes, comparison, gain)
        for option in options[1:]:
            colour, shape = MARKS[methods.index(option.method) % len(MARKS)]
            axes.plot(
                gain.of(option), option.result.perplexity, shape, markersize=8, markeredgecolor=colour,
                markeredgewidth=1.4, markerfacecolor=to_rgba(colour, _attention(option)),
            )  # fmt: skip
        axes.plot(gain.of(options[0]), options[0].result.perplexity, "*", color=INK, markersize=11)
        axes.margins(x=0.08, y=0.1)
    panels[0].set_ylabel("held-out perplexity")
    log_(panels[0], [option.result.perplexity for option in options])
    keys = [
        Line2D([], [], linestyle="none", marker=shape, color=colour, markersize=7, label=method)
        for method, (colour, shape) in zip(methods, MARKS * len(methods), strict=False)
    ]
    figure.legend(handles=keys, loc="outside lower left", ncols=2)


def _front(axes: Axes, comparison: Comparison, gain: Gain) -> None:
    front = comparison.front(gain)
    x, y = [gain.of(option) for option in front], [option.result.perplexity for option in front]
    axes.plot(x, y, color=GREY, linewidth=1.2, zorder=1)
    if gain is SPEED:  # below and right of a member is free: what lay there would be better
        for number, place in enumerate(zip(x, y, strict=True), 1):
            axes.annotate(str(number), place, xytext=(5, -11), textcoords="offset points", fontsize=8.5)


def _attention(option: Option) -> float:
    """Share of MHA among the removed blocks; 0 where none is removed."""
    assert option.target is not None
    blocks = option.target.plan.blocks
    return blocks[BlockKind.MHA] / (sum(blocks.values()) or 1)


def _map_plot(target: Target) -> Plot:
    width = max(10.2, 0.29 * target.plan.layers + 1.5)
    caption = ORDER_CAPTION if target.removals else MAP_CAPTION
    return render(
        f"{target.name}-map", caption.format(target.name), True, (width, 1.75), lambda figure: _map(figure, target)
    )


def _map(figure: Figure, target: Target) -> None:
    block_map(figure, target.plan.layers, target.plan.mask, [removal.added for removal in target.removals])


def block_map(figure: Figure, layers: int, mask: Mask, removals: Sequence[Mask]) -> None:
    """Which blocks are gone, with the number of the removal that took each where they have an order."""
    axes, kinds = figure.subplots(), list(BlockKind)
    number = {block: i for i, removal in enumerate(removals, 1) for block in removal}
    colour = colormaps[COLOURS]
    for block in (BlockId(kind, layer) for kind in kinds for layer in range(layers)):
        corner = (block.layer - 0.46, kinds.index(block.kind) - 0.44)
        if block not in mask:
            axes.add_patch(Rectangle(corner, 0.92, 0.88, facecolor="none", edgecolor=GREY, linewidth=0.6))
            continue
        share = (number.get(block, 1) - 1) / max(len(removals) - 1, 1)
        axes.add_patch(Rectangle(corner, 0.92, 0.88, facecolor=colour(share), edgecolor="none"))
        if removals:
            place, ink = (block.layer, kinds.index(block.kind)), "black" if share > 0.5 else "white"
            axes.text(*place, str(number[block]), color=ink, ha="center", va="center", fontsize=8.5)
    axes.set_xlim(-0.6, layers - 0.4)
    axes.set_ylim(len(kinds) - 0.4, -0.6)
    axes.set_yticks(range(len(kinds)), [kind.upper() for kind in kinds])
    axes.xaxis.set_major_locator(MaxNLocator(min(layers, 16), integer=True))
    axes.set_xlabel("layer (0 is next to the embedding)")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


@dataclass(frozen=True)
class _Scores:
    """What a heat map shows of a search. rows: the costs of each scored iteration; removed: for each of them the blocks
    outlined; panels: titles, and which blocks are in them; floor: the lowest cost shown; ranking: one row for all."""

    rows: tuple[Mapping[Mask, float], ...]
    removed: tuple[Mask, ...]
    panels: Mapping[str, BlockKind]
    floor: float
    ranking: bool


def _scores(trace: Target) -> _Scores:
    scored = [removal for removal in trace.removals if removal.costs]
    ranking = len(scored) < len(trace.removals)
    removed = [trace.plan.mask] if ranking else [removal.added for removal in scored]
    units = [unit for removal in scored for unit in removal.costs]
    titles = {BlockKind.MHA: "attention (MHA)", BlockKind.MLP: "feed-forward (MLP)"}
    kinds = [kind for kind in BlockKind if any(block.kind is kind for unit in units for block in unit)]
    layers = all(len(unit) > 1 for unit in units)
    return _Scores(
        rows=tuple(removal.costs for removal in scored),
        removed=tuple(removed),
        panels={"whole layers": BlockKind.MHA} if layers else {titles[kind]: kind for kind in kinds},
        floor=FLOORS[METRICS[trace.plan.metric].influence],
        ranking=ranking,
    )


def _heat_caption(trace: Target, scores: _Scores) -> str:
    influence = METRICS[trace.plan.metric].influence
    name, unit = cost_words(trace)
    where = "in the dense model" if scores.ranking else "in what earlier removals left"
    what = (
        f"{name} of each candidate {where} ({unit})"
        if influence
        else f"What each candidate would have cost {where}: {name} on the calibration rows ({unit})"
    )
    text = f"{what}, on a logarithmic scale. "
    text += (
        "This one ranking decided all removals, which are outlined."
        if scores.ranking
        else "Outlined: the block chosen; hatched: already removed."
    )
    return text + (" Empty: left out early, not scored on all rows." if any(r.partial for r in trace.removals) else "")


def _heat_plot(trace: Target) -> Plot:
    scores = _scores(trace)
    size = (max(10.2, 0.155 * trace.plan.layers * len(scores.panels) + 2.0), 1.75 + 0.21 * len(scores.rows))
    caption = _heat_caption(trace, scores)
    return render(f"{trace.name}-heat", caption, True, size, lambda figure: _heat(figure, trace, scores))


def _heat(figure: Figure, trace: Target, scores: _Scores) -> None:
    panels = list(figure.subplots(1, len(scores.panels), sharey=True, squeeze=False).flat)
    costs = np.array([cost for row in scores.rows for cost in row.values()])
    low = max(scores.floor, float(np.percentile(costs, CLIP[0])))
    high = max(float(np.percentile(costs, CLIP[1])), 2 * low)
    norm = LogNorm(low, high, clip=True)
    meshes = []
    for axes, (title, kind) in zip(panels, scores.panels.items(), strict=True):
        meshes.append(_heat_panel(axes, trace.plan.layers, scores, kind, norm))
        axes.set_title(title)
    panels[0].set_ylim(len(scores.rows) + 0.5, 0.5)
    if scores.ranking:
        panels[0].set_yticks([])
    else:
        panels[0].set_ylabel("removal")
        panels[0].yaxis.set_major_locator(MaxNLocator(min(len(scores.rows), 12), integer=True, min_n_ticks=1))
    bar = figure.colorbar(meshes[0], ax=panels, extend="both", aspect=18, pad=0.015, fraction=0.03)
    bar.set_label("\n".join(cost_words(trace)))
    steps = (1, 2, 5) if high < 300 * low else (1,)
    ticks = [t * 10.0**e for e in range(-5, 4) for t in steps if low <= t * 10.0**e <= high]
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    bar.minorticks_off()
    keys = [Patch(facecolor="none", edgecolor=ORANGE, linewidth=1.6, label="removed" if scores.ranking else "chosen")]
    if not scores.ranking:
        keys.append(Patch(facecolor="none", edgecolor=GREY, hatch="/////", linewidth=0, label="already removed"))
    figure.legend(handles=keys, loc="outside lower right", ncols=2)


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
    for i, removed in enumerate(scores.removed):
        for block in removed:
            if block.kind is not kind:
                continue
            left = block.layer - 0.5
            if i + 1 < count:
                axes.add_patch(
                    Rectangle(
                        (left, i + 1.5), 1, count - i - 1, facecolor="none", edgecolor=GREY, hatch="/////", linewidth=0
                    )
                )
            axes.add_patch(Rectangle((left, i + 0.5), 1, 1, facecolor="none", edgecolor=ORANGE, linewidth=2, zorder=3))
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(min(layers, 8), integer=True))
    axes.spines[:].set_visible(False)
    return mesh


def _axes(figure: Figure, x: str, y: str) -> Axes:
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    grid_(axes)
    return axes


def scale_(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic scale for perplexities over a wide range."""
    if max(values) > 3 * min(values):
        log_(axes, values)


def log_(axes: Axes, values: Sequence[float]) -> None:
    wide = max(values) > 10 * min(values)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if wide else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def grid_(axes: Axes) -> None:
    axes.grid(color=GREY, alpha=0.3, linewidth=0.6)
    axes.set_axisbelow(True)


def _errors(axes: Axes, study: Study, scores: Sequence[Estimate]) -> None:
    ratios = [0.0, *(100 * t.plan.ratio for t in study.targets)]
    axes.errorbar(
        ratios, [100 * s.value for s in scores], [100 * s.stderr if np.isfinite(s.stderr) else 0.0 for s in scores],
        color=BLUE, marker="o", markersize=5, linewidth=1.4, capsize=3, elinewidth=1.2,
    )  # fmt: skip
