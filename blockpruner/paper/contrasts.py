"""Methods against one another on the same items: intervals, tests, Holm's correction, and the paper's claims.

Decides how a comparison is stated. A claim holds by a measure if the 95 % interval of the difference lies on its side
of zero, does not hold if it lies on the other side, and cannot be told where the interval contains zero.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from blockpruner.paper.evidence import Contrast, Entry, Evidence, Pairs, compare
from blockpruner.paper.experiments import BLOCKPRUNER, GREEDY_LAYERS
from blockpruner.reporting import statistics
from blockpruner.reporting.findings import Finding, Level
from blockpruner.reporting.formats import listed, slug
from blockpruner.reporting.grids import Field, Grid, Number, factor, grid_of, p_value, points, share
from blockpruner.reporting.statistics import Interval


@dataclass(frozen=True, eq=False)
class Pair:
    """A model and what it is held against, with p values corrected over all pairs of their table."""

    base: Entry
    method: Entry
    claim: str
    """Its title, if the pair belongs to one: the method is claimed better than the base."""
    contrast: Contrast
    p_accuracy: float
    p_items: float


def pairs_of(found: Pairs, claims: Sequence[str] = ()) -> list[Pair]:
    """Compare base and other of each pair."""
    contrasts = [compare(base.model, other.model) for base, other in found]
    accuracy = statistics.holm([contrast.accuracy.p for contrast in contrasts])
    items = statistics.holm([contrast.items.p for contrast in contrasts])
    rows = zip(found, claims or [""] * len(found), contrasts, accuracy, items, strict=True)
    return [Pair(base, other, claim, contrast, p, q) for (base, other), claim, contrast, p, q in rows]


def contrast_grid(name: str, title: str, found: Pairs) -> Grid:
    """Make one row a pair; p values are corrected over the rows."""
    pairs = pairs_of(found)
    return grid_of(name, title, CONTRAST_FIELDS, pairs, (CONTRAST_NOTE, *detectable(pairs)))


def _fields(method: str, against: str, difference: str, p: str) -> tuple[Field[Pair], ...]:
    """Make the columns that all tables of pairs share, from their titles and the key of p."""
    return (
        Field("method", method, lambda pair: pair.method.variant.name),
        Field("ratio_pct", "removed, %", lambda pair: share(pair.method.ratio)),
        Field("against", against, lambda pair: pair.base.variant.name),
        Field("against_ratio_pct", "removed, %", lambda pair: share(pair.base.ratio)),
        Field("difference", difference, lambda pair: points(pair.contrast.accuracy)),
        Field(p, "p", lambda pair: p_value(pair.contrast.accuracy.p)),
        Field(f"{p}_holm", "p, Holm", lambda pair: p_value(pair.p_accuracy)),
    )


MODEL = Field[Pair]("model", "model", lambda pair: pair.base.subject)
PERPLEXITY = Field[Pair]("perplexity_ratio", "held-out PPL, × [95 %]", lambda pair: factor(pair.contrast.perplexity))
CONTRAST_FIELDS: tuple[Field[Pair], ...] = (
    MODEL,
    *_fields("method", "against", "difference, points [95 %]", "p_bootstrap"),
    Field("only_method", "only it right", lambda pair: Number(pair.contrast.items.only_b, 0)),
    Field("only_against", "only the other right", lambda pair: Number(pair.contrast.items.only_a, 0)),
    Field("p_mcnemar", "McNemar p", lambda pair: p_value(pair.contrast.items.p)),
    Field("p_mcnemar_holm", "p, Holm", lambda pair: p_value(pair.p_items)),
    PERPLEXITY,
)

CONTRAST_NOTE = (
    "Difference of the averages over tasks, method minus the other, on the same items: percentile interval and p of "
    "10,000 paired resamples within each task. McNemar: exact, over the items of all tasks pooled. Holm: corrected for "
    "the rows of this table. PPL: quotient of the perplexities on the held-out text, t interval over its rows. "
    "Measured here; nothing in this table is the paper's."
)


def detectable(pairs: Sequence[Pair]) -> tuple[str, ...]:
    """State the smallest difference that these items could show."""
    found = [100 * statistics.minimum_detectable_difference(pair.contrast.stderr) for pair in pairs]
    texts = [f"{value:.1f}" for value in sorted(found) if math.isfinite(value)]
    if not texts:
        return ()
    span = " to ".join(dict.fromkeys((texts[0], texts[-1])))
    return (f"Minimum detectable difference with these items: {span} points (5 % level, power 80 %, uncorrected).",)


HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be told with these items"


@dataclass(frozen=True)
class Claim:
    """A claim of the paper."""

    title: str
    pairs: Callable[[Evidence], Pairs]
    """(claimed worse, claimed better) at about one ratio."""


def _worse(*others: str) -> Callable[[Evidence], Pairs]:
    """Pair other methods, claimed worse, with BlockPruner at the budget of Table 1."""
    return lambda evidence: [(other, best) for best, other in evidence.against(*others)]


def _metrics(evidence: Evidence) -> Pairs:
    """Pair other metrics with BlockPruner, at the budget of Table 1, or else the largest that both have."""
    found = (evidence.shared(f"blockpruner-by-{metric}", BLOCKPRUNER) for metric in ("bi", "rm", "js"))
    chosen = ([pair for pair in own if pair[1].budget == pair[1].variant.main] or own[-1:] for own in found)
    return [pair for own in chosen for pair in own]


CLAIMS: tuple[Claim, ...] = (
    Claim("Removing blocks beats removing layers at about the same ratio", _worse(GREEDY_LAYERS, "shortgpt")),
    Claim("MHA blocks are more redundant than MLP blocks", lambda evidence: evidence.shared("mlp-only", "mha-only")),
    Claim("Perplexity is a better metric than BI, RM and JS in the same greedy search", _metrics),
    Claim("Iterative search beats scoring once", _worse("one-shot-perplexity")),
)

CLAIM_FIELDS: tuple[Field[Pair], ...] = (
    MODEL,
    Field("claim", "claim", lambda pair: pair.claim),
    *_fields("claimed better", "claimed worse", "accuracy, points [95 %]", "p"),
    Field("by_accuracy", "by accuracy", lambda pair: by_accuracy(pair)),
    PERPLEXITY,
    Field("p_perplexity", "p", lambda pair: p_value(pair.contrast.perplexity.p)),
    Field("by_perplexity", "by held-out PPL", lambda pair: by_perplexity(pair)),
)

CLAIM_NOTE = (
    "A claim holds by a measure if the 95 % interval lies on its side, does not hold if on the other, and cannot "
    "be told if it contains no difference. Intervals are those of single comparisons; Holm: p of accuracy over the "
    "rows of this table. Ratios of methods differ a little, since layers and blocks come in sizes."
)


def claims(evidence: Evidence) -> tuple[tuple[Finding, ...], Grid]:
    """Make a finding for each claim, and a table of its pairs, over which p values of accuracy are corrected."""
    own = {claim.title: claim.pairs(evidence) for claim in CLAIMS}
    titles = [title for title, found in own.items() for _ in found]
    pairs = pairs_of([pair for found in own.values() for pair in found], titles)
    model = evidence.dense.subject
    name, title = f"claims-{slug(model)}", f"The comparisons behind them: {model}"
    grid = grid_of(name, title, CLAIM_FIELDS, pairs, (CLAIM_NOTE, *detectable(pairs)))
    findings = [_claim(title, [pair for pair in pairs if pair.claim == title]) for title in own]
    return (*findings, *_samples(evidence)), grid


def _claim(title: str, pairs: Sequence[Pair]) -> Finding:
    if not pairs:
        return Finding(Level.NOTE, "claim", f"{title}: not measured in this study", "")
    accuracy, perplexity = summed(list(map(by_accuracy, pairs))), summed(list(map(by_perplexity, pairs)))
    found = (
        f"{accuracy}, by accuracy and by held-out perplexity"
        if accuracy == perplexity
        else f"by accuracy: {accuracy}; by held-out perplexity: {perplexity}"
    )
    text = "; ".join(f"{_named(pair.method)} against {_named(pair.base)}: {_effect(pair.contrast)}" for pair in pairs)
    return Finding(Level.RESULT, "claim", f"{title}: {found}", f"{text}.")


def _named(entry: Entry) -> str:
    return f"{entry.variant.name} ({100 * entry.ratio:.1f} %)"


def _effect(contrast: Contrast) -> str:
    return f"{points(contrast.accuracy)} points, perplexity {factor(contrast.perplexity)}×"


def by_accuracy(pair: Pair) -> str:
    return verdict(pair.contrast.accuracy.interval)


def by_perplexity(pair: Pair) -> str:
    ratio = pair.contrast.perplexity.interval
    return verdict(Interval(1 - ratio.high, 1 - ratio.low))


def verdict(gain: Interval) -> str:
    return HOLDS if gain.low > 0 else FAILS if gain.high < 0 else OPEN


def summed(verdicts: Sequence[str]) -> str:
    """Give one verdict for several comparisons: the common one, or how many have each."""
    counts = Counter(verdicts)
    if len(counts) == 1:
        return verdicts[0]
    return listed([f"{counts[word]} of {len(verdicts)} {word}" for word in (HOLDS, FAILS, OPEN) if counts[word]])


def _samples(evidence: Evidence) -> list[Finding]:
    """Compare each number of samples with the largest, at the budget of the sensitivity study."""
    base = evidence.at(BLOCKPRUNER, evidence.study.sensitivity)
    if base is None:
        return []

    def count(entry: Entry) -> int:
        return entry.variant.calibration.samples

    def only_samples_differ(entry: Entry) -> bool:
        return entry.variant.calibration.model_copy(update={"num_samples": count(base)}) == base.variant.calibration

    title = "More calibration samples do not help beyond a point"
    varied = filter(only_samples_differ, evidence.varied(BLOCKPRUNER, "calibration"))
    *smaller, largest = sorted([base, *varied], key=count)
    if not smaller:
        return [Finding(Level.NOTE, "claim", f"{title}: not measured in this study", "")]
    contrasts = [compare(entry.model, largest.model) for entry in smaller]
    gains = [i for i, c in enumerate(contrasts) if c.accuracy.interval.low > 0 or c.perplexity.interval.high < 1]
    last = max(gains, default=-1)
    if last == len(smaller) - 1:
        words = f"does not hold up to {count(largest):,} samples, which still gain"
    elif all(set(entry.plan.removed) == set(largest.plan.removed) for entry in smaller):
        words = f"the same blocks are removed with {count(smaller[0]):,} samples as with more"
    else:
        words = f"no gain can be told beyond {count(smaller[last + 1]):,} samples"
    texts = [
        f"{count(largest):,} against {count(entry):,} samples: {_effect(contrast)}."
        for entry, contrast in zip(smaller, contrasts, strict=True)
    ]
    texts.append("An interval that contains no gain also contains what it cannot exclude: its upper end.")
    return [Finding(Level.RESULT, "claim", f"{title}: {words}", " ".join(texts))]
