"""Methods against one another on the same items: intervals, tests, Holm's correction, and the paper's claims.

Decides how a comparison is stated: by each row of MEASURES, over all pairs of a table. An interval has the level at
which Holm's correction tests its row. A claim holds by a measure if this interval lies on its side of no difference,
does not hold if it lies on the other side, and cannot be told where it contains no difference.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from blockpruner.paper.evidence import Entry, Evidence, Pairs
from blockpruner.paper.experiments import BLOCKPRUNER, GREEDY_LAYERS
from blockpruner.reporting import statistics
from blockpruner.reporting.findings import Finding, Level
from blockpruner.reporting.formats import listed, slug
from blockpruner.reporting.grids import Cell, Field, Grid, Number, factor, grid_of, p_value, points, share
from blockpruner.reporting.results import Model
from blockpruner.reporting.statistics import Effect

HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be told"


@dataclass(frozen=True)
class Measure:
    """A way to compare two models on the same items or rows."""

    title: str
    """Of its columns."""
    words: str
    """In a sentence on one effect, with a place for it."""
    effect: Callable[[Model, Model, float], Effect | None]
    """Of the second model over the first one, with an interval of a level; None where it was not measured."""
    show: Callable[[Effect], Number]
    equal: float
    """The effect of no difference."""
    sign: int
    """1 where more is better, -1 where less is."""

    def verdict(self, effect: Effect) -> str:
        """Tell whether the second model is better."""
        ends = [self.sign * (end - self.equal) for end in (effect.interval.low, effect.interval.high)]
        return HOLDS if min(ends) > 0 else FAILS if max(ends) < 0 else OPEN


@cache
def _accuracy(base: Model, other: Model, level: float) -> Effect:
    return statistics.paired_bootstrap(base.scores, other.scores, level=level)


@cache
def _confidence(base: Model, other: Model, level: float) -> Effect | None:
    return statistics.stratified_t(base.p_gold, other.p_gold, level) if base.p_gold and other.p_gold else None


@cache
def _perplexity(base: Model, other: Model, level: float) -> Effect:
    return statistics.perplexity_ratio(base.heldout.row_nll, other.heldout.row_nll, level)


MEASURES: Mapping[str, Measure] = {
    "accuracy": Measure("accuracy, points", "accuracy {} points", _accuracy, points, 0, 1),
    "p_gold": Measure("p of the right answer, points", "p of the right answer {} points", _confidence, points, 0, 1),
    "perplexity": Measure("held-out PPL, ×", "perplexity {}×", _perplexity, factor, 1, -1),
}


@dataclass(frozen=True, eq=False)
class Pair:
    """A model and what it is held against."""

    base: Entry
    method: Entry
    claim: str
    """Its title, if the pair belongs to one: the method is claimed better than the base."""
    effects: Mapping[str, Effect]
    """By key of MEASURES, as far as measured, with intervals corrected over all pairs of their table."""
    holm: Mapping[str, float]
    """p values, corrected likewise."""

    def verdict(self, measure: str) -> str | None:
        return MEASURES[measure].verdict(self.effects[measure]) if measure in self.effects else None

    def __str__(self) -> str:
        return ", ".join(MEASURES[key].words.format(MEASURES[key].show(found)) for key, found in self.effects.items())


def pairs_of(found: Pairs, claims: Sequence[str] = ()) -> list[Pair]:
    """Compare base and other of each pair."""
    effects: list[dict[str, Effect]] = [{} for _ in found]
    adjusted: list[dict[str, float]] = [{} for _ in found]
    for key, measure in MEASURES.items():
        known = {i: e for i, (a, b) in enumerate(found) if (e := measure.effect(a.model, b.model, 0.95)) is not None}
        p_values = [effect.p for effect in known.values()]
        for i, p, level in zip(known, statistics.holm(p_values), statistics.holm_levels(p_values), strict=True):
            base, other = found[i]
            corrected = measure.effect(base.model, other.model, level)
            assert corrected is not None
            effects[i][key], adjusted[i][key] = corrected, p
    rows = zip(found, claims or [""] * len(found), effects, adjusted, strict=True)
    return [Pair(base, other, claim, effect, p) for (base, other), claim, effect, p in rows]


def contrast_grid(name: str, title: str, found: Pairs) -> Grid:
    """Make one row a pair; p values and intervals are corrected over the rows."""
    pairs = pairs_of(found)
    return grid_of(name, title, CONTRAST_FIELDS, pairs, (CONTRAST_NOTE, *detectable(pairs)))


def effect_cell(pair: Pair, measure: str) -> Cell:
    return MEASURES[measure].show(pair.effects[measure]) if measure in pair.effects else None


def _by(measure: str, verdicts: bool) -> list[Field[Pair]]:
    """Make the columns of a measure."""

    def p(pair: Pair, holm: bool) -> Cell:
        found = {key: pair.holm[key] if holm else effect.p for key, effect in pair.effects.items()}
        return p_value(found[measure]) if measure in found else None

    fields: list[Field[Pair]] = [
        Field(measure, f"{MEASURES[measure].title} [95 %, Holm]", lambda pair: effect_cell(pair, measure)),
        Field(f"{measure}_p", "p", lambda pair: p(pair, False)),
        Field(f"{measure}_p_holm", "p, Holm", lambda pair: p(pair, True)),
    ]
    return [*fields, Field(f"by_{measure}", "verdict", lambda pair: pair.verdict(measure))] if verdicts else fields


def _fields(method: str, against: str, verdicts: bool, *first: Field[Pair]) -> tuple[Field[Pair], ...]:
    """Make the columns of a table of pairs, from the titles of its methods."""
    return (
        Field("model", "model", lambda pair: pair.base.subject),
        *first,
        Field("method", method, lambda pair: pair.method.title),
        Field("ratio_pct", "removed, %", lambda pair: share(pair.method.ratio)),
        Field("against", against, lambda pair: pair.base.title),
        Field("against_ratio_pct", "removed, %", lambda pair: share(pair.base.ratio)),
        *(field for measure in MEASURES for field in _by(measure, verdicts)),
    )


CONTRAST_FIELDS = _fields("method", "against", False)
CORRECTED = (
    "An interval leaves out no difference if, and only if, p, Holm is at most 0.05: it has the level at which Holm's "
    "correction over the rows of this table tests its row."
)
CONTRAST_NOTE = (
    "Method minus the other, or their quotient, on the same items and rows. Accuracy: average over tasks, percentile "
    "interval and p of 10,000 paired resamples within each task. p of the right answer: average over the tasks that "
    "have it, t interval stratified by task. PPL: on the held-out text, t interval over its rows. "
    f"{CORRECTED} Measured here; nothing in this table is the paper's."
)


def detectable(pairs: Sequence[Pair]) -> tuple[str, ...]:
    """State the smallest differences that these items could show."""
    texts = []
    for measure, scores in {"accuracy": "scores", "p of the right answer": "p_gold"}.items():
        sides = ((getattr(pair.base.model, scores), getattr(pair.method.model, scores)) for pair in pairs)
        errors = [statistics.average(statistics.differences(a, b)).stderr for a, b in sides if a and b]
        found = sorted(100 * statistics.minimum_detectable_difference(error) for error in errors)
        if shown := [f"{value:.1f}" for value in found if math.isfinite(value)]:
            texts.append(f"{' to '.join(dict.fromkeys((shown[0], shown[-1])))} points of {measure}")
    if not texts:
        return ()
    return (f"Minimum detectable difference with these items: {listed(texts)} (5 % level, power 80 %, uncorrected).",)


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

CLAIM_FIELDS = _fields("claimed better", "claimed worse", True, Field[Pair]("claim", "claim", lambda pair: pair.claim))
CLAIM_NOTE = (
    "A claim holds by a measure if the interval lies on its side, does not hold if on the other, and cannot be told if "
    f"it contains no difference. {CORRECTED} Ratios of methods differ a little, since layers and blocks come in sizes."
)


def claims(evidence: Evidence) -> tuple[tuple[Finding, ...], Grid]:
    """Make a finding for each claim, and a table of all their pairs, over which intervals are corrected."""
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
    verdicts = {
        measure.title.partition(",")[0]: summed(known)
        for key, measure in MEASURES.items()
        if (known := [verdict for pair in pairs if (verdict := pair.verdict(key)) is not None])
    }
    ways: dict[str, list[str]] = {}
    for title_of, verdict in verdicts.items():
        ways.setdefault(verdict, []).append(title_of)
    found = "; ".join(f"by {listed(names)}: {verdict}" for verdict, names in ways.items())
    text = "; ".join(f"{_named(pair.method)} against {_named(pair.base)}: {pair}" for pair in pairs)
    return Finding(Level.RESULT, "claim", f"{title}: {found}", f"{text}.")


def _named(entry: Entry) -> str:
    return f"{entry.variant.name} ({100 * entry.ratio:.1f} %)"


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
        return entry.variant.calibration.num_samples

    def only_samples_differ(entry: Entry) -> bool:
        return entry.variant.calibration.model_copy(update={"num_samples": count(base)}) == base.variant.calibration

    title = "More calibration samples do not help beyond a point"
    varied = filter(only_samples_differ, evidence.varied(BLOCKPRUNER, "calibration"))
    *smaller, largest = sorted([base, *varied], key=count)
    if not smaller:
        return [Finding(Level.NOTE, "claim", f"{title}: not measured in this study", "")]
    pairs = pairs_of([(entry, largest) for entry in smaller])
    gains = [i for i, pair in enumerate(pairs) if HOLDS in map(pair.verdict, MEASURES)]
    last = max(gains, default=-1)
    if last == len(smaller) - 1:
        words = f"does not hold up to {count(largest):,} samples, which still gain"
    elif all(set(entry.plan.removed) == set(largest.plan.removed) for entry in smaller):
        words = f"the same blocks are removed with {count(smaller[0]):,} samples as with more"
    else:
        words = f"no gain can be told beyond {count(smaller[last + 1]):,} samples"
    texts = [
        f"{count(largest):,} against {count(entry):,} samples: {pair}."
        for entry, pair in zip(smaller, pairs, strict=True)
    ]
    texts.append("An interval that contains no gain also contains what it cannot exclude: its upper end.")
    return [Finding(Level.RESULT, "claim", f"{title}: {words}", " ".join(texts))]
