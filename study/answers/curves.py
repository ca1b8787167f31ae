"""What methods lose at each size: tables and the figure of quality.

Decides at which sizes methods are compared.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import cycle, product

import numpy as np
import pandas as pd

from blockpruner.core.blocks import parse_mask
from blockpruner.core.errors import extra
from blockpruner.methods.recipes import BLOCKPRUNER, RECIPES
from blockpruner.reporting import plots
from blockpruner.reporting.frames import interval, table_of_frame, table_of_lines
from blockpruner.reporting.plots import INK, MANY_MARKS, MARKS, REMOVED, Plot
from blockpruner.reporting.table import Table
from study.points import Points

with extra("report"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLAIN, REFIT, TRAINED = HEALS = "plain", "refit", "trained"
"""How methods are compared."""
SIZES = (0.1, 0.2, 0.3)
TITLES = {
    "floating": "floating search",
    "greedy-shifted": "greedy shifted layers",
    "blockpruner-by-kl": "BlockPruner by KL",
}
SEARCHED, MASKS, CRITICAL, HEALING = "12 samples", "masks", "critical", "healing"
"""Names of calibrations: that of searches which are compared, of given masks of one size, of single
blocks, and of masks that are healed in each way."""
ALONE = (BLOCKPRUNER, "mha-only", "mlp-only")
TOP = 10.0
"""The axis of perplexity, × dense, ends here: beyond, a model is broken."""

MEASURED_NOTE = (
    "× the dense model, every kind of text alike, at the share removed on average over draws."
    " Brackets: 95 % over draws and documents together; of one draw over documents alone."
)
SIZES_NOTE = (
    "× the dense model, every kind of text alike, at 10, 20 and 30 % of all parameters removed:"
    " between the sizes measured, by monotone cubic curves of each row's loss. Brackets: 95 % over"
    " draws and documents together. Draws without a model of a size do not count there; of one"
    " draw, brackets are over documents alone."
)
TRAINED_NOTE = "Perplexity of the trained model over that of the refitted one; brackets as above."
QUALITY_CAPTION = (
    "Perplexity on the test texts over the share of parameters removed; bands hold all draws. What"
    " lies above the axes is in the table."
)

Marks = Mapping[str, tuple[str, str]]
"""Colour and shape by method."""


def title_of(method: str) -> str:
    if method in TITLES:
        return TITLES[method]
    return RECIPES[method].title if method in RECIPES else method.replace("-", " ")


def is_measured(rises: np.ndarray) -> bool:
    """Whether any draw has a model of the size."""
    return bool(len(rises)) and not np.isnan(rises).any(axis=1).all()


def at_size(points: Points, key: str, size: float, **columns: object) -> dict[str, float]:
    """What a method loses at a size, with its interval; nothing where no draw has a model of the
    size."""
    rises = points.curve(size, **columns)
    return interval(key, points.against(rises)) if is_measured(rises) else {}


def compared(points: Points) -> Sequence[str]:
    """The methods that are compared with each other, in order."""
    return points.compared or tuple(points.frame["method"].unique())


def own_calibration(points: Points) -> pd.DataFrame:
    """The models of the run's own calibration."""
    return points.frame[points.frame["calibration"] == ""]


def measured(points: Points) -> Table:
    """Perplexity over dense of every method at every size that was measured, over all kinds of text
    alike."""
    lines = []
    for key, models in points.frame.groupby(["budget", "calibration", "heal", "method"]):
        budget, calibration, heal, method = key
        # Two experiments may have measured the same draw.
        draws = models.drop_duplicates("seed")
        rises = np.stack(draws["nll"]) - points.dense["nll"]
        line: dict[str, object] = {
            "budget": budget,
            "calibration": calibration,
            "method": title_of(method),
            "healing": heal,
            "removed_pct": 100 * draws["ratio"].mean(),
            "draws": len(draws),
        }
        lines.append(line | interval("heldout_x", points.against(rises)))
    frame = pd.DataFrame(lines)
    return table_of_frame("sizes", "Methods at the sizes measured", frame, MEASURED_NOTE)


def sizes(points: Points) -> list[Table]:
    """Perplexity over dense at each size, plain and refitted, over all kinds of text alike: of the
    methods that the study compares, and of all others; or of every method at the sizes measured."""
    if not points.compared:
        return [measured(points)]
    methods = own_calibration(points)["method"].unique()
    variants = [method for method in methods if method not in points.compared]
    tables = (
        _sizes_table(points, "sizes", "Methods at equal size", points.compared),
        _sizes_table(points, "variants", "Other methods at equal size", variants),
    )
    return [table for table in tables if table is not None]


def _sizes_table(points: Points, name: str, title: str, methods: Sequence[str]) -> Table | None:
    lines = []
    frame = own_calibration(points)
    heals = [heal for heal in (PLAIN, REFIT) if (frame["heal"] == heal).any()]
    for method in methods:
        models = frame[frame["method"] == method]
        if models.empty:
            continue
        line: dict[str, object] = {"method": title_of(method), "draws": models["seed"].nunique()}
        for heal, size in product(heals, SIZES):
            key = f"{heal}_{100 * size:.0f}_pct_x"
            line |= at_size(points, key, size, method=method, heal=heal, calibration="")
        lines.append(line)
    return table_of_lines(name, title, lines, SIZES_NOTE)


def healing(points: Points) -> Table | None:
    """What each healing makes of the same masks of BlockPruner, at each size."""
    lines = []
    frame = points.frame[points.frame["calibration"] == HEALING]
    for heal in frame["heal"].unique():
        line: dict[str, object] = {"healing": heal, "draws": frame["seed"].nunique()}
        columns = {"method": BLOCKPRUNER, "heal": heal, "calibration": HEALING}
        for size in SIZES:
            line |= at_size(points, f"{100 * size:.0f}_pct_x", size, **columns)
        lines.append(line)
    title = f"{title_of(BLOCKPRUNER)}, healed in each way"
    return table_of_lines("healing", title, lines, SIZES_NOTE)


def trained(points: Points) -> Table | None:
    """What training adds to a refit of the same masks, over the draws that have both."""
    lines = []
    frame = own_calibration(points)
    refitted = frame[frame["heal"] == REFIT]
    both = frame[frame["heal"] == TRAINED].merge(
        refitted, on=["method", "seed", "budget", "ratio"], suffixes=("", "_refit")
    )
    # The refitted model stands in for the dense one, so the curves are of what training adds.
    pairs = zip(both["nll"], both["nll_refit"], strict=True)
    both["nll"] = [
        points.dense["nll"] + trained_nll - refitted_nll for trained_nll, refitted_nll in pairs
    ]
    changes = replace(points, frame=both)
    for method in compared(points):
        models = both[both["method"] == method]
        if models.empty:
            continue
        line: dict[str, object] = {"method": title_of(method), "draws": models["seed"].nunique()}
        for size in SIZES:
            line |= at_size(changes, f"at_{100 * size:.0f}", size, method=method)
        lines.append(line)
    return table_of_lines("trained", "Trained after a refit", lines, TRAINED_NOTE)


def texts(points: Points, size: float) -> Table | None:
    """What methods lose at one size on each kind of text."""
    lines = []
    frame = own_calibration(points)
    frame = frame[frame["method"].isin(compared(points)) & frame["heal"].isin(HEALS)]
    for (heal, method), models in frame.groupby(["heal", "method"], sort=False):
        rises = points.curve(size, method=method, heal=heal, calibration="")
        if not is_measured(rises):
            continue
        line = {"method": title_of(method), "healing": heal, "draws": models["seed"].nunique()}
        for kind in points.texts:
            line |= interval(f"{kind}_x", points.against(rises, kind=kind))
        lines.append(line)
    title = f"By kind of text at {size:.0%} removed"
    note = "× the dense model; brackets as above."
    return table_of_lines(f"texts-{100 * size:.0f}", title, lines, note)


def quality(points: Points, name: str, methods: Sequence[str]) -> Plot | None:
    """Perplexity over the share removed, a panel for each healing of a method other than
    BlockPruner; bands are the range over draws."""
    frame = own_calibration(points)
    frame = frame[frame["method"].isin(methods)]
    heals = list(frame[frame["method"] != BLOCKPRUNER]["heal"].unique())
    if not heals:
        return None
    frame = frame.assign(x=points.ratios(frame))
    top = min(TOP, 1.05 * frame["x"].max())
    marks = _marks(methods)

    def fill(figure: Figure) -> None:
        grid = figure.subplots(1, len(heals), squeeze=False, sharex=True, sharey=True)
        panels = grid[0]
        for axes, heal in zip(panels, heals, strict=True):
            _draw_panel(axes, frame[frame["heal"] == heal], marks, top)
            axes.set_title(heal)
            plots.label_(axes, REMOVED)
        panels[0].set_ylabel("perplexity, × dense")
        # A panel may lack a method, so the legend is of all panels.
        lines = {line.get_label(): line for panel in panels for line in panel.get_lines()}
        panels[-1].legend(handles=lines.values(), loc="upper left", bbox_to_anchor=(1.01, 1.0))

    return plots.render(name, QUALITY_CAPTION, (4.6 * len(heals) + 2.5, 4.4), fill)


def _marks(methods: Sequence[str]) -> Marks:
    # BlockPruner has the same mark in every figure.
    names = dict.fromkeys((BLOCKPRUNER, *reversed(methods)))
    marks = cycle((*MARKS, (INK, "D"), *MANY_MARKS[len(MARKS) :]))
    return dict(zip(names, marks, strict=False))


def _draw_panel(axes: Axes, frame: pd.DataFrame, marks: Marks, top: float) -> None:
    """Draw the mean over draws of each method, and their range as a band."""
    for method, models in frame.groupby("method", sort=False):
        # A method that is broken at every size would be a line outside the axes.
        if models["x"].min() > top:
            continue
        line = models.groupby("budget").agg({"ratio": "mean", "x": ["mean", "min", "max"]})
        line = line.sort_values(("ratio", "mean"))
        colour, shape = marks[method]
        removed, ratios = 100 * line["ratio", "mean"], line["x"]
        label = title_of(method)
        axes.plot(removed, ratios["mean"], color=colour, marker=shape, markersize=4, label=label)
        band = {"color": colour, "alpha": 0.2, "linewidth": 0}
        axes.fill_between(removed, ratios["min"], ratios["max"], **band)
    plots.scale_(axes, [1.0, top])
    axes.set_ylim(1, top)


def blocks(points: Points) -> Plot | None:
    """How often BlockPruner removes each block for one budget, over draws."""
    budget = "0.22"
    frame = own_calibration(points)
    frame = frame[(frame["method"] == BLOCKPRUNER) & (frame["heal"] == PLAIN)]
    frame = frame[(frame["budget"] == budget) & (frame["plan"] != "")]
    if frame.empty:
        return None
    masks = [parse_mask(plan.replace(" ", ",")) for plan in frame["plan"]]
    counts = Counter(block for mask in masks for block in mask)
    shares = {block: count / len(frame) for block, count in counts.items()}
    layers = max(block.layer for block in shares) + 1
    caption = (
        f"In what share of {len(frame)} draws {title_of(BLOCKPRUNER)} removes each block, for a"
        f" budget of {budget}."
    )
    return plots.block_map(f"blocks-{BLOCKPRUNER}", caption, layers, shares)
