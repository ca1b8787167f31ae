"""Paired comparisons of the models of a study with BlockPruner: in all, and task by task.

Decides which two models are compared: of one size, healed alike, on the same items and rows.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from blockpruner.core.errors import InputError
from blockpruner.methods.recipes import BLOCKPRUNER
from blockpruner.reporting import statistics
from blockpruner.reporting.frames import interval, table_of_lines
from blockpruner.reporting.results import Model
from blockpruner.reporting.statistics import Effect
from blockpruner.reporting.table import Table
from study.paper.evidence import Row
from study.paper.tables import BAND

Measure = Callable[[Model, Model, float], Effect | None]
"""Compares two models, with an interval of a level."""

PAIRED_NOTE = (
    "Each method against BlockPruner healed alike, on the same items and rows, at the nearest"
    f" ratio within {100 * BAND:g} points. Accuracy: percentile interval of 10,000 paired resamples"
    " within each task. p of the right answer: t interval over items, by task. Perplexity:"
    " quotient, t interval over rows. Intervals have the level at which Holm's correction over"
    " this table tests them; p is corrected, too."
)

TASKS_NOTE = (
    "The same pairs on each task: paired t interval and test over items, by Holm over a pair's"
    " tasks."
)


def compare_perplexity(a: Model, b: Model, level: float) -> Effect:
    return statistics.perplexity_ratio(a.heldout.row_nll, b.heldout.row_nll, level)


def compare_accuracy(a: Model, b: Model, level: float) -> Effect:
    return statistics.paired_bootstrap(a.scores, b.scores, level=level)


def compare_p_gold(a: Model, b: Model, level: float) -> Effect | None:
    # Some tasks have no p of the right answer.
    if not a.p_gold or not b.p_gold:
        return None
    return statistics.stratified_t(a.p_gold, b.p_gold, level)


MEASURES: Mapping[str, tuple[Measure, float]] = {
    "ppl_against": (compare_perplexity, 1),
    "avg_against": (compare_accuracy, 100),
    "p_gold_against": (compare_p_gold, 100),
}
"""How two models are compared on the same items and rows, and the unit that this is shown in."""


def paired(rows: Sequence[Row]) -> list[Table]:
    """Compare every method with BlockPruner at the same size, healed alike: in all, and task by
    task."""
    lines: list[dict[str, Any]] = []
    task_lines: list[dict[str, Any]] = []
    pairs: list[tuple[Model, Model]] = []
    for row in rows:
        base = _baseline(row, rows)
        if base is None:
            continue
        assert base.measured and row.measured
        line = {
            "model": row.subject.model,
            "run": row.subject.run,
            "method": row.title,
            "removed_pct": 100 * _ratio(row),
            "against": base.title,
            "against_removed_pct": 100 * _ratio(base),
        }
        pair = base.measured.result, row.measured.result
        task_lines += [{**line, **task_line} for task_line in _task_lines(*pair)]
        lines.append(line)
        pairs.append(pair)
    for key, (measure, scale) in MEASURES.items():
        tests = [(measure, pair) for pair in pairs]
        for line, result in zip(lines, _corrected(tests), strict=True):
            line |= _columns(key, result, scale)
    tables = (
        table_of_lines("paired", "Methods on the same items", lines, PAIRED_NOTE),
        table_of_lines("paired-tasks", "Methods on the items of each task", task_lines, TASKS_NOTE),
    )
    return [table for table in tables if table is not None]


def _task_lines(base: Model, model: Model) -> list[dict[str, Any]]:
    def compare_task(task: str) -> Measure:
        return lambda a, b, level: statistics.paired_t(a.scores[task], b.scores[task], level)

    tests = [(compare_task(task), (base, model)) for task in base.scores]
    lines = []
    for task, result in zip(base.scores, _corrected(tests), strict=True):
        if result is not None:
            lines.append({"task": task, **_columns("score_against", result, 100)})
    return lines


def _columns(key: str, result: tuple[Effect | None, float] | None, scale: float) -> dict[str, Any]:
    if result is None:
        return {}
    effect, p = result
    return {**interval(key, effect, scale), f"{key}_p": p}


def _corrected(
    tests: Sequence[tuple[Measure, tuple[Model, Model]]],
) -> list[tuple[Effect | None, float] | None]:
    """Test a family, each at the level at which Holm's correction tests it, with the corrected p;
    None for a test that cannot be made."""
    effects = [_effect(measure, pair, 0.95) for measure, pair in tests]
    family = [effect.p for effect in effects if effect is not None]
    corrected = zip(statistics.holm(family), statistics.holm_levels(family), strict=True)
    results: list[tuple[Effect | None, float] | None] = []
    for (measure, pair), effect in zip(tests, effects, strict=True):
        if effect is None:
            results.append(None)
        else:
            p, level = next(corrected)
            results.append((_effect(measure, pair, level), p))
    return results


def _effect(measure: Measure, pair: tuple[Model, Model], level: float) -> Effect | None:
    """Compare two models; None where there are too few rows or items to compare."""
    try:
        return measure(*pair, level)
    except InputError:
        return None


def _ratio(row: Row) -> float:
    return row.measured.plan.ratio if row.measured and row.measured.plan else 0.0


def _baseline(row: Row, rows: Sequence[Row]) -> Row | None:
    """Find BlockPruner's model that a row is compared with: of the same run if there is one, and of
    the nearest size."""
    if row.measured is None or row.measured.plan is None or row.method == BLOCKPRUNER:
        return None

    def distance(other: Row) -> tuple[bool, float]:
        return other.subject.run != row.subject.run, abs(_ratio(other) - _ratio(row))

    candidates = []
    for other in rows:
        is_blockpruner = other.method == BLOCKPRUNER and other.measured is not None
        # Pairs need the same items and held-out rows, and the same healing to be fair.
        is_alike = other.healing == row.healing and _items(other) == _items(row)
        if is_blockpruner and is_alike and abs(_ratio(other) - _ratio(row)) <= BAND:
            candidates.append(other)
    return min(candidates, key=distance, default=None)


def _items(row: Row) -> tuple[str, ...]:
    """Give what two models must have in common to be compared."""
    labels = row.subject.labels
    return row.subject.model, labels.heldout, labels.tasks
