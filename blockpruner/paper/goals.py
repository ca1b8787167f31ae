"""What a set was meant to show, beside what it measured. The goals stand in runs/sets.yaml."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from blockpruner.core.sets import SetGoal
from blockpruner.paper.beyond import compared
from blockpruner.paper.evidence import Entry, Evidence
from blockpruner.reporting import statistics
from blockpruner.reporting.formats import percent
from blockpruner.reporting.grids import Cell, Column, Grid, Number
from blockpruner.reporting.statistics import Effect, Interval

TITLE = "Goals"
NOTE = (
    "What this set was meant to show, set before it was measured. × dense: quotient of the perplexities on the same "
    "rows. Reached: yes, if the whole 95 % interval is; by the point, if the measured value alone is. One calibration "
    "draw, of the seed given: intervals are over held-out rows and items, not over draws."
)

Z = 1.96
"""Half a 95 % interval of a mean over many items, in standard errors."""


def _heldout(entry: Entry, evidence: Evidence, text: str = "heldout") -> Effect:
    return statistics.perplexity_ratio(entry.dense.texts[text].row_nll, entry.model.texts[text].row_nll)


def _wikitext2(entry: Entry, evidence: Evidence) -> Effect:
    """Quotient of two quotients that are measured on different texts: their logarithms' errors add up in squares."""
    there, here = _heldout(entry, evidence, "wikitext2"), _heldout(entry, evidence)
    nats = math.log(there.value / here.value)
    half = math.hypot(*(math.log(each.interval.high / each.interval.low) / 2 for each in (there, here)))
    return Effect(math.exp(nats), Interval(math.exp(nats - half), math.exp(nats + half)), math.nan)


def _peers(entry: Entry, evidence: Evidence) -> Effect:
    (group,) = (group for group in compared(evidence) if entry in group)
    best = min((other for other in group if other is not entry), key=lambda other: other.model.perplexity)
    return statistics.perplexity_ratio(best.model.texts["heldout"].row_nll, entry.model.texts["heldout"].row_nll)


def _confidence(entry: Entry, evidence: Evidence) -> Effect:
    found = statistics.stratified_t(entry.dense.p_gold, entry.model.p_gold)
    error = (found.interval.high - found.interval.low) / (2 * Z)
    return Effect(abs(found.value) / error, Interval(0, math.inf), found.p)


MEASURES: Mapping[str, tuple[str, Callable[[Entry, Evidence], Effect]]] = {
    "heldout": ("held-out perplexity, × dense", _heldout),
    "wikitext2": ("WikiText-2’s × dense over that of the held-out text", _wikitext2),
    "peers": ("held-out perplexity, × the best other method healed alike", _peers),
    "p": ("p of the right answer, standard errors from dense", _confidence),
}


def goals_grid(goals: Sequence[SetGoal], found: Sequence[Evidence]) -> Grid:
    """A row for each goal and study that has such a model."""
    columns = (
        Column("model", "model"), Column("of", "of"), Column("removed", "removed, %"), Column("what", "what"),
        Column("goal", "at most"), Column("measured", "measured [95 %]"), Column("reached", "reached"),
        Column("seed", "seed"),
    )  # fmt: skip
    rows: list[tuple[Cell, ...]] = []
    for goal in goals:
        words, measure = MEASURES[goal.measure]
        for evidence in found:
            entry = _model(goal, evidence)
            if entry is None:
                rows.append(("", goal.method, "", words, Number(goal.at_most), "not measured", "", ""))
                continue
            effect = measure(entry, evidence)
            low, high = effect.interval.low, effect.interval.high
            reached = "no"
            if effect.value <= goal.at_most:
                reached = "yes" if high <= goal.at_most or math.isinf(high) else "by the point"
            rows.append((
                entry.subject, entry.title, percent(entry.ratio, 2), words, Number(goal.at_most),
                Number(effect.value, 3, low=low, high=high), reached, Number(entry.variant.calibration.seed, 0),
            ))  # fmt: skip
    return Grid("goals", TITLE, columns, tuple(rows), (NOTE,))


def _model(goal: SetGoal, evidence: Evidence) -> Entry | None:
    wanted = (goal.method, goal.budget, goal.compensate, goal.recover)
    for entry in (*evidence.entries, *evidence.healed):
        plan = entry.plan
        if not entry.variant.factor and wanted == (entry.variant.method, entry.budget, plan.compensate, plan.recover):
            return entry
    return None
