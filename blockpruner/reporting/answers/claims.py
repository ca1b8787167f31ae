"""Claims: which methods are compared, and when one holds.

A claim is judged on every kind of text and at every size; Holm's correction covers all that is judged of it. Of one
draw, a difference below `ONE_DRAW` decides nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from blockpruner.reporting.answers.curves import SIZES, known
from blockpruner.reporting.paper.frames import table_of_frame
from blockpruner.reporting.paper.tables import interval
from blockpruner.reporting.points import Points
from blockpruner.reporting.statistics import Effect, Floats, holm
from blockpruner.reporting.table import Table

LEVEL = 0.05

ONE_DRAW = 1.2
"""Two draws of one comparison were up to so far apart: docs/results.md, "How sure"."""


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
    Claim("Narrower MLPs lose less than layers", "narrow", "greedy-layers"),
    Claim("Narrower MLPs lose less than ShortGPT", "narrow", "shortgpt"),
    Claim("Narrower MLPs lose less than Relative Magnitude, Frobenius", "narrow", "relative-magnitude-frobenius"),
    Claim("MHA alone loses less than MLP alone", "mha-only", "mlp-only"),
    Claim("Step by step loses less than one shot", "blockpruner", "one-shot-perplexity"),
    Claim("Perplexity finds better blocks than Block Influence", "blockpruner", "blockpruner-by-bi"),
    Claim("Perplexity finds better blocks than Relative Magnitude", "blockpruner", "blockpruner-by-rm"),
    Claim(
        "Perplexity finds better blocks than Relative Magnitude, Frobenius",
        "blockpruner",
        "blockpruner-by-rm-frobenius",
    ),
    Claim("Perplexity finds better blocks than JS divergence", "blockpruner", "blockpruner-by-js"),
    Claim("Perplexity finds better blocks than KL divergence", "blockpruner", "blockpruner-by-kl"),
    Claim("Blocks lose less than SliceGPT", "blockpruner", "slicegpt"),
    Claim("Blocks lose less than LaCo", "blockpruner", "laco"),
    Claim("Blocks lose less than ShortGPT", "blockpruner", "shortgpt"),
    Claim("Blocks lose less than layers by Relative Magnitude", "blockpruner", "relative-magnitude"),
    Claim("Layers by perplexity lose less than ShortGPT's", "greedy-layers", "shortgpt"),
)


Cells = Mapping[tuple[float, str], tuple[Effect, float]]
"""By size and kind of text: the perplexity of the worse over that of the better, and the corrected p."""


def pair(points: Points, claim: Claim, heal: str, size: float) -> tuple[Floats, Floats]:
    """The rises of the better and of the worse method of a claim, in the draws that both have [draws, rows]."""
    own = points.frame[(points.frame["heal"] == heal) & (points.frame["calibration"] == "")]
    better, worse = (set(own[own["method"] == method]["seed"]) for method in (claim.better, claim.worse))
    shared = replace(points, frame=own[own["seed"].isin(better & worse)])
    return shared.curve(size, method=claim.better), shared.curve(size, method=claim.worse)


def cells_of(points: Points, claim: Claim, heal: str) -> Cells:
    """Compare the methods of a claim wherever both were measured."""
    found, draws = dict[tuple[float, str], Effect](), dict[float, int]()
    for size in SIZES:
        a, b = pair(points, claim, heal, size)
        if known(b - a):
            found |= {(size, kind): points.against(a, b, kind) for kind in points.texts}
            draws[size] = int((~np.isnan(b - a).any(axis=1)).sum())
    corrected = holm([effect.p for effect in found.values()])
    cells = {key: (effect, p) for (key, effect), p in zip(found.items(), corrected, strict=True)}
    return {key: (effect, 1.0 if _is_chance(effect, draws[key[0]]) else p) for key, (effect, p) in cells.items()}


def _is_chance(effect: Effect, draws: int) -> bool:
    return draws == 1 and max(effect.value, 1 / effect.value) < ONE_DRAW


def verdict(cells: Cells) -> str:
    """Say where a claim holds, and where the opposite does."""
    signs = {key: 0 if p > LEVEL else 1 if effect.value > 1 else -1 for key, (effect, p) in cells.items()}
    if len(found := set(signs.values())) == 1:
        return {1: "Holds", -1: "The opposite holds", 0: "No difference is seen"}[found.pop()]
    kinds = list(dict.fromkeys(kind for _, kind in signs))
    words = []
    for sign, word in ((1, "Holds"), (-1, "The opposite")):
        where = []
        for size in dict.fromkeys(size for size, _ in signs):
            own = [kind for kind in kinds if signs[size, kind] == sign]
            if own:
                where.append(f"{size:.0%}" + ("" if len(own) == len(kinds) else f" on {', '.join(own)}"))
        words += [f"{word} at {'; '.join(where)}"] if where else []
    return ". ".join(words)


def claims(points: Points) -> Table | None:
    """Judge every claim of which something was measured."""
    lines = []
    for claim in CLAIMS:
        for heal in points.frame["heal"].unique():
            if not (cells := cells_of(points, claim, heal)):
                continue
            line: dict[str, object] = {"claim": claim.words, "healing": heal}
            for size in dict.fromkeys(size for size, _ in cells):
                a, b = pair(points, claim, heal, size)
                line["draws"] = len(a)
                line |= interval(f"at_{100 * size:.0f}", points.against(a, b))
            lines.append(line | {"verdict": verdict(cells)})
    return table_of_frame("claims", "Claims", pd.DataFrame(lines), CLAIMS_NOTE) if lines else None


CLAIMS_NOTE = (
    "Perplexity of the method that a claim calls worse, over that of the better one, every kind of text alike. The "
    "verdict is over every kind of text at every size by itself, 5 % with Holm's correction within the line; of one "
    "draw, differences below 20 % decide nothing. Where a line names no size or kind of text, no difference is seen."
)
