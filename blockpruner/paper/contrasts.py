"""Methods against one another on the same items: a table of pairs with intervals, tests, and Holm's correction.

Decides how a comparison is stated. Which pairs there are is decided by whoever calls; the statistics are those of
`evaluation.statistics`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from blockpruner.paper import statistics
from blockpruner.paper.evidence import Contrast, Entry, compare
from blockpruner.paper.statistics import Comparison
from blockpruner.reporting.grids import Cell, Column, Grid, Number

CONTRAST_COLUMNS = (
    Column("model", "model"),
    Column("method", "method"),
    Column("ratio_pct", "removed, %"),
    Column("against", "against"),
    Column("against_ratio_pct", "removed, %"),
    Column("difference", "difference, points [95 %]"),
    Column("p_bootstrap", "p"),
    Column("p_bootstrap_holm", "p, Holm"),
    Column("only_method", "only it right"),
    Column("only_against", "only the other right"),
    Column("p_mcnemar", "McNemar p"),
    Column("p_mcnemar_holm", "p, Holm"),
    Column("perplexity_ratio", "held-out PPL, × [95 %]"),
)


@dataclass(frozen=True, eq=False)
class Pair:
    """method: what is compared with `base`."""

    model: str
    base: Entry
    method: Entry

    @property
    def contrast(self) -> Contrast:
        return compare(self.base.model, self.method.model)


def contrast_grid(name: str, title: str, pairs: Sequence[Pair]) -> Grid:
    """One row a pair; p values are corrected over the rows."""
    contrasts = [pair.contrast for pair in pairs]
    bootstrap = statistics.holm([found.accuracy.p for found in contrasts])
    mcnemar = statistics.holm([found.items.p for found in contrasts])
    rows: list[tuple[Cell, ...]] = [
        (
            pair.model,
            pair.method.variant.name,
            share(pair.method.ratio),
            pair.base.variant.name,
            share(pair.base.ratio),
            points(found.accuracy),
            p_value(found.accuracy.p),
            p_value(bootstrap[i]),
            Number(found.items.only_b, 0),
            Number(found.items.only_a, 0),
            p_value(found.items.p),
            p_value(mcnemar[i]),
            factor(found.perplexity),
        )
        for i, (pair, found) in enumerate(zip(pairs, contrasts, strict=True))
    ]
    return Grid(name, title, CONTRAST_COLUMNS, tuple(rows), (CONTRAST_NOTE, *detectable(contrasts)))


CONTRAST_NOTE = (
    "Difference of the averages over tasks, method minus the other, on the same items: percentile interval and p of "
    "10,000 paired resamples within each task. McNemar: exact, over the items of all tasks pooled. Holm: corrected for "
    "the rows of this table. PPL: quotient of the perplexities on the held-out text, t interval over its rows. "
    "Measured here; nothing in this table is the paper's."
)


def detectable(contrasts: Sequence[Contrast]) -> tuple[str, ...]:
    """A sentence on the smallest difference that these items could show."""
    found = [statistics.minimum_detectable_difference(contrast.stderr) for contrast in contrasts]
    found = [100 * value for value in found if math.isfinite(value)]
    if not found:
        return ()
    low, high = f"{min(found):.1f}", f"{max(found):.1f}"
    span = low if low == high else f"{low} to {high}"
    return (f"Minimum detectable difference with these items: {span} points (5 % level, power 80 %, uncorrected).",)


def share(ratio: float) -> Number:
    return Number(100 * ratio, 2)


def points(found: Comparison) -> Number:
    return Number(100 * found.value, 1, low=100 * found.interval.low, high=100 * found.interval.high, signed=True)


def factor(found: Comparison, digits: int = 3) -> Number:
    return Number(found.value, digits, low=found.interval.low, high=found.interval.high)


def p_value(p: float) -> Number:
    return Number(p, 4, is_p=True)
