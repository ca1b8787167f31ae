"""The figures of the paper and the plots that go beyond it, each a panel for every computed run of a set.

Decides what is drawn. A figure is one row of FIGURES; how a figure becomes bytes is decided in `reporting.plots`. The
paper's figures are curves without published numbers, so that only what is measured here is in them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from blockpruner.core.blocks import BlockKind, parse_mask
from blockpruner.paper.advice import advice
from blockpruner.paper.beyond import Found
from blockpruner.paper.evidence import Entry, Evidence, Model, Pace
from blockpruner.paper.experiments import BLOCKPRUNER
from blockpruner.reporting.plots import BLUE, GREY, INK, MARKS, ORANGE, Plot, grid_, render, scale_

Draw = Callable[[Axes, Evidence], None]
REMOVED = "parameters removed, %"


@dataclass(frozen=True)
class PaperFigure:
    """panels: (title, what draws it) of one run; has: whether a study measured it; missing: why one did not."""

    name: str
    title: str
    caption: str
    panels: tuple[tuple[str, Draw], ...]
    has: Callable[[Evidence], bool]
    missing: str
    height: float = 3.2


@dataclass(frozen=True)
class Drawn:
    """A figure, or the sentence that says why there is none."""

    figure: PaperFigure
    plot: Plot | None


def draw(figure: PaperFigure, found: Found) -> Drawn:
    """One row of panels for each run that has it."""
    shown = [(model, evidence) for model, evidence in found if figure.has(evidence)]
    if not shown:
        return Drawn(figure, None)
    count = len(figure.panels)

    def fill(canvas: Figure) -> None:
        grid = canvas.subplots(len(shown), count, squeeze=False)
        for row, (model, evidence) in zip(grid, shown, strict=True):
            for axes, (title, panel) in zip(row, figure.panels, strict=True):
                grid_(axes)
                panel(axes, evidence)
                axes.set_title(" · ".join(part for part in (model, title) if part))

    width = max(10.0, 5.0 * count)
    return Drawn(figure, render(figure.name, figure.caption, True, (width, figure.height * len(shown)), fill))


def _influence(method: str) -> Draw:
    """Figure 1: the influence of each unit of the dense model, from a search's first iteration."""

    def panel(axes: Axes, evidence: Evidence) -> None:
        first = evidence.searches[method].first
        by_kind: dict[str, dict[int, float]] = {}
        for unit, value in first.items():
            blocks = sorted(parse_mask(unit), key=lambda block: block.order)
            title = "layer" if len(blocks) > 1 else blocks[0].kind.upper()
            by_kind.setdefault(title, {})[blocks[0].layer] = value
        for (title, values), (colour, shape) in zip(sorted(by_kind.items()), MARKS, strict=False):
            axes.plot(
                *zip(*sorted(values.items()), strict=True),
                color=colour,
                marker=shape,
                markersize=4,
                linewidth=1.2,
                label=title,
            )
        axes.set_yscale("log")
        axes.set_xlabel("layer")
        axes.set_ylabel("Block Influence")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()

    return panel


Of = Callable[[Model], float]


def _accuracy(model: Model) -> float:
    return 100 * model.average


def _perplexity(model: Model) -> float:
    return model.perplexity


def _curves(methods: Mapping[str, str], of: Of, title: str) -> Draw:
    """Quality against ratio, a line for each method, all from the dense model. methods: to what they are called."""

    def panel(axes: Axes, evidence: Evidence) -> None:
        shown = [of(evidence.dense)]
        for (method, name), (colour, shape) in zip(methods.items(), MARKS, strict=False):
            entries = evidence.of(method)
            if not entries:
                continue
            values = [of(evidence.dense), *(of(entry.model) for entry in entries)]
            errors = [100 * model.stderr for model in (evidence.dense, *(entry.model for entry in entries))]
            axes.errorbar(
                [0.0, *(100 * entry.ratio for entry in entries)], values,
                [error if np.isfinite(error) else 0.0 for error in errors] if of is _accuracy else None,
                color=colour, marker=shape, markersize=5, linewidth=1.3, capsize=2, elinewidth=0.8, label=name,
            )  # fmt: skip
            shown += values
        if of is _perplexity:
            scale_(axes, shown)
        axes.set_xlabel(REMOVED)
        axes.set_ylabel(title)
        axes.legend()

    return panel


KINDS = {"MHA only": "MHA only", "MLP only": "MLP only", BLOCKPRUNER: "both (BlockPruner)"}
METRICS = {BLOCKPRUNER: "perplexity", "BlockPruner by BI": "Block Influence", "BlockPruner by RM": "relative magnitude"}
RATIOS = {name: name for name in (BLOCKPRUNER, "ShortGPT", "Relative Magnitude", "greedy layers (SLEB)")}
ACCURACY, PERPLEXITY = "average accuracy, %", "held-out perplexity"


def _share(axes: Axes, evidence: Evidence) -> None:
    """Figure 5: MHA among the blocks removed so far."""
    order = [block for unit in evidence.searches[BLOCKPRUNER].order for block in parse_mask(unit)]
    mha = np.cumsum([block.kind is BlockKind.MHA for block in order])
    steps = np.arange(1, len(order) + 1)
    axes.plot(steps, 100 * mha / steps, color=BLUE, marker="o", markersize=3.5, linewidth=1.2)
    for entry in evidence.of(BLOCKPRUNER):
        count = sum(entry.plan.blocks.values())
        if 0 < count <= len(steps):
            axes.axvline(count, color=GREY, linestyle=":", linewidth=0.9)
            axes.annotate(f"{100 * entry.ratio:.0f} %", (count, 3), fontsize=7.5, ha="right", rotation=90)
    axes.set_ylim(0, 104)
    axes.set_xlabel("blocks removed")
    axes.set_ylabel("MHA among them, %")


def _levels(of: Of, title: str) -> Draw:
    """Figure 7: every calibration set at the budget of the sensitivity study."""

    def panel(axes: Axes, evidence: Evidence) -> None:
        base = evidence.at(BLOCKPRUNER, evidence.sensitivity)
        assert base is not None
        entries = [base, *evidence.varied(BLOCKPRUNER, "calibration")]
        entries.sort(key=lambda entry: evidence.searches[entry.variant.name].tokens)
        names = [
            f"{entry.variant.level or 'base'} ({evidence.searches[entry.variant.name].tokens:,} tokens)"
            for entry in entries
        ]
        errors = [100 * e.model.stderr if of is _accuracy and np.isfinite(e.model.stderr) else 0.0 for e in entries]
        for i, (entry, error) in enumerate(zip(entries, errors, strict=True)):
            colour, shape = (ORANGE, "s") if entry is base else (BLUE, "o")
            axes.errorbar(
                of(entry.model),
                i,
                xerr=error or None,
                color=colour,
                marker=shape,
                markersize=6,
                capsize=3,
                linestyle="none",
            )
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel(title)

    return panel


def _rate(pace: Pace) -> float:
    return pace.rate("decode")


def _memory(pace: Pace) -> float:
    return pace.memory_bytes / 2**20


def _scatter(setting: str, of: Callable[[Pace], float], title: str) -> Draw:
    """Held-out perplexity against what a model costs to run, a marker a method, labels the ratio."""

    def panel(axes: Axes, evidence: Evidence) -> None:
        dense = evidence.speeds[setting]
        axes.plot(of(dense), evidence.dense.perplexity, "*", color=INK, markersize=11, label="dense")
        by_method: dict[str, list[Entry]] = {}
        for entry in evidence.timed(setting):
            by_method.setdefault(entry.method, []).append(entry)
        shown = [evidence.dense.perplexity]
        for (method, entries), (colour, shape) in zip(by_method.items(), _marks(len(by_method)), strict=True):
            x = [of(entry.model.races[setting].pruned) for entry in entries]
            y = [entry.model.perplexity for entry in entries]
            line = "-" if len(entries) > 1 else "none"
            axes.plot(x, y, line, color=colour, marker=shape, markersize=6.5, linewidth=0.7, label=method)
            if len(entries) > 1:
                for entry, at in zip(entries, zip(x, y, strict=True), strict=True):
                    axes.annotate(f"{100 * entry.ratio:.0f}", at, xytext=(5, 4), textcoords="offset points", fontsize=8)
            shown += y
        best = advice(evidence).best
        if best is not None and setting in best.model.races:
            axes.plot(
                of(best.model.races[setting].pruned), best.model.perplexity, "o", markersize=14, markerfacecolor="none",
                markeredgecolor=ORANGE, markeredgewidth=1.8,
            )  # fmt: skip
        scale_(axes, shown)
        axes.margins(x=0.08, y=0.12)
        axes.set_xlabel(title)
        axes.set_ylabel(PERPLEXITY)
        axes.legend(fontsize=7.5)

    return panel


def _marks(count: int) -> list[tuple[str, str]]:
    """MARKS, then again in the other order of shapes, so that twice as many methods stay apart."""
    shapes = [shape for _, shape in MARKS]
    again = [(colour, shape) for (colour, _), shape in zip(MARKS, shapes[3:] + shapes[:3], strict=True)]
    return [*MARKS, *again][:count]


SCATTERS: tuple[PaperFigure, ...] = (
    PaperFigure(
        "quality-speed",
        "Quality against tokens per second",
        "Held-out perplexity against decoding speed, lower and further right is better; numbers at the dots: % of the "
        "parameters removed. Left: every budget of the methods timed at all budgets; right: all methods at the budget "
        "of Table 1, in Table 6’s setting. The star is the dense model, the ring the recommended stopping point. "
        "Tokens/s of models timed minutes apart drift with the machine; the speed-ups in the table are measured in "
        "turns.",
        (
            ("every budget", _scatter("timed", _rate, "decode, tokens/s")),
            ("all methods", _scatter("main", _rate, "decode, tokens/s")),
        ),
        lambda e: {"timed", "main"} <= e.speeds.keys(),
        "no model is timed",
        4.4,
    ),
    PaperFigure(
        "quality-memory",
        "Quality against memory",
        "The same against the memory of weights and KV cache (on a GPU: the allocated peak), lower and further left is "
        "better.",
        (
            ("every budget", _scatter("timed", _memory, "memory, MiB")),
            ("all methods", _scatter("main", _memory, "memory, MiB")),
        ),
        lambda e: {"timed", "main"} <= e.speeds.keys(),
        "no model is timed",
        4.4,
    ),
)


def _measured(*methods: str) -> Callable[[Evidence], bool]:
    return lambda evidence: all(len(evidence.of(method)) > 0 for method in methods)


FIGURES: tuple[PaperFigure, ...] = (
    PaperFigure(
        "figure1",
        "Figure 1. Block Influence",
        "Block Influence of each layer, and of each MHA and MLP block, in the dense model: 1 − mean cosine of the "
        "states before and after it.",
        (("layers", _influence("ShortGPT")), ("blocks", _influence("BlockPruner by BI"))),
        lambda e: all(m in e.searches and e.searches[m].first for m in ("ShortGPT", "BlockPruner by BI")),
        "the study has no search by Block Influence of layers and of blocks",
    ),
    PaperFigure(
        "figure4",
        "Figure 4. MHA only, MLP only, both",
        "Average accuracy (± 1 standard error) and held-out perplexity where only one kind of block may be removed.",
        (("", _curves(KINDS, _accuracy, ACCURACY)), ("", _curves(KINDS, _perplexity, PERPLEXITY))),
        _measured("MHA only", "MLP only"),
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
        (("", _curves(METRICS, _accuracy, ACCURACY)), ("", _curves(METRICS, _perplexity, PERPLEXITY))),
        _measured("BlockPruner by BI", "BlockPruner by RM"),
        "the study has no greedy search by BI and RM",
    ),
    PaperFigure(
        "figure7",
        "Figure 7. Calibration: size and source",
        "BlockPruner calibrated on each set, at the budget of the sensitivity study: average accuracy (± 1 standard "
        "error) and held-out perplexity; the square is the run’s own calibration.",
        (("", _levels(_accuracy, ACCURACY)), ("", _levels(_perplexity, PERPLEXITY))),
        lambda e: bool(e.varied(BLOCKPRUNER, "calibration")) and e.at(BLOCKPRUNER, e.sensitivity) is not None,
        "the study varies no calibration",
    ),
    PaperFigure(
        "figure8",
        "Figure 8. Recovery by LoRA",
        "",
        (),
        lambda e: False,
        "a study trains no model; targets with recover: true are, and their report has the results before and after",
    ),
    PaperFigure(
        "figure10",
        "Figure 10. Methods over ratios",
        "Average accuracy (± 1 standard error) and held-out perplexity of each method at its budgets.",
        (("", _curves(RATIOS, _accuracy, ACCURACY)), ("", _curves(RATIOS, _perplexity, PERPLEXITY))),
        _measured(BLOCKPRUNER, "ShortGPT"),
        "the study has no curves",
    ),
)


def figures(found: Sequence[tuple[str, Evidence]]) -> list[Drawn]:
    return [draw(figure, found) for figure in FIGURES]


def scatters(found: Sequence[tuple[str, Evidence]]) -> list[Drawn]:
    return [draw(figure, found) for figure in SCATTERS]
