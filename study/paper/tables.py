"""The tables of a study: every model, and the paper's beside its numbers.

Decides which models belong in which table, and which row of the paper one is shown with: the same
model and method, at the nearest ratio within BAND.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from blockpruner.core.blocks import BlockKind
from blockpruner.core.plan import Plan
from blockpruner.methods.recipes import BLOCKPRUNER, RECIPES
from blockpruner.reporting import statistics
from blockpruner.reporting.frames import interval, table_of_frame
from blockpruner.reporting.results import Text
from blockpruner.reporting.table import Table
from study.paper.evidence import FIVE, Measured, Row
from study.paper.published import DENSE, Published, read_published

BAND = 0.015
"""Models whose ratios differ by no more than this share of all parameters count as of one size. It
is half of a layer of a 32-layer model, as near as whole layers come to a budget."""


PAPER_NOTE = (
    "Rows “here” are measured by this project, rows “paper” are the numbers of arXiv 2406.10594."
)


def models_frame(rows: Sequence[Row]) -> pd.DataFrame:
    """Show every model of a study: one line a target, with the reason where it was not measured."""
    dense = {row.subject.run: row.measured for row in rows if row.method == DENSE}
    # Columns are the union of the lines: tasks and kinds of text differ by run.
    frame = pd.DataFrame([_line(row, dense[row.subject.run]) for row in rows])
    reasons = frame.pop("reason")
    return frame.assign(reason=reasons)


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
    if row.measured is None or dense is None:
        return line
    model, plan = row.measured.result, row.measured.plan
    line |= _removed(plan)
    if row.subject.labels.wikitext2:
        line["wikitext2_ppl"] = model.perplexity
    line["heldout_ppl"] = model.perplexity
    if plan:
        line |= _losses(model.heldout, dense.result.heldout)
    line["avg_pct"] = 100 * model.average.value
    line["avg_pct_se"] = 100 * model.average.stderr
    if model.confidence:
        line["p_gold_pct"] = 100 * model.confidence.value
        line["p_gold_pct_se"] = 100 * model.confidence.stderr
    line |= {task: 100 * score.value for task, score in model.tasks.items()}
    line["weights_mib"] = model.weight_bytes / 2**20
    return line | _times(row.measured)


def _removed(plan: Plan | None) -> dict[str, float]:
    if plan is None:
        return {"removed_pct": 0.0}
    mha, mlp = plan.blocks[BlockKind.MHA], plan.blocks[BlockKind.MLP]
    line = {
        "removed_pct": 100 * plan.ratio,
        "mha": mha,
        "mlp": mlp,
        "kv_pct": -100 * plan.removes["kv"],
    }
    # A method that changes weights removes no block.
    if mha + mlp:
        line["mha_share_pct"] = 100 * mha / (mha + mlp)
    return line


def _losses(pruned: Text, dense: Text) -> dict[str, float]:
    line = interval("heldout_x", statistics.loss(dense.row_nll, pruned.row_nll))
    kinds = statistics.losses_by_kind(dense.row_nll, pruned.row_nll, dense.row_kind)
    for kind, (_, effect) in kinds.items():
        line |= interval(f"{kind}_x", effect)
    if kinds:
        line["worst_x"] = max(effect.value for _, effect in kinds.values())
    return line


def _times(measured: Measured) -> dict[str, float]:
    line: dict[str, float] = {}
    if measured.race:
        line["generation_ms"] = 1000 * measured.race.pruned.median("generation")
        # A single repeat has no interval.
        repeats = len(measured.race.dense.seconds["generation"])
        if measured.plan and repeats > 1:
            line |= interval("generation_x", measured.race.speedups["generation"])
    for key, value in measured.search.items():
        if key == "seconds":
            line["minutes"] = value / 60
        else:
            line[key] = value
    return line


def measured(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows that were measured."""
    if "heldout_ppl" not in frame:
        return frame.iloc[:0]
    return frame[frame["reason"].fillna("") == ""]


def plain_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """Leave what is not healed, of the first run of each method and model: the best of several
    would be chance."""
    plain = frame[frame["healing"] == ""]
    first_run = plain.groupby(["model", "recipe"])["run"].transform("first")
    return plain[plain["run"] == first_run]


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
    rows = plain_rows(frame[frame["recipe"].isin(table.methods)])
    methods = set(rows["recipe"]) - {DENSE}
    return rows if len(methods) > 1 else rows.iloc[:0]


def paper_tables(frame: pd.DataFrame, folder: Path) -> list[Table]:
    """Make the tables of which something was measured: our rows, each followed by the paper's row
    of its model."""
    frame = measured(frame)
    nine = [*FIVE, *NINE.values()]
    if set(nine) <= set(frame.columns):
        frame = frame.assign(avg9_pct=frame[nine].mean(axis=1, skipna=False))
    tables = []
    for table in TABLES:
        rows = rows_of_table(table, frame)
        if not _has_numbers(table, rows):
            continue
        extra_columns = list(table.ours)
        # The held-out text of a run may be WikiText-2 itself: one column is enough.
        if "wikitext2_ppl" in table.columns.values() and "wikitext2_ppl" in rows:
            extra_columns.remove("heldout_ppl")
        columns = ["model", "method", "source", *table.columns.values(), *extra_columns]
        lines = pd.DataFrame(beside(table, rows, folder)).reindex(columns=columns)
        note = f"{PAPER_NOTE} {table.note}".rstrip()
        if len(lines):
            tables.append(table_of_frame(table.name, table.title, lines, note))
    return tables


def _has_numbers(table: PaperTable, rows: pd.DataFrame) -> bool:
    """Whether a column has a number that makes the table worth showing; ratios alone do not, nor
    does the average beside other columns."""
    keys = set(table.columns.values()) - {"removed_pct", "avg_pct"} or {"avg_pct"}
    columns = rows.columns.intersection([*keys, *table.ours])
    return bool(rows[columns].notna().any(axis=None))


def beside(table: PaperTable, rows: pd.DataFrame, folder: Path) -> list[dict[str, Any]]:
    """List the rows of a table: ours (from `rows_of_table`) near the paper's ratios, and the
    paper's. Without ratios, those of Table 1 hold."""
    lines: list[dict[str, Any]] = []
    published = read_published(folder, table.source)
    ratios = {}
    for row in read_published(folder, TABLES[0].source):
        ratios[row.model, row.key] = row.numbers["ratio_pct"]
    for model, our_rows in rows.groupby("model", sort=False):
        papers = [row for row in published if row.model == model]
        sizes = []
        for row in papers:
            # A table without ratios is of the models of Table 1.
            size = ratios.get((row.model, row.key), 0.0)
            sizes.append(row.numbers.get("ratio_pct", size))
        lines += _model_lines(table, our_rows, papers, sizes)
    return lines


def _model_lines(
    table: PaperTable, rows: pd.DataFrame, papers: Sequence[Published], sizes: Sequence[float]
) -> list[dict[str, Any]]:
    """List our rows of one model, each of the paper's after the last one of ours that it is shown
    with, and at the end the paper's that we have none of."""
    lines: list[dict[str, Any]] = []
    matched: set[Any] = set()
    paper_after: dict[Any, Published] = {}
    unmatched = []
    for paper, size in zip(papers, sizes, strict=True):
        indices = _nearest(rows, paper, size)
        matched.update(indices)
        if indices:
            paper_after[indices[-1]] = paper
        else:
            unmatched.append(paper)
    paper_keys = {paper.key for paper in papers}
    paper_sizes = [size for size in sizes if size]
    for index, row in rows.iterrows():
        distances = [abs(row["removed_pct"] - size) for size in paper_sizes]
        is_near = row["recipe"] == DENSE or min(distances, default=0.0) <= 100 * BAND
        # A method that the paper lacks is shown at the sizes of its other methods.
        is_in_paper = not _keys(row["recipe"]).isdisjoint(paper_keys)
        if index in matched or (is_near and not is_in_paper):
            lines.append({**row, "source": "here"})
        if index in paper_after:
            lines.append(_paper_line(table, paper_after[index]))
    lines += [_paper_line(table, paper) for paper in unmatched]
    return lines


def _paper_line(table: PaperTable, row: Published) -> dict[str, Any]:
    line: dict[str, Any] = {"model": row.model, "method": row.title, "source": "paper"}
    for key, column in table.columns.items():
        if key in row.numbers:
            line[column] = row.numbers[key]
    return line


def _keys(recipe: str) -> set[str]:
    """List the names that a recipe's rows have in data/paper."""
    if recipe == DENSE:
        return {DENSE}
    return set(RECIPES[recipe].published) if recipe in RECIPES else set()


def _nearest(rows: pd.DataFrame, paper: Published, size: float) -> list[Any]:
    """Find our rows of the paper's method at the nearest ratio within BAND, one of each of our
    readings of it."""
    is_same_method = [paper.key in _keys(recipe) for recipe in rows["recipe"]]
    candidates = rows[is_same_method]
    if candidates.empty:
        return []
    distances = (candidates["removed_pct"] - size).abs()
    # The paper does not define Relative Magnitude fully, so one row may have two readings.
    nearest = distances.groupby(candidates["recipe"], sort=False).idxmin()
    return [index for index in nearest if distances[index] <= 100 * BAND]
