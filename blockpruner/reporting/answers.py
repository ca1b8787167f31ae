"""The page of a study of experiments: verdicts, then tables and figures, made of points alone.

Decides which methods a claim compares and when it holds. A claim is judged on every kind of text and at every size;
Holm's correction covers all that is judged of it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import stats

from blockpruner.core.blocks import parse_mask
from blockpruner.methods.recipes import BLOCKPRUNER, RECIPES
from blockpruner.reporting import plots
from blockpruner.reporting.pages import Page, Section, write_page
from blockpruner.reporting.paper.frames import table_of_frame
from blockpruner.reporting.paper.tables import interval
from blockpruner.reporting.plots import MARKS, REMOVED, Plot
from blockpruner.reporting.points import Points
from blockpruner.reporting.statistics import (
    SEED,
    Effect,
    Floats,
    average,
    differences,
    holm,
    paired_bootstrap,
    paired_t,
    percentiles,
    stratified_t,
    two_sided,
)  # fmt: skip
from blockpruner.reporting.table import Table, to_csv, to_markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLAIN = "plain"
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
    apart = points.frame["calibration"].isin((SEARCHED, STARTS, MASKS))
    for (heal, method, calibration), own in points.frame[~apart].groupby(["heal", "method", "calibration"], sort=False):
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
    lines, frame = (
        [],
        points.frame[points.frame["calibration"].isin({name for names in GROUPS.values() for name in names})],
    )
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


GROUPS = {
    "number of samples": ("16 samples", "64 samples", "256 samples", "1024 samples"),
    "kind of text": ("encyclopaedia", "instructions", "program text", "stories", "64 samples"),
    "length of rows": ("rows of 64", "64 samples", "rows of 1024"),
}
"""Calibrations that differ in one thing."""


def variation(points: Points, size: float = 0.1) -> Table | None:
    """What moves the result of a calibration, and how much draws alone move it."""
    lines, frame = [], points.frame
    for heal, (thing, names) in product(frame["heal"].unique(), GROUPS.items()):
        found = [points.curve(size, method=BLOCKPRUNER, heal=heal, calibration=name) for name in names]
        found = [rises for rises in found if known(rises) and len(rises) > 1]
        if len(found) < 2:
            continue
        logs = np.array([[math.log(points.over(rise)) for rise in rises] for rises in found])
        within = logs.var(axis=1, ddof=1).mean()
        between = max(0.0, logs.mean(axis=1).var(ddof=1) - within / logs.shape[1])
        spread = {"between_pct": 100 * math.sqrt(between), "draws_pct": 100 * math.sqrt(within)}
        lines.append({"what varies": thing, "healing": heal, **spread, "share_pct": 100 * between / (between + within)})
    if not lines:
        return None
    return table_of_frame("variation", f"What calibration decides, {size:.0%} removed", pd.DataFrame(lines), VARIATION)


VARIATION = (
    "Standard deviations of log perplexity: between the values of what varies, draws taken out; and between draws of "
    "one value. The share is that of the variance."
)

SEARCHED, STARTS, MASKS = "12 samples", "starts", "masks"
"""Names of calibrations: that of searches which are compared, of one search from many starts, and of given masks."""


def searched(points: Points) -> Table | None:
    """What searches find on the same rows, and what that is worth on the test texts."""
    own = points.frame[points.frame["calibration"] == SEARCHED]
    if not len(own):
        return None
    every = points.frame[points.frame["calibration"].isin((SEARCHED, STARTS))]
    best, lines = every.groupby(["seed", "budget"])["search_ppl"].min(), []
    for method, each in own.groupby("method", sort=False):
        line: dict[str, object] = {"search": title_of(method), "draws": each["seed"].nunique()}
        for budget, at in each.groupby("budget"):
            name = f"{100 * float(budget):.0f}"
            over = at["search_ppl"].to_numpy() / best.loc[list(zip(at["seed"], at["budget"], strict=True))].to_numpy()
            line[f"trials_{name}"] = at["trials_asked"].mean()
            line[f"over_best_{name}"] = math.exp(np.log(over).mean())
            rises = points.curve(float(budget), method=method, heal="plain", calibration=SEARCHED)
            line |= interval(f"at_{name}_x", points.against(rises) if known(rises) else None)
        lines.append(line)
    return table_of_frame("searches", "Searches on the same rows", pd.DataFrame(lines), SEARCHED_NOTE)


SEARCHED_NOTE = (
    "Over best: perplexity on the rows of the search over that of the best mask of this size that any search here has "
    "found on them. At 10 and 20: on the test texts, × dense."
)


def starts(points: Points) -> Table | None:
    """Where one search ends from many random starts."""
    own = points.frame[points.frame["calibration"] == STARTS].sort_values("search_ppl")
    if not len(own):
        return None
    others = points.frame[(points.frame["calibration"] == SEARCHED) & points.frame["seed"].isin(own["seed"])]
    others = others[others["budget"].isin(own["budget"])]
    found, rises = own["search_ppl"].to_numpy(), np.stack(own["nll"]) - points.dense["nll"]
    heldout = [points.over(rise) for rise in rises]
    line = {"starts": len(own), "masks": own["plan"].nunique()}
    line |= {"within_2_pct": int((found <= 1.02 * found[0]).sum())}
    line |= {"median_over_best": np.median(found) / found[0], "worst_over_best": found[-1] / found[0]}
    line |= {"other_searches_over_best": others["search_ppl"].min() / found[0]} if len(others) else {}
    line |= {"lowest_x": min(heldout), "highest_x": max(heldout), "lowest_on_search_rows_x": heldout[0]}
    title = f"One search from {len(own)} starts, {float(own['budget'].iloc[0]):.0%} removed"
    return table_of_frame("starts", title, pd.DataFrame([line]), STARTS_NOTE)


STARTS_NOTE = "Over best: perplexity on the rows of the search over that of the best start; × dense: on the test texts."


@dataclass(frozen=True)
class Signal:
    """How far the loss of a mask before healing tells its loss after it: over masks, with intervals of a bootstrap."""

    heal: str
    tokens: float
    """Tokens of training, in thousands."""
    before: Floats
    after: Floats
    """Log perplexity over dense, of each mask."""

    def of(self, statistic: Callable[[Floats, Floats], float]) -> Effect:
        chance, count = np.random.default_rng(SEED), len(self.before)
        draws = chance.integers(count, size=(MASK_RESAMPLES, count))
        values = np.array([statistic(self.before[own], self.after[own]) for own in draws])
        return Effect(statistic(self.before, self.after), percentiles(values, 0.95), two_sided(values, 0.0))


MASK_RESAMPLES = 2000


def slope(before: Floats, after: Floats) -> float:
    return float(np.polyfit(before, after, 1)[0]) if np.ptp(before) else 0.0


def rank(before: Floats, after: Floats) -> float:
    return float(stats.spearmanr(before, after).statistic) if np.ptp(before) and np.ptp(after) else 0.0


def signals(points: Points) -> list[Signal]:
    """Of every healing of the given masks."""
    own = points.frame[points.frame["calibration"] == MASKS]
    if not len(own):
        return []
    own = own.assign(log=[math.log(points.over(nll - points.dense["nll"])) for nll in own["nll"]])
    wide = own.pivot_table(index="method", columns="heal", values="log", sort=False)
    found = []
    for heal in (heal for heal in wide.columns if heal != PLAIN):
        pair = wide[[PLAIN, heal]].dropna()
        tokens = re.match(r"(\d+)k", heal)
        found.append(Signal(heal, float(tokens[1]) if tokens else 0.0, pair[PLAIN].to_numpy(), pair[heal].to_numpy()))
    return sorted(found, key=lambda signal: signal.tokens)


def masks(points: Points) -> Table | None:
    """Whether the mask still matters after healing."""
    lines = []
    for signal in signals(points):
        ends = {"lowest_x": math.exp(signal.after.min()), "highest_x": math.exp(signal.after.max())}
        line = {"healing": signal.heal, "masks": len(signal.before), **ends}
        lines.append(line | interval("slope", signal.of(slope)) | interval("rank_correlation", signal.of(rank)))
    return (
        table_of_frame("masks", "Masks of one size after healing", pd.DataFrame(lines), MASKS_NOTE) if lines else None
    )


MASKS_NOTE = (
    "Slope and rank correlation of log perplexity after healing on that before it, over masks; brackets: 95 % over "
    "resampled masks. A slope of 1: healing leaves every ratio as it was; of 0: the mask does not matter any more."
)


def healed_masks(points: Points) -> Plot | None:
    """Perplexity after healing over that before, of every mask."""
    if not (found := signals(points)):
        return None

    def fill(figure: Figure) -> None:
        axes = figure.subplots()
        for signal, (colour, shape) in zip(found, MARKS, strict=False):
            x, y = np.exp(signal.before), np.exp(signal.after)
            axes.plot(x, y, shape, color=colour, markersize=4, alpha=0.8, label=signal.heal)
            line = np.polyfit(signal.before, signal.after, 1)
            ends = np.array([signal.before.min(), signal.before.max()])
            axes.plot(np.exp(ends), np.exp(np.polyval(line, ends)), color=colour, linewidth=1)
        axes.set_xscale("log")
        axes.set_yscale("log")
        plots.label_(axes, "perplexity without healing, × dense", "after healing, × dense")
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))

    return plots.render("masks", HEALED_CAPTION, (7.5, 4.4), fill)


HEALED_CAPTION = "Each mark is a mask; all remove the same share of the parameters. Lines: least squares of the logs."


def tasks(points: Points) -> Table | None:
    """Accuracy, and the p of the right answer, against BlockPruner of the same budget and healing."""
    own = points.frame[points.frame["items"] != "{}"]
    lines, tests = list[dict[str, object]](), list[tuple[int, str, Effect]]()
    for (heal, _), group in own.groupby(["heal", "budget"], sort=False):
        base = group[group["method"] == BLOCKPRUNER]
        for _, point in group.iterrows():
            items = json.loads(point["items"])
            scores, golds = ({task: each[key] for task, each in items.items()} for key in ("score", "p_gold"))
            line: dict[str, object] = {"method": title_of(point["method"]), "healing": heal}
            mean, gold = average(scores), average(golds)
            line |= {"removed_pct": 100 * point["ratio"], "avg_pct": 100 * mean.value, "avg_pct_se": 100 * mean.stderr}
            line |= {"p_gold_pct": 100 * gold.value}
            if len(base) and point["method"] != BLOCKPRUNER:
                other = json.loads(base.iloc[0]["items"])
                before, p_before = ({task: each[key] for task, each in other.items()} for key in ("score", "p_gold"))
                effect = paired_bootstrap(before, scores)
                line |= interval("avg_against", effect, 100)
                line |= interval("p_gold_against", stratified_t(p_before, golds), 100)
                line["detectable"] = 100 * DETECTABLE * average(differences(before, scores)).stderr
                tests += [(len(lines), task, paired_t(before[task], scores[task])) for task in scores]
            lines.append(line)
    if not lines:
        return None
    for (number, task, effect), p in zip(tests, holm([effect.p for _, _, effect in tests]), strict=True):
        if p <= LEVEL:
            word = f"{task} {'+' if effect.value > 0 else '-'}"
            lines[number]["tasks"] = ", ".join(filter(None, (str(lines[number].get("tasks", "")), word)))
    return table_of_frame("tasks", "Tasks", pd.DataFrame(lines), TASKS_NOTE)


DETECTABLE = 2.8
"""Standard errors of a difference that is found four times out of five, at 5 %."""

TASKS_NOTE = (
    "Against BlockPruner with the same budget and healing, in points. Detectable: the difference that these items "
    "would show four times out of five. Tasks: those in which the method is better (+) or worse (-), 5 % with Holm's "
    "correction over the table."
)


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
    for made in (
        calibrations(points), variation(points), searched(points), starts(points), masks(points), tasks(points),
        quality(points), blocks(points), healed_masks(points),
    ):  # fmt: skip
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
