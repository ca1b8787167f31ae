"""The tables of a study: every model, the paper's beside its numbers, and paired comparisons.

Decides which models belong in which table, and which row of the paper one is shown with: the same
model and method, at the nearest ratio within BAND.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from blockpruner.core.blocks import BlockKind
from blockpruner.core.errors import InputError
from blockpruner.methods.recipes import BLOCKPRUNER, RECIPES
from blockpruner.reporting import statistics
from blockpruner.reporting.paper.evidence import FIVE, Measured, Row
from blockpruner.reporting.paper.frames import table_of_frame
from blockpruner.reporting.paper.published import DENSE, Published, read_published
from blockpruner.reporting.results import Model
from blockpruner.reporting.statistics import Effect
from blockpruner.reporting.table import Table

BAND = 0.015
"""Models whose ratios differ by no more than this share of all parameters count as of one size. It
is half of a layer of a 32-layer model, as near as whole layers come to a budget."""


def models_frame(rows: Sequence[Row]) -> pd.DataFrame:
    """Show every model of a study: one line a target, with the reason where it was not measured."""
    dense = {row.subject.run: row.found for row in rows if row.method == DENSE}
    lines = [_line(row, dense[row.subject.run]) for row in rows]
    frame = pd.DataFrame(lines)
    return frame.reindex(columns=[*(c for c in frame.columns if c != "reason"), "reason"])


def _line(row: Row, dense: Measured | None) -> dict[str, Any]:
    """Give all numbers of a model; shares are in per cent, × is over the dense model."""
    line: dict[str, Any] = {
        "model": row.subject.model,
        "run": row.subject.run,
        "target": row.target,
        "method": row.title,
        "recipe": row.method,
        "healing": row.healing,
        "budget": row.budget,
        "reason": row.reason,
        "texts": row.subject.texts,
        "samples": row.subject.samples,
    }
    found = row.found
    if found is None or dense is None:
        return line
    model, plan = found.result, found.plan
    line |= {"removed_pct": 100 * plan.ratio if plan else 0.0}
    if plan:
        mha, mlp = plan.blocks[BlockKind.MHA], plan.blocks[BlockKind.MLP]
        line |= {"mha": mha, "mlp": mlp, "kv_pct": -100 * plan.removes["kv"]}
        line |= {"mha_share_pct": 100 * mha / (mha + mlp)} if mha + mlp else {}
    if row.subject.labels.wikitext2:
        line["wikitext2_ppl"] = model.perplexity
    line["heldout_ppl"] = model.perplexity
    before, after = dense.result.heldout, model.heldout
    line |= interval("heldout_x", statistics.loss(before.row_nll, after.row_nll) if plan else None)
    if plan and (
        kinds := statistics.losses_by_kind(before.row_nll, after.row_nll, before.row_kind)
    ):
        for kind, (_, effect) in kinds.items():
            line |= interval(f"{kind}_x", effect)
        line["worst_x"] = max(effect.value for _, effect in kinds.values())
    line |= {"avg_pct": 100 * model.average.value, "avg_pct_se": 100 * model.average.stderr}
    if model.confidence:
        line |= {
            "p_gold_pct": 100 * model.confidence.value,
            "p_gold_pct_se": 100 * model.confidence.stderr,
        }
    for task, score in model.tasks.items():
        line[task] = 100 * score.value
    line["weights_mib"] = model.weight_bytes / 2**20
    if found.race:
        line["generation_ms"] = 1000 * found.race.pruned.median("generation")
        few = len(found.race.dense.seconds["generation"]) == 1
        line |= interval(
            "generation_x", found.race.speedups["generation"] if plan and not few else None
        )
    if "seconds" in found.search:
        line["minutes"] = found.search["seconds"] / 60
    return line | {key: value for key, value in found.search.items() if key != "seconds"}


def interval(key: str, effect: Effect | None, scale: float = 1.0) -> dict[str, float]:
    """Give a number and the ends of its interval, each in its column; nothing where it was not
    measured."""
    if effect is None:
        return {}
    ends = effect.interval
    return {
        key: scale * effect.value,
        f"{key}_low": scale * ends.low,
        f"{key}_high": scale * ends.high,
    }


def measured(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[frame["reason"].fillna("") == ""] if "heldout_ppl" in frame else frame.iloc[:0]


def plain_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """Leave what is not healed, of the first run of each method and model: the best of several
    would be chance."""
    own = frame[frame["healing"] == ""]
    return own[own["run"] == own.groupby(["model", "recipe"])["run"].transform("first")]


@dataclass(frozen=True)
class PaperTable:
    name: str
    title: str
    source: str
    """The file of the paper's numbers in data/paper."""
    methods: tuple[str, ...]
    columns: Mapping[str, str]
    """Our column by the paper's."""
    ours: tuple[str, ...] = ()
    """Columns that only our rows have."""
    note: str = ""


RATIO, AVERAGE, WIKITEXT = (
    {"ratio_pct": "removed_pct"},
    {"avg": "avg_pct"},
    {"wikitext2_ppl": "wikitext2_ppl"},
)
QUALITY = ("heldout_ppl", "p_gold_pct")
NINE = {"truthfulqa": "truthfulqa_mc1", "race": "race", "swag": "swag", "openbookqa": "openbookqa"}
CURVES = (BLOCKPRUNER, "shortgpt", "relative-magnitude", "relative-magnitude-frobenius")
MAIN = (
    DENSE,
    "slicegpt",
    "laco",
    "laco-3",
    "laco-7",
    "relative-magnitude",
    "relative-magnitude-frobenius",
    "shortgpt",
    "greedy-layers",
    BLOCKPRUNER,
    "blockpruner-per-parameter",
    "random",
)
TABLES: tuple[PaperTable, ...] = (
    PaperTable(
        "table1",
        "Table 1. Pruning methods at about the same ratio",
        "table1_main",
        MAIN,
        {**RATIO, **WIKITEXT, **{task: task for task in FIVE}, **AVERAGE},
        QUALITY,
    ),
    PaperTable(
        "table2",
        "Table 2. What blocks and iteration are worth",
        "table2_ablation",
        (BLOCKPRUNER, "one-shot-perplexity", "greedy-layers"),
        {**RATIO, **AVERAGE},
        QUALITY,
    ),
    PaperTable(
        "table4",
        "Table 4. Perplexity and Jensen-Shannon divergence as the metric",
        "table4_metric",
        (BLOCKPRUNER, "blockpruner-by-js"),
        {**RATIO, **AVERAGE},
        QUALITY,
    ),
    PaperTable(
        "table5",
        "Table 5. Higher ratios, blocks and layers",
        "table5_high_sparsity",
        (BLOCKPRUNER, "greedy-layers"),
        {**RATIO, **WIKITEXT, **AVERAGE},
        QUALITY,
    ),
    PaperTable(
        "table6",
        "Table 6. Time to generate",
        "table6_speed",
        (DENSE, "slicegpt", *CURVES),
        {**RATIO, "generate_128_tokens_ms": "generation_ms", "speedup": "generation_x"},
    ),
    PaperTable(
        "table7",
        "Table 7. Time of the search",
        "table7_pruning_time",
        tuple(name for name, method in RECIPES.items() if method.published),
        {"minutes": "minutes"},
        ("trials_asked", "trials_computed"),
        "Of a nested search, up to the ratio of Table 1.",
    ),
    PaperTable(
        "table8",
        "Table 8. AQuA-RAT",
        "table8_aqua",
        (DENSE, *CURVES),
        {"accuracy": "agieval_aqua_rat"},
        note="The prompt is that of AGIEval, a guess: the paper does not print its own.",
    ),
    PaperTable(
        "table9",
        "Table 9. Methods over ratios",
        "table9_newer_models",
        CURVES,
        {**RATIO, **AVERAGE},
        QUALITY,
    ),
    PaperTable(
        "table10",
        "Table 10. Four more tasks",
        "table10_nine_tasks",
        MAIN,
        {**NINE, "avg9": "avg9_pct"},
    ),
)


def rows_of_table(table: PaperTable, frame: pd.DataFrame) -> pd.DataFrame:
    """Choose the rows that a table may have; none where there is only one method."""
    own = plain_rows(frame[frame["recipe"].isin(table.methods)])
    return own if own[own["recipe"] != DENSE]["recipe"].nunique() > 1 else own.iloc[:0]


def paper_tables(frame: pd.DataFrame, folder: Path) -> list[Table]:
    """Make the tables of which something was measured: our rows, each followed by the paper's row
    of its model."""
    known = measured(frame)
    nine = [task for task in (*FIVE, *NINE.values()) if task in known]
    if len(nine) == len(FIVE) + len(NINE):
        known = known.assign(avg9_pct=known[nine].mean(axis=1, skipna=False))
    found = []
    for table in TABLES:
        wanted = [
            key for key in table.columns.values() if key not in ("removed_pct", "avg_pct")
        ] or ["avg_pct"]
        own = rows_of_table(table, known)
        if any(key in own and own[key].notna().any() for key in (*wanted, *table.ours)):
            once = "wikitext2_ppl" in wanted and "wikitext2_ppl" in own
            ours = [key for key in table.ours if not (once and key == "heldout_ppl")]
            columns = ["model", "method", "source", *table.columns.values(), *ours]
            lines = pd.DataFrame(beside(table, own, folder)).reindex(columns=columns)
            note = f"{PAPER_NOTE} {table.note}".rstrip()
            found += [table_of_frame(table.name, table.title, lines, note)] if len(lines) else []
    return found


PAPER_NOTE = (
    "Rows “here” are measured by this project, rows “paper” are the numbers of arXiv 2406.10594."
)


def beside(table: PaperTable, own: pd.DataFrame, folder: Path) -> list[dict[str, Any]]:
    """List the rows of a table: ours (from `rows_of_table`) near the paper's ratios, and the
    paper's. Without ratios, those of Table 1 hold."""
    lines: list[dict[str, Any]] = []
    published, first = (
        read_published(folder, table.source),
        read_published(folder, TABLES[0].source),
    )
    ratios = {(row.model, row.key): row.numbers["ratio_pct"] for row in first}
    for model, mine in own.groupby("model", sort=False):
        theirs = [row for row in published if row.model == model]
        sizes = [
            row.numbers.get("ratio_pct", ratios.get((row.model, row.key), 0.0)) for row in theirs
        ]
        found = [_nearest(mine, row, size) for row, size in zip(theirs, sizes, strict=True)]
        shown = {index for indices in found for index in indices}
        behind = {indices[-1]: row for row, indices in zip(theirs, found, strict=True) if indices}
        for index, line in mine.iterrows():
            apart = min((abs(line["removed_pct"] - size) for size in sizes if size), default=0.0)
            near = line["recipe"] == DENSE or apart <= 100 * BAND
            known = not _keys(line["recipe"]).isdisjoint(row.key for row in theirs)
            if index in shown or (near and not known):
                lines.append({**line, "source": "here"})
            if index in behind:
                lines.append(_theirs(table, behind[index]))
        lines += [
            _theirs(table, row) for row, indices in zip(theirs, found, strict=True) if not indices
        ]
    return lines


def _theirs(table: PaperTable, row: Published) -> dict[str, Any]:
    numbers = {ours: row.numbers[key] for key, ours in table.columns.items() if key in row.numbers}
    return {"model": row.model, "method": row.title, "source": "paper", **numbers}


def _keys(recipe: str) -> set[str]:
    """List the names that a recipe's rows have in data/paper."""
    return (
        {DENSE}
        if recipe == DENSE
        else set(RECIPES[recipe].published)
        if recipe in RECIPES
        else set()
    )


def _nearest(own: pd.DataFrame, row: Published, size: float) -> list[Any]:
    """Find our rows of the paper's method at the nearest ratio within BAND, one of each of our
    readings of it."""
    near = own[own["recipe"].map(lambda recipe: row.key in _keys(recipe))]
    apart = (near["removed_pct"] - size).abs()
    best = apart.groupby(near["recipe"], sort=False).idxmin() if len(near) else []
    return [index for index in best if apart[index] <= 100 * BAND]


T = TypeVar("T")
Measure = Callable[[Model, Model, float], Effect | None]
MEASURES: Mapping[str, tuple[Measure, float]] = {
    "ppl_against": (
        lambda a, b, level: statistics.perplexity_ratio(
            a.heldout.row_nll, b.heldout.row_nll, level
        ),
        1,
    ),
    "avg_against": (
        lambda a, b, level: statistics.paired_bootstrap(a.scores, b.scores, level=level),
        100,
    ),
    "p_gold_against": (
        lambda a, b, level: (
            statistics.stratified_t(a.p_gold, b.p_gold, level) if a.p_gold and b.p_gold else None
        ),
        100,
    ),
}
"""How two models are compared on the same items and rows, and the unit that this is shown in."""

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


def paired(rows: Sequence[Row]) -> list[Table]:
    """Compare every method with BlockPruner at the same size, healed alike: in all, and task by
    task."""
    pairs = [(base, row) for row in rows if (base := _base_of(row, rows)) is not None]
    lines: list[dict[str, Any]] = [
        {
            "model": row.subject.model,
            "run": row.subject.run,
            "method": row.title,
            "removed_pct": 100 * _ratio(row),
            "against": base.title,
            "against_removed_pct": 100 * _ratio(base),
        }
        for base, row in pairs
    ]
    found: list[dict[str, Any]] = []
    for line, pair in zip(lines, pairs, strict=True):
        scores = pair[0].found.result.scores if pair[0].found else ()
        tests = {task: partial(_effect, _of(task), *pair) for task in scores}
        for task, (effect, p) in _corrected(tests).items():
            found.append(
                line
                | {"task": task}
                | interval("score_against", effect, 100)
                | {"score_against_p": p}
            )
    for key, (measure, scale) in MEASURES.items():
        by_pair = {i: partial(_effect, measure, *pair) for i, pair in enumerate(pairs)}
        for i, (effect, p) in _corrected(by_pair).items():
            lines[i] |= interval(key, effect, scale) | {f"{key}_p": p}
    tables = [("paired", "Methods on the same items", lines, PAIRED_NOTE)]
    tables += [("paired-tasks", "Methods on the items of each task", found, TASKS_NOTE)]
    return [
        table_of_frame(name, title, pd.DataFrame(own), note)
        for name, title, own, note in tables
        if own
    ]


def _of(task: str) -> Measure:
    return lambda a, b, level: statistics.paired_t(a.scores[task], b.scores[task], level)


def _corrected(
    tests: Mapping[T, Callable[[float], Effect | None]],
) -> dict[T, tuple[Effect | None, float]]:
    """Test a family, each at the level at which Holm's correction tests it; those that cannot be
    made are left out."""
    p_values = {key: effect.p for key, test in tests.items() if (effect := test(0.95)) is not None}
    family = list(p_values.values())
    corrected = zip(p_values, statistics.holm(family), statistics.holm_levels(family), strict=True)
    return {key: (tests[key](level), p) for key, p, level in corrected}


def _effect(measure: Measure, base: Row, row: Row, level: float) -> Effect | None:
    """Compare two models; None where there are too few rows or items to compare."""
    assert base.found and row.found
    try:
        return measure(base.found.result, row.found.result, level)
    except InputError:
        return None


def _ratio(row: Row) -> float:
    return row.found.plan.ratio if row.found and row.found.plan else 0.0


def _base_of(row: Row, rows: Sequence[Row]) -> Row | None:
    """Find BlockPruner's model that a row is compared with."""
    if row.found is None or row.found.plan is None or row.method == BLOCKPRUNER:
        return None
    alike = [
        other
        for other in rows
        if other.method == BLOCKPRUNER
        and other.found
        and _items(other) == _items(row)
        and other.healing == row.healing
        and abs(_ratio(other) - _ratio(row)) <= BAND
    ]

    def apart(other: Row) -> tuple[bool, float]:
        return other.subject.run != row.subject.run, abs(_ratio(other) - _ratio(row))

    return min(alike, key=apart, default=None)


def _items(row: Row) -> tuple[str, ...]:
    """Give what two models must have in common to be compared."""
    labels = row.subject.labels
    return row.subject.model, labels.heldout, labels.tasks
