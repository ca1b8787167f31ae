"""Methods against one another on the same items: intervals, tests, Holm's correction, and the paper's claims.

Decides how a comparison is stated. A claim holds by a measure if the 95 % interval of the difference lies on its side
of zero, does not hold if it lies on the other side, and cannot be told where the interval contains zero.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from blockpruner.paper.evidence import Contrast, Entry, Evidence, compare
from blockpruner.paper.experiments import BLOCKPRUNER, SLEB
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
    contrast: Contrast
    p_accuracy: float
    p_items: float


def pairs_of(found: Sequence[tuple[Entry, Entry]]) -> list[Pair]:
    """Compare (base, other) each."""
    contrasts = [compare(base.model, other.model) for base, other in found]
    accuracy = statistics.holm([contrast.accuracy.p for contrast in contrasts])
    items = statistics.holm([contrast.items.p for contrast in contrasts])
    return [Pair(*pair, c, a, i) for pair, c, a, i in zip(found, contrasts, accuracy, items, strict=True)]


def contrast_grid(name: str, title: str, found: Sequence[tuple[Entry, Entry]]) -> Grid:
    """One row a pair; p values are corrected over the rows."""
    pairs = pairs_of(found)
    return grid_of(name, title, CONTRAST_FIELDS, pairs, (CONTRAST_NOTE, *detectable(pairs)))


CONTRAST_FIELDS: tuple[Field[Pair], ...] = (
    Field("model", "model", lambda pair: pair.base.subject),
    Field("method", "method", lambda pair: pair.method.variant.name),
    Field("ratio_pct", "removed, %", lambda pair: share(pair.method.ratio)),
    Field("against", "against", lambda pair: pair.base.variant.name),
    Field("against_ratio_pct", "removed, %", lambda pair: share(pair.base.ratio)),
    Field("difference", "difference, points [95 %]", lambda pair: points(pair.contrast.accuracy)),
    Field("p_bootstrap", "p", lambda pair: p_value(pair.contrast.accuracy.p)),
    Field("p_bootstrap_holm", "p, Holm", lambda pair: p_value(pair.p_accuracy)),
    Field("only_method", "only it right", lambda pair: Number(pair.contrast.items.only_b, 0)),
    Field("only_against", "only the other right", lambda pair: Number(pair.contrast.items.only_a, 0)),
    Field("p_mcnemar", "McNemar p", lambda pair: p_value(pair.contrast.items.p)),
    Field("p_mcnemar_holm", "p, Holm", lambda pair: p_value(pair.p_items)),
    Field("perplexity_ratio", "held-out PPL, × [95 %]", lambda pair: factor(pair.contrast.perplexity)),
)

CONTRAST_NOTE = (
    "Difference of the averages over tasks, method minus the other, on the same items: percentile interval and p of "
    "10,000 paired resamples within each task. McNemar: exact, over the items of all tasks pooled. Holm: corrected for "
    "the rows of this table. PPL: quotient of the perplexities on the held-out text, t interval over its rows. "
    "Measured here; nothing in this table is the paper's."
)


def detectable(pairs: Sequence[Pair]) -> tuple[str, ...]:
    """A sentence on the smallest difference that these items could show."""
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
    pairs: Callable[[Evidence], Sequence[tuple[Entry, Entry]]]
    """(claimed worse, claimed better) at about one ratio."""


def _main(*others: str) -> Callable[[Evidence], Sequence[tuple[Entry, Entry]]]:
    return lambda evidence: [(other, best) for best in evidence.main(BLOCKPRUNER) for other in evidence.main(*others)]


def _same_budget(evidence: Evidence, worse: str, better: str) -> list[tuple[Entry, Entry]]:
    return [(b, a) for a in evidence.of(better) if (b := evidence.at(worse, a.budget)) is not None]


def _main_or_largest(*others: str) -> Callable[[Evidence], Sequence[tuple[Entry, Entry]]]:
    """At the budget of Table 1, or else the largest that both have."""

    def found(evidence: Evidence) -> list[tuple[Entry, Entry]]:
        shared = [_same_budget(evidence, other, BLOCKPRUNER) for other in others]
        chosen = ([pair for pair in own if pair[1].budget == pair[1].variant.main] or own[-1:] for own in shared)
        return [pair for own in chosen for pair in own]

    return found


CLAIMS: tuple[Claim, ...] = (
    Claim("Removing blocks beats removing layers at about the same ratio", _main(SLEB, "shortgpt")),
    Claim(
        "MHA blocks are more redundant than MLP blocks", lambda evidence: _same_budget(evidence, "mlp-only", "mha-only")
    ),
    Claim(
        "Perplexity is a better metric than BI, RM and JS in the same greedy search",
        _main_or_largest("blockpruner-by-bi", "blockpruner-by-rm", "blockpruner-by-js"),
    ),
    Claim("Iterative search beats scoring once", _main("one-shot-perplexity")),
)

CLAIM_FIELDS: tuple[Field[tuple[str, Pair]], ...] = (
    Field("model", "model", lambda row: row[1].base.subject),
    Field("claim", "claim", lambda row: row[0]),
    Field("method", "claimed better", lambda row: row[1].method.variant.name),
    Field("ratio_pct", "removed, %", lambda row: share(row[1].method.ratio)),
    Field("against", "claimed worse", lambda row: row[1].base.variant.name),
    Field("against_ratio_pct", "removed, %", lambda row: share(row[1].base.ratio)),
    Field("difference", "accuracy, points [95 %]", lambda row: points(row[1].contrast.accuracy)),
    Field("p", "p", lambda row: p_value(row[1].contrast.accuracy.p)),
    Field("p_holm", "p, Holm", lambda row: p_value(row[1].p_accuracy)),
    Field("by_accuracy", "by accuracy", lambda row: by_accuracy(row[1])),
    Field("perplexity_ratio", "held-out PPL, × [95 %]", lambda row: factor(row[1].contrast.perplexity)),
    Field("p_perplexity", "p", lambda row: p_value(row[1].contrast.perplexity.p)),
    Field("by_perplexity", "by held-out PPL", lambda row: by_perplexity(row[1])),
)

CLAIM_NOTE = (
    "A claim holds by a measure if the 95 % interval lies on its side, does not hold if on the other, and cannot "
    "be told if it contains no difference. Intervals are those of single comparisons; Holm: p of accuracy over the "
    "rows of this table. Ratios of methods differ a little, since layers and blocks come in sizes."
)


def claims(evidence: Evidence) -> tuple[tuple[Finding, ...], Grid]:
    """A finding for each claim, and all that it rests on; p values of accuracy are corrected over all pairs."""
    found = [(claim.title, pair) for claim in CLAIMS for pair in claim.pairs(evidence)]
    pairs = pairs_of([pair for _, pair in found])
    rows = list(zip([title for title, _ in found], pairs, strict=True))
    model = evidence.dense.subject
    grid = grid_of(
        f"claims-{slug(model)}",
        f"The comparisons behind them: {model}",
        CLAIM_FIELDS,
        rows,
        (CLAIM_NOTE, *detectable(pairs)),
    )
    findings = [_claim(claim.title, [pair for title, pair in rows if title == claim.title]) for claim in CLAIMS]
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
    """One verdict for several comparisons: the common one, or how many have each."""
    counts = Counter(verdicts)
    if len(counts) == 1:
        return verdicts[0]
    return listed([f"{counts[word]} of {len(verdicts)} {word}" for word in (HOLDS, FAILS, OPEN) if counts[word]])


def _samples(evidence: Evidence) -> list[Finding]:
    """More samples: each size against the largest, at the budget of the sensitivity study."""
    base = evidence.at(BLOCKPRUNER, evidence.sensitivity)
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
