"""Claims: which methods are compared, and when one holds.

A claim is judged on every kind of text at every size, with Holm's correction over all that is
judged of it. Where there is one draw it is judged on all kinds together, and a difference below
`ONE_DRAW` is undecided even where the documents alone are sure: another draw could turn it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pandas as pd

from blockpruner.reporting.answers.curves import SIZES, known
from blockpruner.reporting.paper.frames import table_of_frame
from blockpruner.reporting.paper.tables import interval
from blockpruner.reporting.points import Points
from blockpruner.reporting.statistics import Effect, Floats, holm
from blockpruner.reporting.table import Table

LEVEL = 0.05

ONE_DRAW = {0.1: 1.2, 0.2: 1.65, 0.3: 1.65}
"""Two draws of one comparison, on all kinds of text together, were up to so far apart at a size
(docs/results.md, "How sure"); at 30 % there is one draw alone, which has the limit of 20 %."""


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
    Claim("Floating search finds better blocks than greedy search", "floating", "blockpruner"),
    Claim("Blocks of floating search lose less than layers", "floating", "greedy-layers"),
    Claim("Narrower MLPs lose less than blocks", "narrow", "blockpruner"),
    Claim("Narrower MLPs lose less than layers", "narrow", "greedy-layers"),
    Claim("Narrower MLPs lose less than ShortGPT", "narrow", "shortgpt"),
    Claim(
        "Narrower MLPs lose less than Relative Magnitude, Frobenius",
        "narrow",
        "relative-magnitude-frobenius",
    ),
    Claim("MHA alone loses less than MLP alone", "mha-only", "mlp-only"),
    Claim("Step by step loses less than one shot", "blockpruner", "one-shot-perplexity"),
    Claim(
        "Perplexity finds better blocks than Block Influence", "blockpruner", "blockpruner-by-bi"
    ),
    Claim(
        "Perplexity finds better blocks than Relative Magnitude", "blockpruner", "blockpruner-by-rm"
    ),
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
    Claim(
        "Blocks lose less than layers by Relative Magnitude", "blockpruner", "relative-magnitude"
    ),
    Claim("Layers by perplexity lose less than ShortGPT's", "greedy-layers", "shortgpt"),
)


@dataclass(frozen=True)
class Judged:
    """What was found of a claim."""

    effects: Mapping[float, Effect]
    """By size: perplexity of the worse method over that of the better one, every kind of text
    alike."""
    draws: Mapping[float, int]
    signs: Mapping[tuple[float, str | None], int]
    """By size and kind of text (None: all together): 1 where the claim holds, -1 where the opposite
    does, else 0."""


def pair(points: Points, claim: Claim, heal: str, size: float) -> tuple[Floats, Floats]:
    """The rises of the better and of the worse method of a claim, in the draws that both have
    [draws, rows]."""
    own = points.frame[(points.frame["heal"] == heal) & (points.frame["calibration"] == "")]
    better, worse = (
        set(own[own["method"] == method]["seed"]) for method in (claim.better, claim.worse)
    )
    shared = replace(points, frame=own[own["seed"].isin(better & worse)])
    return shared.curve(size, method=claim.better), shared.curve(size, method=claim.worse)


def judged(points: Points, claim: Claim, heal: str) -> Judged | None:
    """Compare the methods of a claim wherever both were measured; None if that is nowhere."""
    effects, draws, cells = (
        dict[float, Effect](),
        dict[float, int](),
        dict[tuple[float, str | None], Effect](),
    )
    for size in SIZES:
        a, b = pair(points, claim, heal, size)
        if known(b - a):
            effects[size], draws[size] = (
                points.against(a, b),
                int((~np.isnan(b - a).any(axis=1)).sum()),
            )
            kinds = points.texts if draws[size] > 1 else [None]
            cells |= {(size, kind): points.against(a, b, kind) for kind in kinds}
    corrected = holm([effect.p for effect in cells.values()])
    signs = {
        key: _sign(effect, p, draws[key[0]], key[0])
        for (key, effect), p in zip(cells.items(), corrected, strict=True)
    }
    return Judged(effects, draws, signs) if effects else None


def _sign(effect: Effect, p: float, draws: int, size: float) -> int:
    is_small = draws == 1 and max(effect.value, 1 / effect.value) < ONE_DRAW[size]
    return 0 if p > LEVEL or is_small else 1 if effect.value > 1 else -1


def verdict(signs: Mapping[tuple[float, str | None], int]) -> str:
    """Say where a claim holds, and where the opposite does."""
    if len(found := set(signs.values())) == 1:
        return {1: "Holds", -1: "The opposite holds", 0: "Undecided"}[found.pop()]
    words = []
    for sign, word in ((1, "Holds"), (-1, "The opposite")):
        where = []
        for size in dict.fromkeys(size for size, _ in signs):
            kinds = [kind for other, kind in signs if other == size]
            own = [kind for kind in kinds if signs[size, kind] == sign]
            if own:
                named = "" if len(own) == len(kinds) else f" on {', '.join(map(str, own))}"
                where.append(f"{size:.0%}{named}")
        words += [f"{word} at {'; '.join(where)}"] if where else []
    return ". ".join(words)


def claims(points: Points) -> Table | None:
    """Judge every claim of which something was measured."""
    lines = []
    for claim, heal in product(CLAIMS, points.frame["heal"].unique()):
        if found := judged(points, claim, heal):
            line: dict[str, object] = {
                "claim": claim.words,
                "healing": heal,
                "draws": max(found.draws.values()),
            }
            for size, effect in found.effects.items():
                line |= interval(f"at_{100 * size:.0f}", effect)
            lines.append(line | {"verdict": verdict(found.signs)})
    return table_of_frame("claims", "Claims", pd.DataFrame(lines), CLAIMS_NOTE) if lines else None


CLAIMS_NOTE = (
    "Perplexity of the method that a claim calls worse, over that of the better one, every kind of"
    " text alike. The verdict is over every kind of text at every size by itself, 5 % with Holm's"
    " correction within the line; where there is one draw, over all kinds together, and factors"
    " below 1.2 at 10 % or 1.65 at 20 and 30 % are undecided. What a verdict does not name is"
    " undecided. Some draws may lack a size."
)
