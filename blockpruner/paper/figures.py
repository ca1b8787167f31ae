"""The figures of the paper and the plots that go beyond it, each with a panel for every computed run of a set.

Decides what is drawn. A figure is one row of FIGURES. The paper's figures are curves without published numbers, so
only what is measured here is in them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from blockpruner.core.blocks import BlockKind, parse_mask
from blockpruner.core.errors import extra
from blockpruner.paper.evidence import MAIN, Entry, Evidence
from blockpruner.paper.experiments import BLOCKPRUNER, GREEDY_LAYERS, METHODS
from blockpruner.paper.extra_tables import BALANCE
from blockpruner.reporting import plots
from blockpruner.reporting.plots import BLUE, GREY, MARKS, ORANGE, REMOVED, Plot
from blockpruner.reporting.results import TIMED, Race
from blockpruner.reporting.statistics import Interval, Mean

with extra("report"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

Draw = Callable[[Axes, Evidence], None]
FILLS: tuple[Literal["none", "bottom", "full"], ...] = ("none", "bottom", "full")
"""Of markers: as pruned, compensated, trained after that."""

ACCURACY, PERPLEXITY = "average accuracy, %", "held-out perplexity"


@dataclass(frozen=True)
class PaperFigure:
    """A figure with a row of panels for each run that has it."""

    name: str
    title: str
    caption: str
    panels: tuple[tuple[str, Draw], ...]
    """Of one run: their titles, and what draws them."""
    has: Callable[[Evidence], bool]
    """Whether a study measured it."""
    missing: str
    """Why a study did not."""
    height: float = 3.2


def draw(figure: PaperFigure, found: Sequence[Evidence]) -> Plot | str:
    """Draw the figure, or state why there is none."""
    shown = [evidence for evidence in found if figure.has(evidence)]
    if not shown:
        return f"No figure: {figure.missing}."
    count = len(figure.panels)

    def fill(canvas: Figure) -> None:
        grid = canvas.subplots(len(shown), count, squeeze=False)
        for row, evidence in zip(grid, shown, strict=True):
            for axes, (title, panel) in zip(row, figure.panels, strict=True):
                plots.grid_(axes)
                panel(axes, evidence)
                axes.set_title(" · ".join(part for part in (evidence.dense.subject, title) if part))

    return plots.render(figure.name, figure.caption, (max(10.0, 5.0 * count), figure.height * len(shown)), fill)


def _influence(method: str, axes: Axes, evidence: Evidence) -> None:
    """Draw for Figure 1 the influence of each unit of the dense model, from a search's first iteration."""
    by_kind: dict[str, dict[int, float]] = {}
    for unit, value in evidence.searches[method].first.items():
        blocks = sorted(parse_mask(unit), key=lambda block: block.order)
        title = "layer" if len(blocks) > 1 else blocks[0].kind.upper()
        by_kind.setdefault(title, {})[blocks[0].layer] = value
    for (title, values), (colour, shape) in zip(sorted(by_kind.items()), MARKS, strict=False):
        x, y = zip(*sorted(values.items()), strict=True)
        axes.plot(x, y, color=colour, marker=shape, markersize=4, linewidth=1.2, label=title)
    axes.set_yscale("log")
    plots.label_(axes, "layer", "Block Influence")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()


def _curve(methods: Mapping[str, str], is_accuracy: bool, axes: Axes, evidence: Evidence) -> None:
    """Draw quality against ratio, a line for each method, all from the dense model. `methods` maps to labels."""
    shown = []
    for (method, name), (colour, shape) in zip(methods.items(), MARKS, strict=False):
        options = [evidence.dense, *evidence.of(method)]
        if len(options) == 1:
            continue
        x = [100 * option.ratio for option in options]
        if is_accuracy:
            plots.accuracy_(axes, x, [option.model.average for option in options], colour, shape, name)
        else:
            y = [option.model.perplexity for option in options]
            axes.plot(x, y, color=colour, marker=shape, markersize=5, linewidth=1.3, label=name)
            shown += y
    if not is_accuracy:
        plots.scale_(axes, shown)
    plots.label_(axes, REMOVED, ACCURACY if is_accuracy else PERPLEXITY)
    axes.legend()


def _curves(methods: Mapping[str, str]) -> tuple[tuple[str, Draw], ...]:
    return ("", partial(_curve, methods, True)), ("", partial(_curve, methods, False))


def _healing(is_confidence: bool, axes: Axes, evidence: Evidence) -> None:
    """Draw the models of healed searches, filled by what was done after them, perplexities from the dense model on."""
    own = {entry.variant.method: METHODS[entry.variant.method].title for entry in evidence.healed}
    plain = [entry for entry in evidence.entries if not entry.variant.factor]
    shown: list[float] = []
    for number, ((method, title), (colour, shape)) in enumerate(zip(own.items(), MARKS, strict=False)):
        aside = 0.25 * (number - len(own) / 2) if is_confidence else 0.0
        groups: dict[tuple[str, ...], list[Entry]] = {}
        for entry in sorted((*plain, *evidence.healed), key=lambda entry: entry.ratio):
            if entry.variant.method == method:
                groups.setdefault(entry.healing, []).append(entry)
        for healing, entries in groups.items():
            options = [evidence.dense, *entries]
            y = [option.model.perplexity for option in options]
            line, error = "-" if healing else ":", None
            if is_confidence:
                options = list(entries)
                known = [option.model.confidence or Mean(np.nan, np.nan) for option in options]
                y, error, line = [100 * each.value for each in known], [100 * each.stderr for each in known], "none"
            axes.errorbar(
                [100 * option.ratio + aside for option in options], y, error, linestyle=line, color=colour,
                marker=shape, markersize=6, linewidth=1.3, capsize=2, fillstyle=FILLS[len(healing)],
                markerfacecoloralt="none", label="_" if is_confidence else " + ".join((title, *healing)),
            )  # fmt: skip
            shown += y
    if is_confidence:
        dense = evidence.dense.model.confidence
        if dense is not None:
            axes.axhspan(
                100 * (dense.value - dense.stderr), 100 * (dense.value + dense.stderr), color=GREY, alpha=0.25,
                label="dense",
            )  # fmt: skip
    else:
        plots.scale_(axes, shown)
    plots.label_(axes, REMOVED, "p of the right answer, %" if is_confidence else PERPLEXITY)
    axes.legend(fontsize=7)


def _share(axes: Axes, evidence: Evidence) -> None:
    """Draw for Figure 5 the share of MHA among the blocks removed so far."""
    order = [block for unit in evidence.searches[BLOCKPRUNER].order for block in parse_mask(unit)]
    mha = np.cumsum([block.kind is BlockKind.MHA for block in order])
    steps = np.arange(1, len(order) + 1)
    axes.plot(steps, 100 * mha / steps, color=BLUE, marker="o", markersize=3.5, linewidth=1.2)
    for entry in evidence.of(BLOCKPRUNER):
        count = sum(entry.blocks.values())
        if 0 < count <= len(steps):
            axes.axvline(count, color=GREY, linestyle=":", linewidth=0.9)
            axes.annotate(f"{100 * entry.ratio:.0f} %", (count, 3), fontsize=7.5, ha="right", rotation=90)
    axes.set_ylim(0, 104)
    plots.label_(axes, "blocks removed", "MHA among them, %")


def _levels(is_accuracy: bool, axes: Axes, evidence: Evidence) -> None:
    """Draw for Figure 7 every calibration set at the budget of the sensitivity study."""
    base = evidence.at(BLOCKPRUNER, evidence.study.sensitivity)
    assert base is not None
    entries = [base, *evidence.varied(BLOCKPRUNER, "calibration")]
    entries.sort(key=lambda entry: entry.search.tokens)
    for i, entry in enumerate(entries):
        average = entry.model.average
        value = 100 * average.value if is_accuracy else entry.model.perplexity
        error = 100 * average.stderr if is_accuracy and 0 < average.stderr < np.inf else None
        colour, shape = (ORANGE, "s") if entry is base else (BLUE, "o")
        axes.errorbar(value, i, xerr=error, color=colour, marker=shape, markersize=6, capsize=3, linestyle="none")
    names = [f"{entry.variant.level or 'base'} ({entry.search.tokens:,} tokens)" for entry in entries]
    axes.set_yticks(range(len(names)), names)
    plots.label_(axes, ACCURACY if is_accuracy else PERPLEXITY)


Cost = Callable[[Race], tuple[float, Interval | None]]
"""What a model costs to run, and the 95 % interval of that where it is measured in turns with the dense model."""


def _scatter(of: Cost, title: str, setting: str, axes: Axes, evidence: Evidence) -> None:
    """Draw held-out perplexity against what a model costs to run; a marker is a method, filled by what was done after
    it, where its models are healed at all; a number is a ratio."""
    plots.star_(axes, of(evidence.dense.races[setting])[0], evidence.dense.model.perplexity, "dense")
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in evidence.models(setting):
        groups.setdefault((entry.method, entry.recipe), []).append(entry)
    methods, healed = list(dict.fromkeys(method for method, _ in groups)), {entry.method for entry in evidence.healed}
    shown = [evidence.dense.model.perplexity]
    for (method, recipe), entries in groups.items():
        colour, shape = MANY_MARKS[methods.index(method) % len(MANY_MARKS)]
        fill = FILLS[len(entries[0].healing) if method in healed else -1]
        for entry in entries:
            (x, interval), y = of(entry.races[setting]), entry.model.perplexity
            axes.plot(
                x, y, shape, color=colour, markersize=6.5, fillstyle=fill, markerfacecoloralt="none",
                label=recipe if entry is entries[0] else None,
            )  # fmt: skip
            if interval and np.isfinite(interval.high):
                axes.plot((interval.low, interval.high), (y, y), color=colour, linewidth=0.7)
            if len(entries) > 1:
                axes.annotate(f"{100 * entry.ratio:.0f}", (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
            shown.append(y)
    best = evidence.best
    if best is not None and setting in best.races:
        plots.ring_(axes, of(best.races[setting])[0], best.model.perplexity)
    plots.scale_(axes, shown)
    axes.margins(x=0.08, y=0.12)
    plots.label_(axes, title, PERPLEXITY)
    axes.legend(fontsize=7.5, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)


def _scatters(of: Cost, title: str) -> tuple[tuple[str, Draw], ...]:
    return ("every budget", partial(_scatter, of, title, TIMED)), ("all methods", partial(_scatter, of, title, MAIN))


SHAPES = [shape for _, shape in MARKS]
MANY_MARKS = [*MARKS, *((colour, shape) for (colour, _), shape in zip(MARKS, SHAPES[3:] + SHAPES[:3], strict=True))]
"""MARKS, then again in the other order of shapes: twice as many methods stay apart."""

METRICS = {BLOCKPRUNER: "perplexity", "blockpruner-by-bi": "Block Influence", "blockpruner-by-rm": "relative magnitude"}
RATIOS = {name: METHODS[name].title for name in (BLOCKPRUNER, "shortgpt", "relative-magnitude", GREEDY_LAYERS)}


def _timed(evidence: Evidence) -> bool:
    return {TIMED, MAIN} <= evidence.dense.races.keys()


def _measured(*methods: str) -> Callable[[Evidence], bool]:
    return lambda evidence: all(len(evidence.of(method)) > 0 for method in methods)


SCATTERS: tuple[PaperFigure, ...] = (
    PaperFigure(
        "quality-speed",
        "Quality against speed",
        "Held-out perplexity against the speed of generation, lower and further right is better; numbers at the marks: "
        "% of the parameters removed; lines: 95 % intervals of speed. Left: every budget of the methods timed at all "
        "budgets; right: all methods at the budget of Table 1, in Table 6’s setting. The star is the dense model, the "
        "ring the recommended stopping point.",
        _scatters(lambda race: (race.speedup("generation"), race.interval("generation")), "generation, × dense"),
        _timed,
        "no model is timed",
        5.6,
    ),
    PaperFigure(
        "quality-memory",
        "Quality against memory",
        "The same against the memory of weights and KV cache (on a GPU: the allocated peak), lower and further left is "
        "better.",
        _scatters(lambda race: (race.pruned.memory_bytes / 2**20, None), "memory, MiB"),
        _timed,
        "no model is timed",
        5.6,
    ),
)


HEALING = PaperFigure(
    "healing",
    "Search and healing",
    "Held-out perplexity and p of the right answer (± 1 standard error) where blocks or layers are removed by several "
    "searches: as pruned (hollow), compensated (half filled), and trained after that (filled). Marks and colours are "
    "the same on both sides; on the right they are moved sideways, so that they do not cover each other.",
    (("", partial(_healing, False)), ("", partial(_healing, True))),
    lambda evidence: bool(evidence.healed),
    "the study heals no model",
    4.0,
)

FIGURES: tuple[PaperFigure, ...] = (
    PaperFigure(
        "figure1",
        "Figure 1. Block Influence",
        "Block Influence of each layer, and of each MHA and MLP block, in the dense model: 1 − mean cosine of the "
        "states before and after it.",
        (("layers", partial(_influence, "shortgpt")), ("blocks", partial(_influence, "blockpruner-by-bi"))),
        lambda e: all(m in e.searches and e.searches[m].first for m in ("shortgpt", "blockpruner-by-bi")),
        "the study has no search by Block Influence of layers and of blocks",
    ),
    PaperFigure(
        "figure4",
        "Figure 4. MHA only, MLP only, both",
        "Average accuracy (± 1 standard error) and held-out perplexity where only one kind of block may be removed.",
        _curves(BALANCE),
        _measured("mha-only", "mlp-only"),
        "the study has no search of one kind of block",
    ),
    PaperFigure(
        "figure5",
        "Figure 5. Share of MHA along the sequence",
        "Share of MHA among the blocks removed so far by BlockPruner; dotted: the budgets measured.",
        (("", _share),),
        lambda e: BLOCKPRUNER in e.searches,
        "the study has no search by BlockPruner",
    ),
    PaperFigure(
        "figure6",
        "Figure 6. Perplexity, Block Influence, relative magnitude",
        "The same greedy search by three metrics: average accuracy (± 1 standard error) and held-out perplexity.",
        _curves(METRICS),
        _measured("blockpruner-by-bi", "blockpruner-by-rm"),
        "the study has no greedy search by BI and RM",
    ),
    PaperFigure(
        "figure7",
        "Figure 7. Calibration: size and source",
        "BlockPruner calibrated on each set, at the budget of the sensitivity study: average accuracy (± 1 standard "
        "error) and held-out perplexity; the square is the run’s own calibration.",
        (("", partial(_levels, True)), ("", partial(_levels, False))),
        lambda e: bool(e.varied(BLOCKPRUNER, "calibration")) and e.at(BLOCKPRUNER, e.study.sensitivity) is not None,
        "the study varies no calibration",
    ),
    PaperFigure(
        "figure10",
        "Figure 10. Methods over ratios",
        "Average accuracy (± 1 standard error) and held-out perplexity of each method at its budgets.",
        _curves(RATIOS),
        _measured(BLOCKPRUNER, "shortgpt"),
        "the study has no curves",
    ),
)
