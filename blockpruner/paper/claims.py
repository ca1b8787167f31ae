"""The paper's claims, each held against what a study measured: whether it holds here, and how sure that is.

Decides the words. A claim holds by a measure if the 95 % interval of the difference lies on its side of zero, does not
hold if on the other side, and cannot be told where the interval contains zero.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from blockpruner.paper import statistics
from blockpruner.paper.contrasts import detectable, factor, p_value, points, share
from blockpruner.paper.evidence import Entry, Evidence, compare
from blockpruner.paper.experiments import BLOCKPRUNER
from blockpruner.paper.statistics import Interval
from blockpruner.paper.tables import JS, SLEB
from blockpruner.reporting.findings import Finding, Level
from blockpruner.reporting.formats import listed, percent
from blockpruner.reporting.grids import Cell, Column, Grid

HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be told with these items"


@dataclass(frozen=True)
class Claim:
    """pairs: (claimed better, claimed worse) at about one ratio."""

    title: str
    pairs: Callable[[Evidence], Sequence[tuple[Entry, Entry]]]


def _mains(evidence: Evidence, *others: str) -> list[tuple[Entry, Entry]]:
    best = evidence.main(BLOCKPRUNER)
    found = (evidence.main(other) for other in others)
    return [(best, other) for other in found if best is not None and other is not None]


def _same_budget(evidence: Evidence, better: str, worse: str) -> list[tuple[Entry, Entry]]:
    return [(a, b) for a in evidence.of(better) if (b := evidence.at(worse, a.budget)) is not None]


CLAIMS: tuple[Claim, ...] = (
    Claim("Removing blocks beats removing layers at about the same ratio", lambda e: _mains(e, SLEB, "ShortGPT")),
    Claim("MHA blocks are more redundant than MLP blocks", lambda e: _same_budget(e, "MHA only", "MLP only")),
    Claim(
        "Perplexity is a better metric than BI, RM and JS in the same greedy search",
        lambda e: [
            *_same_budget_last(e, "BlockPruner by BI"),
            *_same_budget_last(e, "BlockPruner by RM"),
            *_same_budget_last(e, JS),
        ],
    ),
    Claim("Iterative search beats scoring once", lambda e: _mains(e, "one-shot perplexity")),
)


def _same_budget_last(evidence: Evidence, worse: str) -> list[tuple[Entry, Entry]]:
    """At the budget of Table 1, or else the largest that both have."""
    pairs = _same_budget(evidence, BLOCKPRUNER, worse)
    return [pair for pair in pairs if pair[0].budget == pair[0].variant.main] or pairs[-1:]


CLAIM_COLUMNS = (
    Column("model", "model"),
    Column("claim", "claim"),
    Column("method", "claimed better"),
    Column("ratio_pct", "removed, %"),
    Column("against", "claimed worse"),
    Column("against_ratio_pct", "removed, %"),
    Column("difference", "accuracy, points [95 %]"),
    Column("p", "p"),
    Column("p_holm", "p, Holm"),
    Column("by_accuracy", "by accuracy"),
    Column("perplexity_ratio", "held-out PPL, × [95 %]"),
    Column("p_perplexity", "p"),
    Column("by_perplexity", "by held-out PPL"),
)


def claims(model: str, evidence: Evidence) -> tuple[tuple[Finding, ...], Grid]:
    """A finding for each claim, and all that it rests on; p values of accuracy are corrected over all pairs."""
    pairs = [(claim, better, worse) for claim in CLAIMS for better, worse in claim.pairs(evidence)]
    contrasts = [compare(worse.model, better.model) for _, better, worse in pairs]
    corrected = statistics.holm([c.accuracy.p for c in contrasts]) if contrasts else ()
    verdicts = [(verdict(c.accuracy.interval, 0.0), verdict(_gain(c.perplexity.interval), 0.0)) for c in contrasts]
    rows: list[tuple[Cell, ...]] = [
        (
            model, claim.title, better.variant.name, share(better.ratio), worse.variant.name, share(worse.ratio),
            points(c.accuracy), p_value(c.accuracy.p), p_value(p), by_accuracy, factor(c.perplexity),
            p_value(c.perplexity.p), by_perplexity,
        )
        for (claim, better, worse), c, p, (by_accuracy, by_perplexity) in zip(
            pairs, contrasts, corrected, verdicts, strict=True
        )
    ]  # fmt: skip
    findings = []
    for claim in CLAIMS:
        own = [i for i, pair in enumerate(pairs) if pair[0] is claim]
        if not own:
            findings.append(Finding(Level.NOTE, "claim", f"{claim.title}: not measured in this study", ""))
            continue
        words = [summed([verdicts[i][k] for i in own]) for k in range(2)]
        said = f"{words[0]}, by accuracy and by held-out perplexity" if words[0] == words[1] else (
            f"by accuracy: {words[0]}; by held-out perplexity: {words[1]}"
        )  # fmt: skip
        text = "; ".join(
            f"{_named(pairs[i][1])} against {_named(pairs[i][2])}: {points(contrasts[i].accuracy)} points, perplexity "
            f"{factor(contrasts[i].perplexity)}×"
            for i in own
        )
        findings.append(Finding(Level.RESULT, "claim", f"{claim.title}: {said}", f"{text}."))
    note = (
        "A claim holds by a measure if the 95 % interval lies on its side, does not hold if on the other, and cannot "
        "be told if it contains no difference. Intervals are those of single comparisons; Holm: p of accuracy over the "
        "rows of this table. Ratios of methods differ a little, since layers and blocks come in sizes."
    )
    title = f"The comparisons behind them: {model}"
    grid = Grid(f"claims-{slug(model)}", title, CLAIM_COLUMNS, tuple(rows), (note, *detectable(contrasts)))
    return (*findings, *_samples(evidence)), grid


def slug(model: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")


def _gain(ratio: Interval) -> Interval:
    """Of an interval of PPL ratios: how much less than 1."""
    return Interval(1 - ratio.high, 1 - ratio.low)


def verdict(interval: Interval, zero: float) -> str:
    return HOLDS if interval.low > zero else FAILS if interval.high < zero else OPEN


def summed(verdicts: Sequence[str]) -> str:
    """One verdict for several comparisons: the common one, or how many have each."""
    counts = Counter(verdicts)
    if len(counts) == 1:
        return verdicts[0]
    return listed([f"{counts[word]} of {len(verdicts)} {word}" for word in (HOLDS, FAILS, OPEN) if counts[word]])


def _named(entry: Entry) -> str:
    return f"{entry.variant.name} ({percent(entry.ratio)})"


def _samples(evidence: Evidence) -> list[Finding]:
    """More samples: each size against the largest, at the budget of the sensitivity study."""
    base = evidence.at(BLOCKPRUNER, evidence.sensitivity)
    if base is None:
        return []
    own = base.variant.calibration

    def only_samples_differ(entry: Entry) -> bool:
        return entry.variant.calibration.model_dump() | {"num_samples": own.num_samples} == own.model_dump()

    sizes = [base, *filter(only_samples_differ, evidence.varied(BLOCKPRUNER, "calibration"))]
    sizes.sort(key=lambda entry: entry.variant.calibration.num_samples)
    title = "More calibration samples do not help beyond a point"
    if len(sizes) < 2:
        return [Finding(Level.NOTE, "claim", f"{title}: not measured in this study", "")]
    *smaller, largest = sizes
    texts, gains = [], []
    for entry in smaller:
        c = compare(entry.model, largest.model)
        gains.append(c.accuracy.interval.low > 0 or c.perplexity.interval.high < 1)
        texts.append(
            f"{largest.variant.calibration.num_samples:,} against {entry.variant.calibration.num_samples:,} samples: "
            f"{points(c.accuracy)} points, perplexity {factor(c.perplexity)}×."
        )
    last = max((i for i, gain in enumerate(gains) if gain), default=-1)
    if last == len(smaller) - 1:
        words = f"does not hold up to {largest.variant.calibration.num_samples:,} samples, which still gain"
    elif all(set(entry.plan.removed) == set(largest.plan.removed) for entry in smaller):
        words = f"the same blocks are removed with {smaller[0].variant.calibration.num_samples:,} samples as with more"
    else:
        words = f"no gain can be told beyond {smaller[last + 1].variant.calibration.num_samples:,} samples"
    texts.append("An interval that contains no gain also contains what it cannot exclude: its upper end.")
    return [Finding(Level.RESULT, "claim", f"{title}: {words}", " ".join(texts))]
