"""The plots of a report, each a matplotlib figure with its caption, and how a figure becomes bytes.

Decides what is drawn and in which colours. The same figure gives the same bytes every time. Lines and text are drawn
in INK on PAPER, two colours that occur nowhere else, so that a page can put the reader's own in their place.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from blockpruner.blocks import BlockId, BlockKind
from blockpruner.reporting.findings import first_jump, recommended
from blockpruner.reporting.inputs import Estimate, Study, Target

INK, PAPER = "#010203", "#fefdfc"
BLUE, ORANGE, GREY = "#2a86c8", "#d9662b", "#8a8f98"
"""Blue and orange stay apart for every common colour blindness (after Okabe and Ito), on white and on black."""

COLOURS = "cividis"
"""Perceptually even, and the same to colour-blind eyes; dark is low."""

CLIP = (2.0, 98.0)
"""Percentiles at which the heat map's colours end: block 0 alone may cost a thousand times the median."""

FLOOR = 1e-3
"""Nats per token; the lowest colour of the heat map holds every rise up to this, gains included."""

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
    drawn = [
        _render(f"{study.run}-perplexity", CURVE_CAPTION, False, (4.3, 3.3), lambda figure: _perplexity(figure, study)),
        _render(f"{study.run}-accuracy", ACCURACY_CAPTION, False, (4.3, 3.3), lambda figure: _accuracy(figure, study)),
        _render(f"{study.run}-speed", SPEED_CAPTION, False, (4.3, 3.3), lambda figure: _speed(figure, study)),
        _render(
            f"{study.run}-tasks",
            TASKS_CAPTION,
            True,
            (10.5, 2.5 * -(-len(study.dense.tasks) // 5)),
            lambda figure: _tasks(figure, study),
        ),
    ]
    for trace in study.traces:
        layers, count = trace.plan.layers, len(trace.removals)
        drawn.append(_map_plot(trace, max(7.0, 0.29 * layers + 1.5)))
        kinds = [kind for kind in BlockKind if any(b.kind is kind for r in trace.removals for u in r.rises for b in u)]
        size = (max(7.0, 0.155 * layers * len(kinds) + 2.0), 1.75 + 0.21 * count)
        caption = HEAT_CAPTION + (PARTIAL_CAPTION if any(r.partial for r in trace.removals) else "")
        drawn.append(_heat_plot(trace, kinds, caption, size))
    return drawn


CURVE_CAPTION = (
    "Perplexity against the share of parameters removed. Each dot is one removal, on the calibration rows that chose "
    "it; squares are the dense model and the targets on held-out text."
)
ACCURACY_CAPTION = "Average zero-shot accuracy of the dense model and the targets, ± 1 standard error."
SPEED_CAPTION = (
    "What speed costs: held-out perplexity against generation speed-up, measured in turns with the dense model. The "
    "ring marks the recommended stopping point."
)
TASKS_CAPTION = "Accuracy by task, ± 1 standard error. The dashed line is what guessing scores."
MAP_CAPTION = "Which blocks are gone, and in which order: each removed block carries the number of its removal."
HEAT_CAPTION = (
    "What each block would have cost: the rise in calibration NLL over the model before that removal, on a logarithmic "
    "scale. Outlined: the block chosen; hatched: already removed."
)
PARTIAL_CAPTION = " Empty: left out early, not scored on all rows."


def _render(name: str, caption: str, wide: bool, size: tuple[float, float], draw: Callable[[Figure], None]) -> Plot:
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
        values = [trace.dense_perplexity, *(r.perplexity for r in trace.removals)]
        shown += values
        label = "calibration" if len(traces) == 1 else f"calibration, {trace.name}"
        ratios = [0.0, *(100 * r.ratio for r in trace.removals)]
        axes.plot(ratios, values, line, color=BLUE, marker="o", markersize=4, linewidth=1.4, label=label)
        jump = first_jump(trace.removals)
        if jump is not None:
            axes.axvline(ratios[jump], color=GREY, linestyle=":", linewidth=1.5, label="last before a jump")
    ratios = [0.0, *(100 * t.plan.ratio for t in study.targets)]
    axes.plot(ratios, heldout, linestyle="none", color=ORANGE, marker="s", markersize=6.5, label="held-out")
    _scale(axes, shown)
    axes.legend(loc="best")


def _accuracy(figure: Figure, study: Study) -> None:
    axes = _axes(figure, "parameters removed, %", "average accuracy, %")
    _errors(axes, study, [study.dense.average, *(t.result.average for t in study.targets)])


def _tasks(figure: Figure, study: Study) -> None:
    names = list(study.dense.tasks)
    rows = -(-len(names) // 5)
    grid = figure.subplots(rows, min(len(names), 5), sharex=True, sharey=True, squeeze=False)
    for axes, name in zip(grid.flat, names, strict=False):
        _grid(axes)
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
    _scale(axes, losses)
    if best is not None:
        axes.plot(
            best.speedups.generation, best.result.perplexity, "o", markersize=13, markerfacecolor="none",
            markeredgecolor=ORANGE, markeredgewidth=1.8,
        )  # fmt: skip
    axes.margins(x=0.14, y=0.16)


def _map_plot(trace: Target, width: float) -> Plot:
    return _render(f"{trace.name}-map", MAP_CAPTION, True, (width, 1.75), lambda figure: _map(figure, trace))


def _map(figure: Figure, trace: Target) -> None:
    axes = figure.subplots()
    layers, kinds = trace.plan.layers, list(BlockKind)
    number = {block: i for i, removal in enumerate(trace.removals, 1) for block in removal.added}
    colour = colormaps[COLOURS]
    for block in (BlockId(kind, layer) for kind in kinds for layer in range(layers)):
        corner = (block.layer - 0.46, kinds.index(block.kind) - 0.44)
        if block not in number:
            axes.add_patch(Rectangle(corner, 0.92, 0.88, facecolor="none", edgecolor=GREY, linewidth=0.6))
            continue
        share = (number[block] - 1) / max(len(trace.removals) - 1, 1)
        axes.add_patch(Rectangle(corner, 0.92, 0.88, facecolor=colour(share), edgecolor="none"))
        ink = "black" if share > 0.5 else "white"
        axes.text(
            block.layer, kinds.index(block.kind), str(number[block]), color=ink, ha="center", va="center", fontsize=8.5
        )
    axes.set_xlim(-0.6, layers - 0.4)
    axes.set_ylim(len(kinds) - 0.4, -0.6)
    axes.set_yticks(range(len(kinds)), [kind.upper() for kind in kinds])
    axes.xaxis.set_major_locator(MaxNLocator(min(layers, 16), integer=True))
    axes.set_xlabel("layer (0 is next to the embedding)")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _heat_plot(trace: Target, kinds: Sequence[BlockKind], caption: str, size: tuple[float, float]) -> Plot:
    return _render(f"{trace.name}-heat", caption, True, size, lambda figure: _heat(figure, trace, kinds))


def _heat(figure: Figure, trace: Target, kinds: Sequence[BlockKind]) -> None:
    panels = list(figure.subplots(1, len(kinds), sharey=True, squeeze=False).flat)
    rises = np.array([rise for removal in trace.removals for rise in removal.rises.values()])
    low = max(FLOOR, float(np.percentile(rises, CLIP[0])))
    high = max(float(np.percentile(rises, CLIP[1])), 2 * low)
    norm = LogNorm(low, high, clip=True)
    meshes = [_heat_panel(axes, trace, kind, norm) for axes, kind in zip(panels, kinds, strict=True)]
    panels[0].set_ylabel("removal")
    panels[0].set_ylim(len(trace.removals) + 0.5, 0.5)
    panels[0].yaxis.set_major_locator(MaxNLocator(min(len(trace.removals), 12), integer=True, min_n_ticks=1))
    bar = figure.colorbar(meshes[0], ax=panels, extend="both", aspect=18, pad=0.015, fraction=0.03)
    bar.set_label("NLL rise, nats/token")
    ticks = [t * 10.0**e for e in range(-3, 3) for t in (1, 2, 5) if low <= t * 10.0**e <= high]
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    bar.minorticks_off()
    keys = [
        Patch(facecolor="none", edgecolor=ORANGE, linewidth=1.6, label="chosen"),
        Patch(facecolor="none", edgecolor=GREY, hatch="/////", linewidth=0, label="already removed"),
    ]
    figure.legend(handles=keys, loc="outside lower right", ncols=2)


def _heat_panel(axes: Axes, trace: Target, kind: BlockKind, norm: LogNorm) -> QuadMesh:
    layers, count = trace.plan.layers, len(trace.removals)
    cells = np.full((count, layers), np.nan)
    for i, removal in enumerate(trace.removals):
        for unit, rise in removal.rises.items():
            for block in unit:
                if block.kind is kind:
                    cells[i, block.layer] = max(rise, FLOOR)
    x, y = np.arange(layers + 1) - 0.5, np.arange(count + 1) + 0.5
    mesh = axes.pcolormesh(x, y, np.ma.masked_invalid(cells), cmap=COLOURS, norm=norm)
    for i, removal in enumerate(trace.removals):
        for block in removal.added:
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
    axes.set_title({BlockKind.MHA: "attention (MHA)", BlockKind.MLP: "feed-forward (MLP)"}[kind])
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(min(layers, 8), integer=True))
    axes.spines[:].set_visible(False)
    return mesh


def _axes(figure: Figure, x: str, y: str) -> Axes:
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    _grid(axes)
    return axes


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic scale for perplexities over a wide range."""
    if max(values) > 3 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _grid(axes: Axes) -> None:
    axes.grid(color=GREY, alpha=0.3, linewidth=0.6)
    axes.set_axisbelow(True)


def _errors(axes: Axes, study: Study, scores: Sequence[Estimate]) -> None:
    ratios = [0.0, *(100 * t.plan.ratio for t in study.targets)]
    axes.errorbar(
        ratios, [100 * s.value for s in scores], [100 * s.stderr if np.isfinite(s.stderr) else 0.0 for s in scores],
        color=BLUE, marker="o", markersize=5, linewidth=1.4, capsize=3, elinewidth=1.2,
    )  # fmt: skip
