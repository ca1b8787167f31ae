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
    "What this set was meant to show. × dense: quotient of the perplexities on the same rows. Reached: yes, if the "
    "whole 95 % interval is; by the point, if the measured value alone is; where no interval is shown, by the value. "
    "One calibration draw, of the seed given: intervals are over held-out rows and items, not over draws."
)

Z = 1.96
"""Half a 95 % interval of a mean over many items, in standard errors."""

Measured = tuple[float, Interval | None]


def _ratio(entry: Entry, text: str = "heldout") -> Effect | None:
    dense, own = entry.dense.texts.get(text), entry.model.texts.get(text)
    return None if dense is None or own is None else statistics.perplexity_ratio(dense.row_nll, own.row_nll)


def _heldout(entry: Entry, evidence: Evidence) -> Measured | None:
    found = _ratio(entry)
    return None if found is None else (found.value, found.interval)


def _wikitext2(entry: Entry, evidence: Evidence) -> Measured | None:
    """Quotient of two quotients that are measured on different texts: their logarithms' errors add up in squares."""
    there, here = _ratio(entry, "wikitext2"), _ratio(entry)
    if there is None or here is None:
        return None
    nats = math.log(there.value / here.value)
    half = math.hypot(*(math.log(each.interval.high / each.interval.low) / 2 for each in (there, here)))
    return math.exp(nats), Interval(math.exp(nats - half), math.exp(nats + half))


def _peers(entry: Entry, evidence: Evidence) -> Measured | None:
    others = [other for group in compared(evidence) if entry in group for other in group if other is not entry]
    if not others:
        return None
    best = min(others, key=lambda other: other.model.perplexity)
    found = statistics.perplexity_ratio(best.model.texts["heldout"].row_nll, entry.model.texts["heldout"].row_nll)
    return found.value, found.interval


def _confidence(entry: Entry, evidence: Evidence) -> Measured | None:
    if not (entry.dense.p_gold and entry.model.p_gold):
        return None
    found = statistics.stratified_t(entry.dense.p_gold, entry.model.p_gold)
    half = (found.interval.high - found.interval.low) / 2
    return (abs(found.value) * Z / half if half else 0.0 if not found.value else math.inf), None


MEASURES: Mapping[str, tuple[str, Callable[[Entry, Evidence], Measured | None]]] = {
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
        what, measure = MEASURES[goal.measure]
        asked = " + ".join(part for part in (goal.compensate, "training" * goal.train) if part not in ("none", ""))
        name = f"{goal.method} at {goal.budget}" + (f" + {asked}" if asked else "")
        for evidence in found:
            entry = _model(goal, evidence)
            known = None if entry is None else measure(entry, evidence)
            if entry is None or known is None:
                rows.append(("", name, "", what, Number(goal.at_most, 3), "not measured", "", ""))
                continue
            value, ends = known
            reached = "no"
            if value <= goal.at_most:
                reached = "yes" if ends is None or ends.high <= goal.at_most else "by the point"
            measured = Number(value, 3) if ends is None else Number(value, 3, low=ends.low, high=ends.high)
            rows.append((
                entry.subject, entry.title, percent(entry.ratio, 2), what, Number(goal.at_most, 3), measured, reached,
                Number(entry.variant.calibration.seed, 0),
            ))  # fmt: skip
    return Grid("goals", TITLE, columns, tuple(rows), (NOTE,))


def _model(goal: SetGoal, evidence: Evidence) -> Entry | None:
    wanted = (goal.method, goal.budget, goal.compensate, goal.train)
    for entry in (*evidence.entries, *evidence.healed):
        plan = entry.plan
        if not entry.variant.factor and wanted == (entry.variant.method, entry.budget, plan.compensate, plan.train):
            return entry
    return None
