"""The trace of a search: its iteration tables on disk, and how trials are made from them again.

Decides where tables lie (`<scores>/<search fingerprint>/iteration_000.parquet`, in a folder for
each budget where the search is not nested) and when a table may be trusted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from blockpruner.core.blocks import DENSE, format_mask, parse_mask
from blockpruner.core.errors import InputError
from blockpruner.scoring.objectives import MaskScore
from blockpruner.scoring.settings import Score
from blockpruner.search.iteration import Iteration
from blockpruner.store.files import read_json, read_table, set_aside, write_sealed_json, write_table
from blockpruner.store.provenance import environment, fingerprint
from blockpruner.store.trials import TrialStore, trial_key
from blockpruner.versions import SEARCH_VERSION

ITERATION = pa.schema(
    [
        pa.field("removed", pa.list_(pa.string()), nullable=False),
        pa.field("added", pa.string()),
        pa.field("loss", pa.float64()),
        pa.field("perplexity", pa.float64()),
        pa.field("rows_used", pa.int32(), nullable=False),
        pa.field("rows_total", pa.int32(), nullable=False),
        pa.field("chosen", pa.bool_(), nullable=False),
        pa.field("row_loss", pa.list_(pa.float64()), nullable=False),
        pa.field("row_nll", pa.list_(pa.float64())),
        pa.field("lazy_choice", pa.bool_()),
    ]
)
"""An iteration table: one row for each mask that a search considered. A candidate without a row was
not considered.

- removed: the whole mask.
- added: the candidate's blocks as text; null for the dense model, and in a search that does not add
  unit after unit.
- loss: mean over rows of each row's loss in the search's metric; null where none was asked for.
- perplexity: exp(mean over rows of each row's mean NLL, nats per token). It is there for the chosen
  mask and the dense model, and for others where it is the metric.
- rows_used < rows_total: the mask was scored on the first rows only, in a race: no ranking may use
  it.
- row_loss, row_nll: the losses of single rows, from the first one on, from which trial stores are
  seeded.
- lazy_choice: in an audited iteration, whether this mask had been chosen before all candidates
  entered; else null.

In 16 bits the file's metadata have the origin of the losses, as names and numbers. What the
iteration took lies beside the table, in a file of its own, so that the same search writes the same
tables.
"""

Took = tuple[int, int, float]
"""Scores whose time is known, other scores, and seconds."""

TOOK = "took.json"


TIE_BREAK = "mha by layer, then mlp by layer, strict <"


def search_fingerprint(store: Mapping[str, Any], score: Mapping[str, Any]) -> str:
    """Fingerprint of everything a sequence depends on: the store's, and every key of the run's
    `score` section."""
    return fingerprint(
        {
            "store": dict(store),
            "score": dict(score),
            "tie_break": TIE_BREAK,
            "search_version": SEARCH_VERSION,
        }
    )


def table_path(directory: Path, index: int) -> Path:
    return directory / f"iteration_{index:03d}.parquet"


def write_iteration(
    directory: Path, iteration: Iteration, search: str, took: Took = (0, 0, 0.0)
) -> None:
    """Write one table, and beside it what the iteration took; each stays as it is where it is there
    and whole."""
    path = table_path(directory, iteration.index)
    is_written = False
    with suppress(InputError):
        is_written = read_iteration(directory, iteration.index, search) == iteration
    if not is_written:
        _write_table(path, iteration, search)
    try:
        read_json(path.with_suffix(".json"), sealed=True)
    except InputError:
        write_sealed_json(path.with_suffix(".json"), {"took": took})


def _write_table(path: Path, iteration: Iteration, search: str) -> None:
    rows = []
    entries = zip(iteration.scores, iteration.added, iteration.nll, strict=True)
    for number, (score, added, nll) in enumerate(entries):
        is_lazy_choice = None
        if iteration.lazy_choice is not None:
            is_lazy_choice = score.mask == iteration.lazy_choice
        rows.append(
            {
                "removed": format_mask(score.mask).split(",") if score.mask else [],
                "added": None if added is None else format_mask(added),
                "loss": score.loss if score.row_loss else None,
                "perplexity": nll.perplexity if nll is not None and nll.row_loss else None,
                "rows_used": score.rows_used,
                "rows_total": score.rows_total,
                "chosen": number == iteration.chosen,
                "row_loss": list(score.row_loss),
                "row_nll": None if nll is None else list(nll.row_loss),
                "lazy_choice": is_lazy_choice,
            }
        )
    facts = {
        "search": search,
        "iteration": str(iteration.index),
        "origin": json.dumps(dict(iteration.origin)),
        "environment": json.dumps(environment()),
    }
    write_table(path, pa.Table.from_pylist(rows, ITERATION), facts)


def read_iteration(directory: Path, index: int, search: str) -> Iteration:
    """Read one table; raises InputError if it is missing, damaged, incomplete or of another
    search."""
    path = table_path(directory, index)
    table, facts = read_table(path, ITERATION)
    if facts.get("search") != search or facts.get("iteration") != str(index):
        raise InputError(
            f"{path} is not iteration {index} of search {search} (it says search"
            f" {facts.get('search')!r}, iteration {facts.get('iteration')!r})"
        )
    scores, added, nll = [], [], []
    chosen, lazy_choice = None, None
    for number, row in enumerate(table.to_pylist()):
        mask = parse_mask(",".join(row["removed"]))
        total = row["rows_total"]
        scores.append(MaskScore(mask, tuple(row["row_loss"]), total))
        added.append(None if row["added"] is None else parse_mask(row["added"]))
        has_nll = row["row_nll"] is not None
        nll.append(MaskScore(mask, tuple(row["row_nll"]), total) if has_nll else None)
        if row["chosen"]:
            chosen = number
        if row["lazy_choice"]:
            lazy_choice = mask
    if chosen is None:
        raise InputError(f"{path} has no chosen mask; delete it, its scores are computed again")
    return Iteration(
        index=index,
        scores=tuple(scores),
        added=tuple(added),
        chosen=chosen,
        lazy_choice=lazy_choice,
        nll=tuple(nll),
        origin=json.loads(facts["origin"]),
    )


def read_trace(directory: Path, search: str) -> list[Iteration]:
    """All consecutive iterations of a trace from 0; raises InputError on a table that cannot be
    trusted."""
    trace: list[Iteration] = []
    while table_path(directory, len(trace)).exists():
        trace.append(read_iteration(directory, len(trace), search))
    return trace


def drop_strays(directory: Path, trace: Sequence[Iteration], nested: bool, search: str) -> None:
    """Delete the tables behind a search's last iteration that do not continue it.

    They are of an earlier search that went another way from some step on: in 16 bits another kind
    of device or batch may decide a near tie. What they knew is in the trial store (`seed_stores`).
    A nested trace is longer where a larger budget was asked for before; that part stays.
    """
    index = len(trace)
    last = trace[-1]
    while nested and table_path(directory, index).exists():
        following = read_iteration(directory, index, search)
        unit = following.added[following.chosen] or DENSE
        if following.removed - unit != last.removed:
            break
        index += 1
        last = following
    while table_path(directory, index).exists():
        table_path(directory, index).unlink()
        index += 1


def seed_stores(
    directory: Path, search: str, store: TrialStore, nll: TrialStore, influence: bool
) -> list[str]:
    """Put the trials of the tables present into the stores of the metric and of the NLL (which may
    be one), in 16 bits into those of the tables' origins, setting aside tables that cannot be
    trusted.

    Returns one line for each table set aside.
    """
    problems = []
    for path in sorted(directory.glob("**/iteration_*.parquet")):
        index = int(path.stem.removeprefix("iteration_"))
        try:
            iteration = read_iteration(path.parent, index, search)
            _require_rows(path, iteration, len(store.rows))
        except InputError as error:
            problems.append(
                f"{error}; set aside as {set_aside(path).name}, its trials are computed again"
            )
            continue
        store_of_origin = store.of(iteration.origin)
        nll_of_origin = nll.of(iteration.origin)
        entries = zip(iteration.scores, iteration.added, iteration.nll, strict=True)
        for score, added, plain in entries:
            unit = added or DENSE
            key = trial_key(unit, score.mask - unit) if influence else trial_key(score.mask)
            _seed(store_of_origin, key, score)
            if plain is not None:
                _seed(nll_of_origin, trial_key(plain.mask), plain)
    return problems


def _require_rows(path: Path, iteration: Iteration, rows: int) -> None:
    for score in iteration.scores:
        if score.rows_total != rows:
            raise InputError(
                f"{path} is over {score.rows_total} rows; the calibration set has {rows}"
            )


def search_cost(tables: Sequence[Path], directory: Path) -> dict[str, float]:
    """What a search took, for `speed.json`: by the files beside its tables, or by `took.json` of a
    search without any. Empty where one of them is missing."""
    paths = [path.with_suffix(".json") for path in tables] or [directory / TOOK]
    if not all(path.exists() for path in paths):
        return {}
    costs = [read_json(path, sealed=True)["took"] for path in paths]
    timed, other, seconds = map(sum, zip(*costs, strict=True))
    return {"seconds": seconds, "trials_asked": timed + other, "trials_computed": timed}


def save_iterations(tables: Sequence[Path], path: Path) -> None:
    """The iteration tables that a plan used, as one table with the iteration's number in front."""
    parts = []
    for index, source in enumerate(tables):
        table, _ = read_table(source, ITERATION)
        number = pa.array([index] * table.num_rows, pa.int32())
        parts.append(table.add_column(0, pa.field("iteration", pa.int32(), nullable=False), number))
    write_table(path, pa.concat_tables(parts))


def _seed(store: TrialStore, key: str, score: MaskScore) -> None:
    missing = []
    for row in range(score.rows_used):
        if not store.known(key, row, row + 1):
            missing.append(row)
    if missing:
        store.put(key, missing, [score.row_loss[row] for row in missing])


@dataclass(frozen=True)
class Current:
    """What a run's current search is, and what it was made of: `current.json` in the run's folder
    of scores."""

    kind: str
    """The type of the plans that it leads to."""
    search: str
    """Its fingerprint."""
    nested: bool
    score: Score
    """The `score` section, every default filled in."""
    store: Mapping[str, Any]
    """The fields of the trial store's fingerprint."""
    calibration: Mapping[str, Any]
    """Rows, tokens and digest of the calibration set."""
    latency: Mapping[str, Any] | None = None
    """Nanoseconds of generation and of blocks, where a budget or a price needed them."""
    dense_nll: float | None = None
    """The NLL of the dense model on the calibration rows, where no iteration table holds it."""

    def save(self, scores: Path) -> None:
        score = self.score.model_dump(mode="json", exclude_none=True, exclude={"latency"})
        write_sealed_json(scores / "current.json", {**vars(self), "score": score})

    @classmethod
    def load(cls, scores: Path) -> Current:
        values = dict(read_json(scores / "current.json", sealed=True))
        values["score"] = Score.model_validate(values["score"])
        return cls(**values)


def trace_directory(scores: Path, current: Current, budget: str) -> Path:
    """The folder of the trace that answers a budget: one for all budgets of a nested search, else
    one for each.

    What a speed-up means was measured, and a trace for a speed-up belongs to that measurement too.
    """
    directory = scores / current.search
    if current.nested:
        return directory
    if budget.endswith("x"):
        return directory / f"{budget}-{fingerprint(current.latency or {})}"
    return directory / budget
