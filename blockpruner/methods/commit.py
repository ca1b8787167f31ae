"""How a budget turns what was scored into a plan.

Stages behind it read plans and do not know which method made them.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from blockpruner.core.families import Config
from blockpruner.core.plan import Plan
from blockpruner.methods.registry import KINDS
from blockpruner.search.trace import ITERATION, Current
from blockpruner.store.files import read_table, write_table


def commit_run(scores: Path, config: Config, budget: str, target: str, run: str) -> tuple[Plan, Sequence[Path]]:
    """The plan that meets a budget by what a run has scored, and the iteration tables that it used, in order. `scores`
    is the run's folder, as `score_run` left it. Raises InputError if the budget cannot be met, or a file of the search
    is missing or damaged."""
    current = Current.load(scores)
    plan, tables = KINDS[current.kind].commit(scores, config, budget, current)
    return replace(plan, target=target, run=run), tables


def save_iterations(tables: Sequence[Path], path: Path) -> None:
    """The iteration tables that a plan used, as one table with the iteration's number in front."""
    parts = []
    for index, source in enumerate(tables):
        table, _ = read_table(source, ITERATION)
        number = pa.array([index] * table.num_rows, pa.int32())
        parts.append(table.add_column(0, pa.field("iteration", pa.int32(), nullable=False), number))
    write_table(path, pa.concat_tables(parts))
