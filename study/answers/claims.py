"""Claims: which methods are compared, and when one holds.

A claim is judged on every kind of text at every size, with Holm's correction over all that is
judged of it. Where there is one draw it is judged on all kinds together, and a difference below
`ONE_DRAW` is undecided even where the documents alone are sure: another draw could turn it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from blockpruner.reporting.frames import interval, table_of_lines
from blockpruner.reporting.statistics import Effect, Floats, holm
from blockpruner.reporting.table import Table
from study.answers.curves import SIZES, is_measured, own_calibration
from study.points import Points

LEVEL = 0.05
"""The share of lines with a wrong verdict that is accepted."""

Part = tuple[float, str | None]
"""A size and a kind of text; None: all kinds together."""

ONE_DRAW = {0.1: 1.2, 0.2: 1.65, 0.3: 1.65}
"""Two draws of one comparison, on all kinds of text together, were up to so far apart at a size
(docs/results.md, "How sure"); at 30 % there is one draw alone, which has the limit of 20 %."""


@dataclass(frozen=True)
class Claim:
    """That one method loses less than another one."""

    text: str
    better: str
    """The method that loses less."""
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
class Judgement:
    """What was measured of a claim."""

    effects: Mapping[float, Effect]
    """By size: perplexity of the worse method over that of the better one, every kind of text
    alike."""
    draws: Mapping[float, int]
    """By size."""
    signs: Mapping[Part, int]
    """1 where the claim holds, -1 where the opposite does, else 0."""


def paired_rises(points: Points, claim: Claim, heal: str, size: float) -> tuple[Floats, Floats]:
    """The rises of the better and of the worse method of a claim, in the draws that both have
    [draws, rows]."""
    frame = own_calibration(points)
    frame = frame[frame["heal"] == heal]
    better_seeds = frame[frame["method"] == claim.better]["seed"]
    worse_seeds = frame[frame["method"] == claim.worse]["seed"]
    shared_seeds = set(better_seeds) & set(worse_seeds)
    shared = replace(points, frame=frame[frame["seed"].isin(shared_seeds)])
    return shared.curve(size, method=claim.better), shared.curve(size, method=claim.worse)


def judge(points: Points, claim: Claim, heal: str) -> Judgement | None:
    """Compare the methods of a claim wherever both were measured; None if that is nowhere."""
    effects: dict[float, Effect] = {}
    draws: dict[float, int] = {}
    parts: dict[Part, Effect] = {}
    for size in SIZES:
        better, worse = paired_rises(points, claim, heal, size)
        if not is_measured(worse - better):
            continue
        effects[size] = points.against(better, worse)
        is_complete = ~np.isnan(worse - better).any(axis=1)
        draws[size] = int(is_complete.sum())
        # With one draw, the kinds alone would seem surer than they are (docs/results.md).
        kinds: Sequence[str | None] = points.texts if draws[size] > 1 else [None]
        for kind in kinds:
            parts[size, kind] = points.against(better, worse, kind)
    if not effects:
        return None
    # The family is the line of a claim: every size and kind of text.
    corrected = holm([effect.p for effect in parts.values()])
    signs = {}
    for (part, effect), p in zip(parts.items(), corrected, strict=True):
        signs[part] = _sign(effect, p, draws[part[0]], part[0])
    return Judgement(effects, draws, signs)


def _sign(effect: Effect, p: float, draws: int, size: float) -> int:
    factor = max(effect.value, 1 / effect.value)
    # Another draw could turn a small difference of a single draw.
    if p > LEVEL or (draws == 1 and factor < ONE_DRAW[size]):
        return 0
    return 1 if effect.value > 1 else -1


def verdict(signs: Mapping[Part, int]) -> str:
    """Write where a claim holds, and where the opposite does."""
    distinct = set(signs.values())
    if len(distinct) == 1:
        return {1: "Holds", -1: "The opposite holds", 0: "Undecided"}[distinct.pop()]
    sentences = []
    for sign, start in ((1, "Holds"), (-1, "The opposite")):
        places = _places(signs, sign)
        if places:
            sentences.append(f"{start} at {'; '.join(places)}")
    return ". ".join(sentences)


def _places(signs: Mapping[Part, int], sign: int) -> list[str]:
    """List the sizes at which the sign is this one, with the kinds of text unless it is all."""
    places = []
    for size in SIZES:
        kinds = {kind: value for (other, kind), value in signs.items() if other == size}
        matching = [str(kind) for kind, value in kinds.items() if value == sign]
        if not matching:
            continue
        names = "" if len(matching) == len(kinds) else f" on {', '.join(matching)}"
        places.append(f"{size:.0%}{names}")
    return places


def claims(points: Points) -> Table | None:
    """Judge every claim of which something was measured."""
    lines = []
    for claim, heal in product(CLAIMS, points.frame["heal"].unique()):
        judgement = judge(points, claim, heal)
        if judgement is None:
            continue
        line: dict[str, object] = {
            "claim": claim.text,
            "healing": heal,
            "draws": max(judgement.draws.values()),
        }
        for size, effect in judgement.effects.items():
            line |= interval(f"at_{100 * size:.0f}", effect)
        line["verdict"] = verdict(judgement.signs)
        lines.append(line)
    return table_of_lines("claims", "Claims", lines, CLAIMS_NOTE)


CLAIMS_NOTE = (
    "Perplexity of the method that a claim calls worse, over that of the better one, every kind of"
    " text alike. The verdict is over every kind of text at every size by itself, 5 % with Holm's"
    " correction within the line; where there is one draw, over all kinds together, and factors"
    " below 1.2 at 10 % or 1.65 at 20 and 30 % are undecided. What a verdict does not name is"
    " undecided. Some draws may lack a size."
)
