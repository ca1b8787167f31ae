"""The page of a study of experiments: verdicts, then tables and figures, made of points alone.

Decides which methods a claim compares and when it holds. A claim is judged on every kind of text and at every size;
Holm's correction covers all that is judged of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from blockpruner.core.blocks import parse_mask
from blockpruner.methods.recipes import RECIPES
from blockpruner.reporting import plots
from blockpruner.reporting.pages import Page, Section, write_page
from blockpruner.reporting.paper.frames import table_of_frame
from blockpruner.reporting.paper.tables import interval
from blockpruner.reporting.plots import MARKS, REMOVED, Plot
from blockpruner.reporting.points import Points
from blockpruner.reporting.statistics import Effect, holm
from blockpruner.reporting.table import Table, to_csv, to_markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZES = (0.1, 0.2, 0.3)
TITLES = {"greedy-shifted": "greedy shifted layers", "blockpruner-by-kl": "BlockPruner by KL"}
LEVEL = 0.05


@dataclass(frozen=True)
class Claim:
    """That one method loses less than another one."""

    words: str
    better: str
    worse: str


CLAIMS = (
    Claim("Blocks lose less than layers", "blockpruner", "greedy-layers"),
    Claim("Layers shifted by half of one lose less than layers", "greedy-shifted", "greedy-layers"),
    Claim("Blocks lose less than shifted layers", "blockpruner", "greedy-shifted"),
    Claim("Narrower MLPs lose less than blocks", "narrow", "blockpruner"),
    Claim("MHA alone loses less than MLP alone", "mha-only", "mlp-only"),
    Claim("Step by step loses less than one shot", "blockpruner", "one-shot-perplexity"),
    Claim("Perplexity finds better blocks than Block Influence", "blockpruner", "blockpruner-by-bi"),
    Claim("… than Relative Magnitude", "blockpruner", "blockpruner-by-rm"),
    Claim("… than Relative Magnitude by norms", "blockpruner", "blockpruner-by-rm-frobenius"),
    Claim("… than JS divergence", "blockpruner", "blockpruner-by-js"),
    Claim("… than KL divergence", "blockpruner", "blockpruner-by-kl"),
    Claim("BlockPruner loses less than SliceGPT", "blockpruner", "slicegpt"),
    Claim("… than LaCo", "blockpruner", "laco"),
    Claim("… than ShortGPT", "blockpruner", "shortgpt"),
    Claim("… than Relative Magnitude of layers", "blockpruner", "relative-magnitude"),
)


def title_of(method: str) -> str:
    return TITLES.get(method) or (RECIPES[method].title if method in RECIPES else method.replace("-", " "))


def sizes(points: Points) -> Table:
    """Perplexity over dense at each size, of each method and healing, over all kinds of text alike."""
    lines = []
    for (heal, method, calibration), own in points.frame.groupby(["heal", "method", "calibration"], sort=False):
        line: dict[str, object] = {"method": title_of(method), "calibration": calibration, "healing": heal}
        line["draws"] = own["seed"].nunique()
        for size in SIZES:
            rises = points.curve(size, method=method, heal=heal, calibration=calibration)
            line |= interval(f"at_{100 * size:.0f}_x", points.against(rises) if known(rises) else None)
        lines.append(line)
    return table_of_frame("sizes", "Perplexity at equal size", pd.DataFrame(lines), SIZES_NOTE)


SIZES_NOTE = (
    "× the dense model, every kind of text alike, at 10, 20 and 30 % of all parameters removed: between the sizes "
    "measured, by monotone cubic curves of each row's loss. Brackets: 95 % over draws and documents together."
)


def known(rises: np.ndarray) -> bool:
    return bool(len(rises)) and not np.isnan(rises).any()


def texts(points: Points, size: float = 0.2) -> Table:
    """The same at one size by kind of text."""
    lines = []
    for (heal, method), own in points.frame[points.frame["calibration"] == ""].groupby(["heal", "method"], sort=False):
        rises = points.curve(size, method=method, heal=heal, calibration="")
        if known(rises):
            effects = {kind: points.against(rises, kind=kind) for kind in points.texts}
            line = {"method": title_of(method), "healing": heal, "draws": own["seed"].nunique()}
            lines.append(line | {k: v for kind, e in effects.items() for k, v in interval(f"{kind}_x", e).items()})
    name = f"By kind of text at {size:.0%} removed"
    return table_of_frame("texts", name, pd.DataFrame(lines), "× the dense model; brackets as above.")


Cells = Mapping[tuple[float, str], tuple[Effect, float]]
"""By size and kind of text: the perplexity of the worse over that of the better, and the corrected p."""


def cells_of(points: Points, claim: Claim, heal: str) -> Cells:
    """Compare the methods of a claim wherever both were measured."""
    found = dict[tuple[float, str], Effect]()
    for size in SIZES:
        a, b = (points.curve(size, method=m, heal=heal, calibration="") for m in (claim.better, claim.worse))
        if known(a) and known(b):
            count = min(len(a), len(b))
            found |= {(size, kind): points.against(a[:count], b[:count], kind) for kind in points.texts}
    corrected = holm([effect.p for effect in found.values()])
    return {key: (effect, p) for (key, effect), p in zip(found.items(), corrected, strict=True)}


def verdict(cells: Cells) -> str:
    """Say where a claim holds, and where the opposite does."""
    signs = {key: 0 if p > LEVEL else 1 if effect.value > 1 else -1 for key, (effect, p) in cells.items()}
    if len(found := set(signs.values())) == 1:
        return {1: "holds", -1: "the opposite holds", 0: "no difference is seen"}[found.pop()]
    kinds = list(dict.fromkeys(kind for _, kind in signs))
    words = []
    for sign, word in ((1, "holds"), (-1, "the opposite")):
        where = []
        for size in dict.fromkeys(size for size, _ in signs):
            own = [kind for kind in kinds if signs[size, kind] == sign]
            if own:
                where.append(f"{size:.0%}" + ("" if len(own) == len(kinds) else f" on {', '.join(own)}"))
        words += [f"{word} at {'; '.join(where)}"] if where else []
    return ". ".join([*words, *(["Elsewhere no difference is seen"] if 0 in found else [])])


def claims(points: Points) -> Table:
    """Judge every claim of which something was measured."""
    lines = []
    for claim in CLAIMS:
        for heal in points.frame["heal"].unique():
            if not (cells := cells_of(points, claim, heal)):
                continue
            line: dict[str, object] = {"claim": claim.words, "healing": heal}
            for size in dict.fromkeys(size for size, _ in cells):
                a, b = (points.curve(size, method=m, heal=heal, calibration="") for m in (claim.better, claim.worse))
                count = min(len(a), len(b))
                line["draws"] = count
                line |= interval(f"at_{100 * size:.0f}", points.against(a[:count], b[:count]))
            lines.append(line | {"verdict": verdict(cells)})
    return table_of_frame("claims", "Claims", pd.DataFrame(lines), CLAIMS_NOTE)


CLAIMS_NOTE = (
    "Perplexity of the method that a claim calls worse, over that of the better one, every kind of text alike. The "
    "verdict is over every kind of text at every size by itself, 5 % with Holm's correction within the line."
)


def calibrations(points: Points, size: float = 0.1) -> Table | None:
    """What other calibration rows lose, over draws."""
    lines, frame = [], points.frame[points.frame["calibration"] != ""]
    for (heal, name, method), _ in frame.groupby(["heal", "calibration", "method"], sort=False):
        rises = points.curve(size, method=method, heal=heal, calibration=name)
        if known(rises):
            line = {"calibration": name, "method": title_of(method), "healing": heal, "draws": len(rises)}
            each = [points.over(rise) for rise in rises]
            line |= interval(f"at_{100 * size:.0f}_x", points.against(rises))
            lines.append(line | {"lowest": min(each), "highest": max(each)})
    if not lines:
        return None
    return table_of_frame("calibration", f"Calibration rows, {size:.0%} removed", pd.DataFrame(lines))


def quality(points: Points) -> Plot:
    """Perplexity over the share removed, a panel for each healing; bands are the range over draws."""
    frame = points.frame[points.frame["calibration"] == ""]
    heals = list(frame["heal"].unique())
    marks = dict(zip(frame["method"].unique(), MARKS * 3, strict=False))

    def fill(figure: Figure) -> None:
        for axes, heal in zip(figure.subplots(1, len(heals), squeeze=False, sharey=True)[0], heals, strict=True):
            for method, own in frame[frame["heal"] == heal].groupby("method", sort=False):
                own = own.assign(x=[points.over(nll - points.dense["nll"]) for nll in own["nll"]])
                line = own.groupby("budget").agg({"ratio": "mean", "x": ["mean", "min", "max"]})
                line = line.sort_values(("ratio", "mean"))
                colour, shape = marks[method]
                at = 100 * line["ratio", "mean"]
                axes.plot(at, line["x", "mean"], color=colour, marker=shape, markersize=4, label=title_of(method))
                axes.fill_between(at, line["x", "min"], line["x", "max"], color=colour, alpha=0.2, linewidth=0)
            most = max(points.over(nll - points.dense["nll"]) for nll in frame["nll"])
            plots.scale_(axes, [1.0, most])
            axes.set_ylim(1, min(30, 1.05 * most))
            axes.set_title(heal)
            plots.label_(axes, REMOVED, "perplexity, × dense")
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))

    return plots.render("quality", QUALITY_CAPTION, (4.6 * len(heals) + 2.5, 4.4), fill)


QUALITY_CAPTION = "Perplexity on the test texts over the share of parameters removed; bands hold all draws."


def blocks(points: Points, method: str = "blockpruner", budget: str = "0.22") -> Plot | None:
    """How often each block goes, over draws."""
    own = points.frame[(points.frame["method"] == method) & (points.frame["heal"] == "plain")]
    own = own[(own["budget"] == budget) & (own["calibration"] == "")]
    own = own[own["plan"] != ""]
    if not len(own):
        return None
    gone = pd.Series([block for plan in own["plan"] for block in parse_mask(plan.replace(" ", ","))]).value_counts()
    shares = {block: count / len(own) for block, count in gone.items()}
    layers = max(block.layer for block in gone.index) + 1
    draw = partial(plots.block_map, layers=layers, gone=shares, removals=[])
    caption = f"In what share of {len(own)} draws {title_of(method)} removes each block, for a budget of {budget}."
    return plots.render(f"blocks-{method}", caption, (max(10.2, 0.29 * layers + 1.5), 1.45), draw)


def of_run(points: Points) -> Iterator[Table | Plot]:
    yield claims(points)
    yield sizes(points)
    yield texts(points)
    for made in (calibrations(points), quality(points), blocks(points)):
        if made is not None:
            yield made


def write_answers(out: Path, title: str, runs: Mapping[str, tuple[str, Sequence[str], Points]]) -> None:
    """Write the tables and figures of a study in the place of `out`, as a whole or not at all.

    Args:
        runs: by name: what its model is called, what its results hold for, and its points.
    """
    sections, files, lines = [], dict[str, str](), [f"# {title}"]
    for run, (model, conditions, points) in runs.items():
        lines += [f"## {model}", "\n".join(f"- {line}" for line in conditions)]
        made = [replace(each, name=f"{run}-{each.name}") for each in of_run(points)]
        sections.append(Section(model, (*conditions, *made)))
        for each in made:
            if isinstance(each, Table):
                files[f"tables/{each.name}.csv"] = to_csv(each)
                lines += [f"### {each.title}", to_markdown(replace(each, title="", notes=())), "\n".join(each.notes)]
            else:
                lines += [f"![{each.caption}](results/{each.name}.png)"]
    files["results.md"] = "\n\n".join(line for line in lines if line) + "\n"
    write_page(out, Page(title, "", tuple(sections)), files)
