"""The tables of the paper for the runs of a set: ours, the paper's, and the difference, each in a row of its own.

Decides which of our models belong in which table, and which row of the paper one is held against: the same model and
method, at the nearest ratio within BAND. A table is one row of TABLES.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from blockpruner.paper.contrasts import Pair, contrast_grid
from blockpruner.paper.evidence import Entry, Evidence, Model, Subject
from blockpruner.paper.experiments import BLOCKPRUNER
from blockpruner.paper.published import Published, read_published
from blockpruner.reporting.comparison import BAND
from blockpruner.reporting.grids import Cell, Column, Grid, Number

HERE, PAPER, DIFFERENCE = "here", "paper", "here − paper"
NOT_COMPUTED = "not computed here"
FIVE = ("piqa", "winogrande", "hellaswag", "arc_easy", "arc_challenge")
SLEB, JS = "greedy layers (SLEB)", "BlockPruner by JS"
KEYS: Mapping[str, str] = {
    "dense": "dense",
    BLOCKPRUNER: "blockpruner",
    "SliceGPT": "slicegpt",
    "LaCo": "laco",
    "Relative Magnitude": "relative_magnitude",
    "Relative Magnitude, Frobenius": "relative_magnitude",
    "ShortGPT": "shortgpt",
    "one-shot perplexity": "one_shot_ppl",
    SLEB: "layer_greedy_ppl",
    JS: "js",
}
"""Our methods as the paper's rows; tables whose rows are called otherwise say how."""


@dataclass(frozen=True)
class Line:
    """One measured model of a table. key: of the paper's row, "": it has none; ratio: in per cent, where the table has
    one; numbers: by column."""

    method: str
    key: str
    ratio: float | None
    numbers: Mapping[str, Number]


@dataclass(frozen=True)
class PaperTable:
    """source: of the paper's numbers in data/paper; columns: those of the paper and ours, by key, with digits; lines:
    of one study; missing: why a study has none; pairs: what is tested, (base, other)."""

    name: str
    title: str
    source: str
    columns: tuple[tuple[Column, int | None], ...]
    lines: Callable[[Evidence], Sequence[Line]]
    missing: str = ""
    pairs: Callable[[Evidence], Sequence[tuple[Entry, Entry]]] = field(default=lambda evidence: ())
    notes: Callable[[Sequence[Evidence]], Sequence[str]] = field(default=lambda evidence: ())


def paper_grids(table: PaperTable, subjects: Sequence[Subject], folder: Path) -> list[Grid]:
    """The table beside the paper's numbers; the paper's other models, if it does not have all of these; the tests."""
    published = read_published(folder, table.source)
    shown = {subject.paper for subject in subjects} & {row.model for row in published}
    rows: list[tuple[Cell, ...]] = []
    for subject in subjects:
        rows += _beside(table, subject, [row for row in published if row.model == subject.paper])
    found = [subject.evidence for subject in subjects if subject.evidence is not None]
    notes = (_whose(subjects), *table.notes(found))
    used = [i for i in range(3, 3 + len(table.columns)) if any(row[i] is not None for row in rows)]
    kept = [0, 1, 2, *used]
    head = (Column("model", "model"), Column("method", "method"), Column("source", "source"))
    columns = (*head, *(column for column, _ in table.columns))
    strong = frozenset(i for i, row in enumerate(rows) if row[1] == BLOCKPRUNER and row[2] == HERE)
    grids = [
        Grid(
            table.name,
            table.title,
            tuple(columns[i] for i in kept),
            tuple(tuple(row[i] for i in kept) for row in rows),
            notes,
            strong,
        )
    ]
    pairs = [
        Pair(subject.model, base, other)
        for subject in subjects
        if subject.evidence is not None
        for base, other in table.pairs(subject.evidence)
    ]
    if pairs:
        grids.append(contrast_grid(f"{table.name}-tests", f"{table.title}: methods on the same items", pairs))
    if len(shown) < len(subjects):
        grids.append(_orientation(table, [row for row in published if row.model not in shown]))
    return grids


def _whose(subjects: Sequence[Subject]) -> str:
    """Which rows are ours, and on what they were measured."""
    ours = [s for s in subjects if s.evidence is not None]
    models = "; ".join(
        f"{s.model} ({s.labels.model}; held-out text: {s.labels.heldout}; items: {s.labels.tasks})" for s in ours
    )
    absent = ", ".join(subject.model for subject in subjects if subject.evidence is None)
    return (
        f"Rows “{HERE}” are measured by this project"
        + (f" on {models}. " if models else ". ")
        + "Ratios are achieved ones. ± 1 standard error over items."
        + (f" {NOT_COMPUTED.capitalize()}: {absent}; models of this size need a GPU." if absent else "")
    )


def _beside(table: PaperTable, subject: Subject, published: Sequence[Published]) -> list[tuple[Cell, ...]]:
    used: list[Published] = []
    rows: list[tuple[Cell, ...]] = []
    blank = (None,) * len(table.columns)
    if subject.evidence is not None:
        lines = table.lines(subject.evidence)
        if not lines:
            rows.append((subject.model, table.missing or "no such search in this study", HERE, *blank))
        for line in lines:
            rows.append((subject.model, line.method, HERE, *(line.numbers.get(c.key) for c, _ in table.columns)))
            match = _match(line, published)
            if match is not None:
                used.append(match)
                rows += [_published(table, match, line.method), _difference(table, subject.model, line, match)]
    elif not published:
        rows.append((subject.model, NOT_COMPUTED, HERE, *blank))
    for row in published:
        if row in used:
            continue
        if subject.evidence is None:
            rows.append((subject.model, f"{row.title} ({NOT_COMPUTED})", HERE, *blank))
        rows.append(_published(table, row))
    return rows


def _match(line: Line, published: Sequence[Published]) -> Published | None:
    """The paper's row of a method at the nearest ratio."""
    near = [row for row in published if row.key == line.key and _apart(line, row) <= 100 * BAND]
    return min(near, key=lambda row: _apart(line, row), default=None)


def _apart(line: Line, row: Published) -> float:
    return 0.0 if line.ratio is None or row.ratio is None else abs(line.ratio - row.ratio)


def _published(table: PaperTable, row: Published, method: str | None = None) -> tuple[Cell, ...]:
    numbers = (
        Number(row.numbers[column.key], digits) if column.key in row.numbers else None
        for column, digits in table.columns
    )
    return (row.model, method or row.title, PAPER, *numbers)


def _difference(table: PaperTable, model: str, line: Line, row: Published) -> tuple[Cell, ...]:
    numbers = (
        Number(line.numbers[column.key].value - row.numbers[column.key], digits, signed=True)
        if column.key in row.numbers and column.key in line.numbers
        else None
        for column, digits in table.columns
    )
    return (model, line.method, DIFFERENCE, *numbers)


def _orientation(table: PaperTable, published: Sequence[Published]) -> Grid:
    known = [(column, digits) for column, digits in table.columns if any(column.key in r.numbers for r in published)]
    rows = (
        (row.model, row.title, *(Number(row.numbers[c.key], d) if c.key in row.numbers else None for c, d in known))
        for row in published
    )
    return Grid(
        f"{table.name}-paper",
        f"{table.title}: the paper’s numbers, on its models",
        (Column("model", "model"), Column("method", "method"), *(column for column, _ in known)),
        tuple(rows),
        ("All of these rows are the paper’s (arXiv 2406.10594), for orientation: other models, so no differences.",),
        folded=True,
    )


RATIO = (Column("ratio_pct", "removed, %"), 2)
WIKITEXT = (Column("wikitext2_ppl", "WikiText-2 PPL"), 2)
HELDOUT = (Column("heldout_ppl", "held-out PPL"), 2)
AVERAGE = (Column("avg", "average, %"), 2)
QUALITY = (RATIO, WIKITEXT, HELDOUT, AVERAGE)


def quality(model: Model, ratio: float) -> dict[str, Number]:
    """What the paper says of a model, by its columns; PPL on held-out text stands in a column of its own."""
    found = {
        "ratio_pct": Number(100 * ratio, 2),
        "heldout_ppl": Number(model.perplexity, 2),
        "avg": Number(100 * model.average, 2, 100 * model.stderr),
    }
    if "wikitext2" in model.texts:
        found["wikitext2_ppl"] = Number(model.texts["wikitext2"].perplexity, 2)
    for task in model.scores:
        score = model.tasks[task]
        found[task] = Number(100 * score.value, 1, None if score.stderr is None else 100 * score.stderr)
    return found


def _dense(evidence: Evidence) -> Line:
    return Line("dense", "dense", 0.0, quality(evidence.dense, 0.0))


def _line(entry: Entry, key: str | None = None) -> Line:
    return Line(
        entry.method,
        KEYS.get(entry.method, "") if key is None else key,
        100 * entry.ratio,
        quality(entry.model, entry.ratio),
    )


def _mains(evidence: Evidence, methods: Sequence[str]) -> list[Entry]:
    return [entry for method in methods if (entry := evidence.main(method)) is not None]


TABLE1 = (
    "SliceGPT", "LaCo", "Relative Magnitude", "Relative Magnitude, Frobenius", "ShortGPT", BLOCKPRUNER, "random",
)  # fmt: skip


def _against(evidence: Evidence, others: Sequence[Entry]) -> list[tuple[Entry, Entry]]:
    base = evidence.main(BLOCKPRUNER)
    return [(base, other) for other in others if base is not None and other.method != BLOCKPRUNER]


def _both(evidence: Evidence, first: str, second: str) -> list[tuple[Entry, Entry]]:
    """Entries of two methods at the same budget."""
    return [(a, b) for b in evidence.of(second) if (a := evidence.at(first, b.budget)) is not None]


def _high(evidence: Evidence) -> list[tuple[Entry, Entry]]:
    pairs = [
        (evidence.at(BLOCKPRUNER, budgets["block"]), evidence.at(SLEB, budgets["layer"])) for budgets in evidence.high
    ]
    return [(a, b) for a, b in pairs if a is not None and b is not None]


def _table4(evidence: Evidence) -> list[Line]:
    pairs = _both(evidence, BLOCKPRUNER, JS)
    return [_line(a, "ppl") for a, _ in pairs] + [_line(b) for _, b in pairs]


def _table5(evidence: Evidence) -> list[Line]:
    return [_line(a, "block") for a, _ in _high(evidence)] + [_line(b, "layer") for _, b in _high(evidence)]


def _table6(evidence: Evidence) -> list[Line]:
    timed = [e for e in evidence.timed("main") if e.budget == e.variant.main]
    if not timed:
        return []

    def line(method: str, ratio: float, seconds: float, speedup: Number) -> Line:
        numbers = {
            "ratio_pct": Number(100 * ratio, 2),
            "generate_128_tokens_ms": Number(1000 * seconds, 1),
            "speedup": speedup,
        }
        return Line(method, KEYS.get(method, ""), 100 * ratio, numbers)

    found = [line("dense", 0.0, evidence.speeds["main"].median("generation"), Number(1.0, 3))]
    for entry in timed:
        race = entry.model.races["main"]
        gain = race.speedups["generation"]
        speedup = Number(gain.value, 3, low=gain.interval.low, high=gain.interval.high)
        found.append(line(entry.method, entry.ratio, race.pruned.median("generation"), speedup))
    return found


def _table6_notes(found: Sequence[Evidence]) -> list[str]:
    settings = dict.fromkeys(e.speeds["main"].setting for e in found if "main" in e.speeds)
    return [
        f"Here: median time of {'; '.join(settings) or 'nothing'}. Speed-up: quotient of the medians of dense and "
        "pruned timed in turns, with the 95 % interval of a paired bootstrap over repeats; the dense row is timed "
        "alone, so that it is not the denominator. The paper: mean of 20 runs on a GPU of 24 GB, into which its dense "
        "13B does not fit."
    ]


def _table7(evidence: Evidence) -> list[Line]:
    found = []
    for method in evidence.methods:
        search = evidence.searches.get(method)
        if search is not None and (method in KEYS):
            cost = search.cost
            numbers = {
                "minutes": Number(cost["seconds"] / 60, 2),
                "trials_asked": Number(cost["asked"], 0),
                "trials_computed": Number(cost["computed"], 0),
            }
            found.append(Line(method, KEYS[method], None, numbers))
    return found


def _tasks(names: Mapping[str, str], average: str | None) -> Callable[[Evidence], list[Line]]:
    """Lines of tasks beside the average's; names: column to task; average: a column of all these and the average's."""

    def lines(evidence: Evidence) -> list[Line]:
        models = [("dense", evidence.dense), *((e.method, e.model) for e in _mains(evidence, TABLE1))]
        found = []
        for method, model in models:
            scores = {column: model.tasks[task] for column, task in names.items() if task in model.tasks}
            numbers = {
                column: Number(100 * s.value, 2, None if s.stderr is None else 100 * s.stderr)
                for column, s in scores.items()
            }
            if average is not None and len(scores) == len(names):
                all_scores = [
                    *(s.value for s in scores.values()),
                    *(model.tasks[task].value for task in evidence.tasks),
                ]
                numbers[average] = Number(100 * sum(all_scores) / len(all_scores), 2)
            if numbers:
                found.append(Line(method, KEYS.get(method, ""), None, numbers))
        return found

    return lines


CURVES = (BLOCKPRUNER, "ShortGPT", "Relative Magnitude")


def _table9(evidence: Evidence) -> list[Line]:
    budgets = {e.budget for e in evidence.of("ShortGPT")} | {e.budget for e in evidence.of("Relative Magnitude")}
    return [_line(e) for method in CURVES for e in evidence.of(method) if e.budget in budgets]


NINE = {"truthfulqa": "truthfulqa_mc1", "race": "race", "swag": "swag", "openbookqa": "openbookqa"}

TABLES: tuple[PaperTable, ...] = (
    PaperTable(
        "table1",
        "Table 1. Pruning methods at about the same ratio",
        "table1_main",
        (RATIO, WIKITEXT, HELDOUT, *((Column(task, task), 2) for task in FIVE), AVERAGE),
        lambda evidence: [_dense(evidence), *map(_line, _mains(evidence, TABLE1))],
        pairs=lambda evidence: _against(evidence, _mains(evidence, TABLE1)),
        notes=lambda _: [
            "Relative Magnitude: the mean over tokens, and the norm over the whole sequence (Frobenius); the paper "
            "does not say which its one row is, so that both are held against it."
        ],
    ),
    PaperTable(
        "table2",
        "Table 2. What blocks and iteration are worth",
        "table2_ablation",
        QUALITY,
        lambda evidence: [*map(_line, _mains(evidence, (BLOCKPRUNER, "one-shot perplexity", SLEB)))],
        pairs=lambda evidence: _against(evidence, _mains(evidence, ("one-shot perplexity", SLEB))),
    ),
    PaperTable(
        "table4",
        "Table 4. Perplexity and Jensen-Shannon divergence as the metric",
        "table4_metric",
        QUALITY,
        _table4,
        pairs=lambda evidence: _both(evidence, BLOCKPRUNER, JS),
    ),
    PaperTable(
        "table5", "Table 5. Higher ratios, blocks and layers", "table5_high_sparsity", QUALITY, _table5, pairs=_high
    ),
    PaperTable(
        "table6",
        "Table 6. Time to generate 128 tokens",
        "table6_speed",
        (RATIO, (Column("generate_128_tokens_ms", "generation, ms"), 2), (Column("speedup", "speed-up, ×"), 2)),
        _table6,
        notes=_table6_notes,
    ),
    PaperTable(
        "table7",
        "Table 7. Time of the search",
        "table7_pruning_time",
        (
            (Column("minutes", "minutes"), 1),
            (Column("trials_asked", "evaluations asked for, longest start"), 0),
            (Column("trials_computed", "computed, all starts"), 0),
        ),
        _table7,
        notes=lambda _: [
            "Here: wall time of the search on this machine, to the largest of its budgets; an evaluation is one masked "
            "model on the calibration rows, and what another search had computed before is not computed again. Merging "
            "(LaCo) and slicing (SliceGPT) themselves come after the search and are not in it. The paper: two RTX 4090."
        ],
    ),
    PaperTable(
        "table8",
        "Table 8. AQuA-RAT",
        "table8_aqua",
        ((Column("accuracy", "accuracy, %"), 2),),
        _tasks({"accuracy": "agieval_aqua_rat"}, None),
        missing="not measured: study.tasks has no agieval_aqua_rat, whose data no package holds",
    ),
    PaperTable(
        "table9",
        "Table 9. Methods over ratios",
        "table9_newer_models",
        QUALITY,
        _table9,
        pairs=lambda evidence: [pair for method in CURVES[1:] for pair in _both(evidence, BLOCKPRUNER, method)],
    ),
    PaperTable(
        "table10",
        "Table 10. Four more tasks",
        "table10_nine_tasks",
        (*((Column(column, column), 2) for column in NINE), (Column("avg9", "average of nine, %"), 2)),
        _tasks(NINE, "avg9"),
        missing="not measured: study.tasks has none of truthfulqa_mc1, race, swag, openbookqa",
    ),
)
