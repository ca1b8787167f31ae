"""The tables of the paper for the runs of a set: ours, the paper's, and the difference, each in a row of its own.

Decides which of our models belong in which table, and which row of the paper one is held against: the same model and
method, at the nearest ratio within BAND. A table is one row of TABLES.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blockpruner.paper.contrasts import contrast_grid
from blockpruner.paper.evidence import MAIN, Entry, Evidence, Pairs, Subject
from blockpruner.paper.experiments import BLOCKPRUNER, GREEDY_LAYERS, METHODS, PRICED, SWAP
from blockpruner.paper.published import Published, read_published
from blockpruner.paper.studies import DENSE
from blockpruner.reporting.comparison import BAND
from blockpruner.reporting.grids import Cell, Column, Field, Grid, Number, factor, score, share
from blockpruner.reporting.results import Option
from blockpruner.reporting.tables import METHOD, P_GOLD

HERE, PAPER, DIFFERENCE = "here", "paper", "here − paper"
NOT_COMPUTED = "not computed here"
ALL_PAPER = "All of these rows are the paper’s (arXiv 2406.10594), for orientation: other models, so no differences."
MODEL = Field[Option]("model", "model", lambda option: option.subject)

Rows = list[tuple[Cell, ...]]


@dataclass(frozen=True)
class PaperTable:
    """One table of the paper."""

    name: str
    title: str
    source: str
    """Of the paper's numbers in data/paper."""
    fields: tuple[Field[Any], ...]
    """Columns of the paper's and of our numbers."""
    options: Callable[[Evidence], Sequence[Option]]
    """Our models in it; one without any number is left out."""
    methods: tuple[str, ...] = ()
    """Those that are named with a reason where a study has no model of them."""
    digits: int = 2
    """Of the paper's numbers."""
    missing: str = "no such search in this study"
    pairs: Callable[[Evidence], Pairs] = field(default=lambda evidence: ())
    """What is tested."""
    notes: Callable[[Sequence[Evidence]], Sequence[str]] = field(default=lambda evidence: ())

    def published(self, row: Published) -> tuple[Cell, ...]:
        return tuple(
            Number(row.numbers[column.key], self.digits) if column.key in row.numbers else None
            for column in self.fields
        )


def paper_grids(table: PaperTable, subjects: Sequence[Subject], folder: Path) -> list[Grid]:
    """Make the table beside the paper's numbers, its tests, and the paper's other models if it lacks one of these."""
    published = read_published(folder, table.source)
    shown = {subject.paper for subject in subjects} & {row.model for row in published}
    rows: Rows = []
    for subject in subjects:
        rows += _beside(table, subject, [row for row in published if row.model == subject.paper])
    found = [subject.evidence for subject in subjects if subject.evidence is not None]
    columns, cells = _known((MODEL, METHOD, Column("source", "source"), *table.fields), rows)
    strong = frozenset(i for i, row in enumerate(rows) if row[1] == METHODS[BLOCKPRUNER].title and row[2] == HERE)
    notes = (_whose(subjects), *table.notes(found))
    grids = [Grid(table.name, table.title, columns, cells, notes, strong)]
    pairs = [pair for evidence in found for pair in table.pairs(evidence)]
    if pairs:
        grids.append(contrast_grid(f"{table.name}-tests", f"{table.title}: methods on the same items", pairs))
    if len(shown) < len(subjects):
        others = [(row.model, row.title, *table.published(row)) for row in published if row.model not in shown]
        title = f"{table.title}: the paper’s numbers, on its models"
        columns, cells = _known((MODEL, METHOD, *table.fields), others)
        grids.append(Grid(f"{table.name}-paper", title, columns, cells, (ALL_PAPER,), folded=True))
    return grids


def _known(columns: Sequence[Column], rows: Rows) -> tuple[tuple[Column, ...], tuple[tuple[Cell, ...], ...]]:
    """Drop the columns in which nothing is known, except the names in the first two."""
    kept = [i for i in range(len(columns)) if i < 2 or any(row[i] is not None for row in rows)]
    return tuple(columns[i] for i in kept), tuple(tuple(row[i] for i in kept) for row in rows)


def _whose(subjects: Sequence[Subject]) -> str:
    """Tell which rows are ours, and on what they were measured."""
    ours = [s for s in subjects if s.evidence is not None]
    models = "; ".join(f"{s.model} ({s.labels.dtype}, search: {s.labels.search})" for s in ours)
    absent = ", ".join(subject.model for subject in subjects if subject.evidence is None)
    return (
        f"Rows “{HERE}” are measured by this project"
        + (f" on {models}; see Conditions. " if models else ". ")
        + "Ratios are achieved ones. ± 1 standard error over items."
        + (f" {NOT_COMPUTED.capitalize()}: {absent}; models of this size need a GPU." if absent else "")
    )


def _beside(table: PaperTable, subject: Subject, published: Sequence[Published]) -> Rows:
    used: list[Published] = []
    rows: Rows = []
    blank = (None,) * len(table.fields)
    if subject.evidence is not None:
        cells = ((o, tuple(column.of(o) for column in table.fields)) for o in table.options(subject.evidence))
        lines = [(option, numbers) for option, numbers in cells if numbers != blank]
        if not lines:
            rows.append((subject.model, table.missing, HERE, *blank))
        refused = subject.evidence.refused
        for method in (method for method in table.methods if method in refused):
            rows.append((subject.model, f"{METHODS[method].title}: {refused[method]}", HERE, *blank))
        for option, numbers in lines:
            rows.append((subject.model, option.method, HERE, *numbers))
            match = _match(table, option, published)
            if match is not None:
                used.append(match)
                theirs = table.published(match)
                rows.append((match.model, option.method, PAPER, *theirs))
                rows.append((subject.model, option.method, DIFFERENCE, *map(_less, numbers, theirs)))
    elif not published:
        rows.append((subject.model, NOT_COMPUTED, HERE, *blank))
    for row in published:
        if row in used:
            continue
        if subject.evidence is None:
            rows.append((subject.model, f"{row.title} ({NOT_COMPUTED})", HERE, *blank))
        rows.append((row.model, row.title, PAPER, *table.published(row)))
    return rows


def _match(table: PaperTable, option: Option, published: Sequence[Published]) -> Published | None:
    """Find the paper's row of a method at the nearest ratio."""

    def apart(row: Published) -> float:
        return abs(100 * option.ratio - row.ratio) if RATIO in table.fields and row.ratio is not None else 0.0

    keys = METHODS[option.variant.method].published if isinstance(option, Entry) else (DENSE,)
    near = [row for row in published if row.key in keys and apart(row) <= 100 * BAND]
    return min(near, key=apart, default=None)


def _less(ours: Cell, theirs: Cell) -> Cell:
    if not isinstance(ours, Number) or not isinstance(theirs, Number):
        return None
    return Number(ours.value - theirs.value, theirs.digits, signed=True)


def task_cell(option: Option, task: str, digits: int = 1) -> Cell:
    """Show an accuracy in per cent, or a perplexity; None where the task was not measured."""
    found = option.model.tasks.get(task)
    if found is None:
        return None
    return score(found, digits) if found.is_accuracy else Number(found.value, digits)


def _task(key: str, task: str, title: str, digits: int = 2) -> Field[Option]:
    return Field(key, title, lambda option: task_cell(option, task, digits))


def _wikitext(option: Option) -> Cell:
    text = option.model.texts.get("wikitext2")
    return Number(text.perplexity, 2) if text else None


RATIO = Field[Option]("ratio_pct", "removed, %", lambda option: share(option.ratio))
WIKITEXT = Field[Option]("wikitext2_ppl", "WikiText-2 PPL", _wikitext)
HELDOUT = Field[Option]("heldout_ppl", "held-out PPL", lambda option: Number(option.model.perplexity, 2))
AVERAGE = Field[Option]("avg", "average, %", lambda option: score(option.model.average, 2))
QUALITY = (RATIO, WIKITEXT, HELDOUT, AVERAGE, P_GOLD)
FIVE = ("piqa", "winogrande", "hellaswag", "arc_easy", "arc_challenge")
NINE = {"truthfulqa": "truthfulqa_mc1", "race": "race", "swag": "swag", "openbookqa": "openbookqa"}
TABLE1 = (
    "slicegpt", "laco", "relative-magnitude", "relative-magnitude-frobenius", "shortgpt", GREEDY_LAYERS, BLOCKPRUNER,
    PRICED, SWAP, "random",
)  # fmt: skip
CURVES = (BLOCKPRUNER, "shortgpt", "relative-magnitude")


def _average_of_nine(option: Option) -> Cell:
    found = option.model.tasks
    if not found.keys() >= set(NINE.values()):
        return None
    scores = [found[task].value for task in (*NINE.values(), *option.model.scores)]
    return Number(100 * sum(scores) / len(scores), 2)


def _with_dense(evidence: Evidence) -> list[Option]:
    return [evidence.dense, *evidence.main(*TABLE1)]


def _pairs(evidence: Evidence, other: str, budgets: Iterable[tuple[str, str]]) -> Pairs:
    """Pair BlockPruner with another method, each at its own of two budgets."""
    pairs = ((evidence.at(BLOCKPRUNER, a), evidence.at(other, b)) for a, b in budgets)
    return [(a, b) for a, b in pairs if a is not None and b is not None]


def _js(evidence: Evidence) -> Pairs:
    study = evidence.study
    return _pairs(evidence, "blockpruner-by-js", zip(study.metric, study.js or study.metric, strict=True))


def _high(evidence: Evidence) -> Pairs:
    return _pairs(evidence, GREEDY_LAYERS, [(budgets.block, budgets.layer) for budgets in evidence.study.high])


def _columns(pairs: Callable[[Evidence], Pairs]) -> Callable[[Evidence], list[Option]]:
    """List all first models of some pairs, then all second ones."""
    return lambda evidence: [pair[i] for i in range(2) for pair in pairs(evidence)]


def _raced(evidence: Evidence) -> list[Option]:
    timed = [e for e in evidence.timed(MAIN) if e.budget == e.variant.raced]
    return [evidence.dense, *timed] if timed else []


def _speedup(option: Option) -> Cell:
    return factor(option.races[MAIN].speedups["generation"]) if option.plan else Number(1.0, 3)


def _table6_notes(found: Sequence[Evidence]) -> list[str]:
    settings = dict.fromkeys(e.dense.races[MAIN].dense.setting for e in found if MAIN in e.dense.races)
    timed = f"median time of {'; '.join(settings)}" if settings else "not timed"
    return [
        f"Here: {timed}. Speed-up: quotient of the medians of dense and "
        "pruned timed in turns, with the 95 % interval of a paired bootstrap over repeats; the dense row is timed "
        "alone, so it is not the denominator. The paper: mean of 20 runs on a GPU of 24 GB, into which its dense "
        "13B does not fit."
    ]


def _searched(evidence: Evidence) -> list[Option]:
    """List one model of each method of the paper: that of Table 1, else the least pruned."""
    found = ((*evidence.main(m), *evidence.of(m)) for m in evidence.methods if METHODS[m].published)
    return [entries[0] for entries in found if entries]


def _table9(evidence: Evidence) -> list[Option]:
    """List what has a budget that layers have too, and each method's own of Table 1, which differs between kinds."""
    budgets = {entry.budget for method in CURVES[1:] for entry in evidence.of(method)}
    return [e for m in CURVES for e in evidence.of(m) if e.budget in budgets or e.budget == e.variant.main]


def _table9_pairs(evidence: Evidence) -> Pairs:
    found = [*evidence.against(*CURVES[1:]), *evidence.shared(*CURVES)]
    return list(dict.fromkeys(found))


def _cost(key: str, title: str, name: str) -> Field[Entry]:
    return Field(key, title, lambda entry: Number(entry.search.cost[name], 0))


def _minutes(entry: Entry) -> Cell:
    return Number((entry.search.cost["seconds"] + entry.making) / 60, 2)


def _generation(option: Option) -> Cell:
    return Number(1000 * option.races[MAIN].pruned.median("generation"), 1)


TABLES: tuple[PaperTable, ...] = (
    PaperTable(
        "table1",
        "Table 1. Pruning methods at about the same ratio",
        "table1_main",
        (RATIO, WIKITEXT, HELDOUT, *(_task(task, task, task, 1) for task in FIVE), AVERAGE, P_GOLD),
        _with_dense,
        TABLE1,
        pairs=lambda evidence: evidence.against(*TABLE1),
        notes=lambda _: [
            "Relative Magnitude: the mean over tokens, and the norm over the whole sequence (Frobenius); the paper "
            "does not say which its one row is, so both are held against it."
        ],
    ),
    PaperTable(
        "table2",
        "Table 2. What blocks and iteration are worth",
        "table2_ablation",
        QUALITY,
        lambda evidence: evidence.main(BLOCKPRUNER, "one-shot-perplexity", GREEDY_LAYERS),
        (BLOCKPRUNER, "one-shot-perplexity", GREEDY_LAYERS),
        pairs=lambda evidence: evidence.against("one-shot-perplexity", GREEDY_LAYERS),
    ),
    PaperTable(
        "table4",
        "Table 4. Perplexity and Jensen-Shannon divergence as the metric",
        "table4_metric",
        QUALITY,
        _columns(_js),
        (BLOCKPRUNER, "blockpruner-by-js"),
        pairs=_js,
    ),
    PaperTable(
        "table5",
        "Table 5. Higher ratios, blocks and layers",
        "table5_high_sparsity",
        QUALITY,
        _columns(_high),
        (BLOCKPRUNER, GREEDY_LAYERS),
        pairs=_high,
    ),
    PaperTable(
        "table6",
        "Table 6. Time to generate 128 tokens",
        "table6_speed",
        (
            RATIO,
            Field[Option]("generate_128_tokens_ms", "generation, ms", _generation),
            Field[Option]("speedup", "speed-up, ×", _speedup),
        ),
        _raced,
        notes=_table6_notes,
    ),
    PaperTable(
        "table7",
        "Table 7. Time of the search",
        "table7_pruning_time",
        (
            Field[Entry]("minutes", "minutes", _minutes),
            _cost("trials_asked", "evaluations asked for, longest start", "asked"),
            _cost("trials_computed", "computed, all starts", "computed"),
        ),
        _searched,
        tuple(name for name, method in METHODS.items() if method.published),
        digits=1,
        notes=lambda _: [
            "Here: wall time on this machine of the search, to the largest of its budgets, and of merging (LaCo) and "
            "slicing (SliceGPT) for the model of Table 1; an evaluation is one masked model on the calibration rows, "
            "and what another search had computed before is not computed again. The paper: two RTX 4090."
        ],
    ),
    PaperTable(
        "table8",
        "Table 8. AQuA-RAT",
        "table8_aqua",
        (_task("accuracy", "agieval_aqua_rat", "accuracy, %"),),
        _with_dense,
        missing="not measured: study.tasks has no agieval_aqua_rat, whose data no package holds",
    ),
    PaperTable(
        "table9",
        "Table 9. Methods over ratios",
        "table9_newer_models",
        QUALITY,
        _table9,
        CURVES,
        pairs=_table9_pairs,
    ),
    PaperTable(
        "table10",
        "Table 10. Four more tasks",
        "table10_nine_tasks",
        (
            *(_task(column, task, column) for column, task in NINE.items()),
            Field[Option]("avg9", "average of nine, %", _average_of_nine),
        ),
        _with_dense,
        missing="not measured: study.tasks has none of truthfulqa_mc1, race, swag, openbookqa",
    ),
)
