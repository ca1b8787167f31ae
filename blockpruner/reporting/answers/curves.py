"""What methods lose at each size: tables and the figure of quality.

Decides at which sizes methods are compared.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle, product

import numpy as np
import pandas as pd

from blockpruner.core.blocks import parse_mask
from blockpruner.core.errors import extra
from blockpruner.methods.recipes import BLOCKPRUNER, RECIPES
from blockpruner.reporting import plots
from blockpruner.reporting.paper.frames import table_of_frame
from blockpruner.reporting.paper.tables import interval
from blockpruner.reporting.plots import INK, MANY_MARKS, MARKS, REMOVED, Plot
from blockpruner.reporting.points import Points
from blockpruner.reporting.table import Table

with extra("report"):
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


def title_of(method: str) -> str:
    return TITLES.get(method) or (
        RECIPES[method].title if method in RECIPES else method.replace("-", " ")
    )


def known(rises: np.ndarray) -> bool:
    """Whether any draw has a model of the size."""
    return bool(len(rises)) and not np.isnan(rises).any(axis=1).all()


def at_size(points: Points, key: str, size: float, **where: object) -> dict[str, float]:
    """What a method loses at a size, with its interval; nothing where no draw has a model of the
    size."""
    rises = points.curve(size, **where)
    return interval(key, points.against(rises) if known(rises) else None)


def compared(points: Points) -> Sequence[str]:
    """The methods that are compared with each other, in order."""
    return points.compared or tuple(points.frame["method"].unique())


def measured(points: Points) -> Table:
    """Perplexity over dense of every method at every size that was measured, over all kinds of text
    alike."""
    lines = []
    for key, cells in points.frame.groupby(["budget", "calibration", "heal", "method"]):
        budget, calibration, heal, method = key
        cells = cells.drop_duplicates("seed")
        rises = np.stack(cells["nll"]) - points.dense["nll"]
        line: dict[str, object] = {
            "budget": budget,
            "calibration": calibration,
            "method": title_of(method),
        }
        line |= {
            "healing": heal,
            "removed_pct": 100 * cells["ratio"].mean(),
            "draws": cells["seed"].nunique(),
        }
        lines.append(line | interval("heldout_x", points.against(rises)))
    return table_of_frame(
        "sizes", "Methods at the sizes measured", pd.DataFrame(lines), MEASURED_NOTE
    )


def sizes(points: Points) -> list[Table]:
    """Perplexity over dense at each size, plain and refitted, over all kinds of text alike: of the
    methods that the study compares, and of all others; or of every method at the sizes measured."""
    if not points.compared:
        return [measured(points)]
    own, found = points.frame[points.frame["calibration"] == ""], []
    variants = [method for method in own["method"].unique() if method not in points.compared]
    titles = (
        ("sizes", "Methods at equal size", points.compared),
        ("variants", "Other methods at equal size", variants),
    )
    for name, title, methods in titles:
        lines = []
        for method in (method for method in methods if (own["method"] == method).any()):
            line: dict[str, object] = {"method": title_of(method)}
            line["draws"] = own[own["method"] == method]["seed"].nunique()
            for heal, size in product(
                (heal for heal in (PLAIN, REFIT) if (own["heal"] == heal).any()), SIZES
            ):
                line |= at_size(
                    points,
                    f"{heal}_{100 * size:.0f}_pct_x",
                    size,
                    method=method,
                    heal=heal,
                    calibration="",
                )
            lines.append(line)
        found += [table_of_frame(name, title, pd.DataFrame(lines), SIZES_NOTE)] if lines else []
    return found


def healing(points: Points, method: str = BLOCKPRUNER) -> Table | None:
    """What each healing makes of the same masks, at each size."""
    own, lines = points.frame[points.frame["calibration"] == HEALING], []
    for heal in own["heal"].unique():
        line: dict[str, object] = {"healing": heal, "draws": own["seed"].nunique()}
        for size in SIZES:
            line |= at_size(
                points,
                f"{100 * size:.0f}_pct_x",
                size,
                method=method,
                heal=heal,
                calibration=HEALING,
            )
        lines.append(line)
    title = f"{title_of(method)}, healed in each way"
    return table_of_frame("healing", title, pd.DataFrame(lines), SIZES_NOTE) if lines else None


def trained(points: Points) -> Table | None:
    """What training adds to a refit of the same masks, over the draws that have both."""
    own = points.frame[points.frame["calibration"] == ""]
    refit, after = (own[own["heal"] == heal] for heal in (REFIT, TRAINED))
    both = after.merge(refit, on=["method", "seed", "budget", "ratio"], suffixes=("", "_refit"))
    both["nll"] = [
        points.dense["nll"] + row["nll"] - row["nll_refit"] for _, row in both.iterrows()
    ]
    lines, changes = [], replace(points, frame=both)
    for method in (method for method in compared(points) if (both["method"] == method).any()):
        line: dict[str, object] = {"method": title_of(method)}
        line["draws"] = both[both["method"] == method]["seed"].nunique()
        for size in SIZES:
            line |= at_size(changes, f"at_{100 * size:.0f}", size, method=method)
        lines.append(line)
    note = "Perplexity of the trained model over that of the refitted one; brackets as above."
    return (
        table_of_frame("trained", "Trained after a refit", pd.DataFrame(lines), note)
        if lines
        else None
    )


ALONE = (BLOCKPRUNER, "mha-only", "mlp-only")
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


def texts(points: Points, size: float) -> Table | None:
    """What methods lose at one size on each kind of text."""
    lines = []
    frame = points.frame[
        (points.frame["calibration"] == "") & points.frame["method"].isin(compared(points))
    ]
    frame = frame[frame["heal"].isin(HEALS)]
    for (heal, method), own in frame.groupby(["heal", "method"], sort=False):
        rises = points.curve(size, method=method, heal=heal, calibration="")
        if known(rises):
            effects = {kind: points.against(rises, kind=kind) for kind in points.texts}
            line = {"method": title_of(method), "healing": heal, "draws": own["seed"].nunique()}
            lines.append(
                line
                | {k: v for kind, e in effects.items() for k, v in interval(f"{kind}_x", e).items()}
            )
    name = f"By kind of text at {size:.0%} removed"
    note = "× the dense model; brackets as above."
    return (
        table_of_frame(f"texts-{100 * size:.0f}", name, pd.DataFrame(lines), note)
        if lines
        else None
    )


def quality(points: Points, name: str, methods: Sequence[str]) -> Plot | None:
    """Perplexity over the share removed, a panel for each healing of a method other than
    BlockPruner; bands are the range over draws."""
    frame = points.frame[points.frame["calibration"] == ""]
    frame = frame[frame["method"].isin(methods)]
    heals = list(frame[frame["method"] != BLOCKPRUNER]["heal"].unique())
    if not heals:
        return None
    names = dict.fromkeys((BLOCKPRUNER, *reversed(methods)))
    marks = dict(zip(names, cycle((*MARKS, (INK, "D"), *MANY_MARKS[len(MARKS) :])), strict=False))
    top = min(TOP, 1.05 * max(points.over(nll - points.dense["nll"]) for nll in frame["nll"]))

    def fill(figure: Figure) -> None:
        panels = figure.subplots(1, len(heals), squeeze=False, sharex=True, sharey=True)[0]
        for axes, heal in zip(panels, heals, strict=True):
            for method, own in frame[frame["heal"] == heal].groupby("method", sort=False):
                own = own.assign(x=[points.over(nll - points.dense["nll"]) for nll in own["nll"]])
                if own["x"].min() > top:
                    continue
                line = own.groupby("budget").agg({"ratio": "mean", "x": ["mean", "min", "max"]})
                line = line.sort_values(("ratio", "mean"))
                colour, shape = marks[method]
                at = 100 * line["ratio", "mean"]
                axes.plot(
                    at,
                    line["x", "mean"],
                    color=colour,
                    marker=shape,
                    markersize=4,
                    label=title_of(method),
                )
                axes.fill_between(
                    at, line["x", "min"], line["x", "max"], color=colour, alpha=0.2, linewidth=0
                )
            plots.scale_(axes, [1.0, top])
            axes.set_ylim(1, top)
            axes.set_title(heal)
            plots.label_(axes, REMOVED, "perplexity, × dense" if axes is panels[0] else "")
        # not all are in each panel
        lines = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
        axes.legend(handles=lines.values(), loc="upper left", bbox_to_anchor=(1.01, 1.0))

    return plots.render(name, QUALITY_CAPTION, (4.6 * len(heals) + 2.5, 4.4), fill)


TOP = 10.0
"""The axis of perplexity, × dense, ends here: beyond, a model is broken."""
QUALITY_CAPTION = (
    "Perplexity on the test texts over the share of parameters removed; bands hold all draws. What"
    " lies above the axes is in the table."
)


def blocks(points: Points, method: str = "blockpruner", budget: str = "0.22") -> Plot | None:
    """How often each block goes, over draws."""
    own = points.frame[(points.frame["method"] == method) & (points.frame["heal"] == "plain")]
    own = own[(own["budget"] == budget) & (own["calibration"] == "")]
    own = own[own["plan"] != ""]
    if not len(own):
        return None
    gone = pd.Series(
        [block for plan in own["plan"] for block in parse_mask(plan.replace(" ", ","))]
    ).value_counts()
    shares = {block: count / len(own) for block, count in gone.items()}
    layers = max(block.layer for block in gone.index) + 1
    caption = (
        f"In what share of {len(own)} draws {title_of(method)} removes each block, for a budget of"
        f" {budget}."
    )
    return plots.block_map(f"blocks-{method}", caption, layers, shares)
