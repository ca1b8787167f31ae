"""A benchmark of searches without a model: the loss of every subset of some blocks, row by row, in one Parquet file.

    python -m benchmarks.searches make MODEL TEXTS TABLE    computes the file (hours; a kill loses nothing)
    python -m benchmarks.searches TABLE [FILE.py:FUNCTION]  scores a search over it, and the searches of this project

docs/searches.md has the rules. A search is a function of a `Task`; it returns the blocks to remove. Every task has a
known best answer, since the file knows all subsets.
"""

import argparse
import json
import math
import random
import runpy
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from blockpruner.core.blocks import DENSE, Mask, format_mask, parse_mask
from blockpruner.core.budgets import goal_of, parse_budget
from blockpruner.core.families import Costs, count_parameters
from blockpruner.core.progress import Observer, observer
from blockpruner.core.settings import LocalModel, Runtime
from blockpruner.inputs.calibration import draw_rows
from blockpruner.inputs.settings import Calibration
from blockpruner.inputs.texts import read_texts
from blockpruner.inputs.tokenizers import load_tokenizer
from blockpruner.methods.score import open_material
from blockpruner.scoring.accelerate import Select
from blockpruner.scoring.objectives import MaskScore, Objective
from blockpruner.search.problem import Problem
from blockpruner.search.registry import SEARCHES
from blockpruner.store.files import read_table, write_table
from blockpruner.store.trials import TrialStore, store_fields

SCHEMA = pa.schema([pa.field("mask", pa.string(), nullable=False), pa.field("nll", pa.list_(pa.float32()))])
"""The blocks that are gone, and the mean NLL of each row, nats per token."""

BLOCKS = 12
"""How many blocks are combined in all ways: those whose single removal costs least for what they take."""

ROWS, LENGTH = 15, 80
SHARES = (0.3, 0.45, 0.6)
"""How much is to be removed of all that these blocks take."""

HALVES = 8
CHUNK = 512
TRIALS = (60, 100, 200)


class OutOfTrialsError(Exception):
    """A task's budget of trials is spent."""


@dataclass(frozen=True)
class Table:
    losses: Mapping[Mask, np.ndarray]
    blocks: tuple[Mask, ...]
    """Each alone; all their subsets are known."""
    sizes: Mapping[Mask, int]
    """What a block takes, in units of the smallest one."""
    rows: int

    @classmethod
    def read(cls, path: Path) -> "Table":
        table, about = read_table(path, SCHEMA)
        masks = map(parse_mask, table["mask"].to_pylist())
        losses = dict(zip(masks, np.array(table["nll"].to_pylist()), strict=True))
        sizes = {parse_mask(block): size for block, size in json.loads(about["sizes"]).items()}
        return cls(losses, tuple(sizes), sizes, len(losses[DENSE]))

    def size(self, mask: Mask) -> int:
        return sum(self.sizes[Mask({block})] for block in mask)

    @cached_property
    def subsets(self) -> list[Mask]:
        inside = DENSE.union(*self.blocks)
        return [mask for mask in self.losses if mask <= inside]


@dataclass
class Task:
    """One problem: remove exactly `size`, so that the loss on some rows is low, with so many trials."""

    table: Table
    size: int
    rows: Sequence[int]
    trials: int
    seed: int
    asked: dict[Mask, float] = field(default_factory=dict)

    @property
    def blocks(self) -> tuple[str, ...]:
        return tuple(format_mask(block) for block in self.table.blocks)

    def cost(self, blocks: Collection[str]) -> int:
        return self.table.size(parse_mask(",".join(blocks)))

    def loss(self, blocks: Collection[str]) -> float:
        """The mean NLL without some blocks; one trial, unless it was asked before. Raises OutOfTrialsError."""
        return self.of(parse_mask(",".join(blocks)))

    def of(self, mask: Mask) -> float:
        if mask not in self.asked:
            if len(self.asked) >= self.trials:
                raise OutOfTrialsError
            self.asked[mask] = self.true(mask)
        return self.asked[mask]

    def true(self, mask: Mask, rows: Sequence[int] | None = None) -> float:
        return float(self.table.losses[mask][list(self.rows if rows is None else rows)].mean())

    @cached_property
    def fitting(self) -> list[Mask]:
        """All masks of the size, the best one first."""
        return sorted((mask for mask in self.table.subsets if self.table.size(mask) == self.size), key=self.true)

    def fits(self, blocks: Collection[str]) -> bool:
        """Whether some answer has these blocks."""
        mask = parse_mask(",".join(blocks))
        return any(mask <= answer for answer in self.fitting)

    def excess(self, search: Callable[["Task"], Collection[str] | Mask]) -> tuple[float, float]:
        """How much more the answer loses than the best one, on the rows of the task, and than the task's best on the
        others, in nats. Out of trials, the answer is the best mask of the size that was asked, else the worst of all.
        Raises ValueError for an answer of another size."""
        try:
            found = search(self)
            mask = found if isinstance(found, frozenset) else parse_mask(",".join(found))
        except OutOfTrialsError:
            mask = next((mask for mask in self.fitting if mask in self.asked), self.fitting[-1])
        if self.table.size(mask) != self.size:
            raise ValueError(f"the answer {format_mask(mask)} takes {self.table.size(mask)}, and {self.size} is asked")
        others = [row for row in range(self.table.rows) if row not in set(self.rows)]
        best = self.fitting[0]
        return self.true(mask) - self.true(best), self.true(mask, others) - self.true(best, others)


def tasks(table: Table, trials: int) -> Iterator[Task]:
    """Every size on random halves of the rows."""
    for seed in range(HALVES):
        rows = random.Random(seed).sample(range(table.rows), (table.rows + seed % 2) // 2)
        for share in SHARES:
            yield Task(table, round(share * sum(table.sizes.values())), sorted(rows), trials, seed)


def greedy(task: Task) -> list[str]:
    """What a search looks like: greedy, by the loss for what blocks take."""
    gone, dense = list[str](), task.loss([])
    while left := [b for b in task.blocks if b not in gone and task.fits([*gone, b])]:
        now = task.loss(gone) if gone else dense
        gone.append(min(left, key=lambda b: (task.loss([*gone, b]) - now) / task.cost([b])))
    return gone


def chance(task: Task) -> Mask:
    """Random masks of the size, until no trial is left."""
    draw = random.Random(task.seed)
    return min(draw.sample(task.fitting, min(task.trials, len(task.fitting))), key=task.of)


def of_product(
    name: str, options: Mapping[str, Any], task: Task, ask: Callable[..., list[MaskScore]] | None = None
) -> Mask:
    """The answer of a search of this project; `ask` scores masks, by the table if it is None."""
    row, sizes, ask = SEARCHES[name], task.table.sizes, ask or partial(_scores, task)
    costs = Costs(10 * sum(sizes.values()), {block: n for mask, n in sizes.items() for block in mask})
    goal = goal_of(parse_budget(f"{task.size / costs.total}", costs), task.table.blocks, costs)
    problem = Problem(task.table.blocks, ask, Select(ask), len(task.rows), goal, {"parameters": costs})
    seeded = {"seed": task.seed, **options} if "seed" in row.options.model_fields else options
    *_, answer = row.run(problem, row.options(**seeded))
    return answer.removed


def _scores(task: Task, masks: Sequence[Mask], rows: int | None = None, base: Mask = DENSE) -> list[MaskScore]:
    """The scores of masks on all rows of a task: a trial is never a part of one."""
    assert rows in (None, len(task.rows))
    return [MaskScore(m, (task.of(m),) * len(task.rows), len(task.rows)) for m in masks]


OURS: Mapping[str, Callable[[Task], Collection[str] | Mask]] = {
    "random masks": chance,
    "greedy for what is saved": greedy,
    "beam": partial(of_product, "beam", {}),
    "genetic": partial(of_product, "genetic", {"generations": 200, "initial": 16, "children": 8, "share": 1}),
    "floating": partial(of_product, "floating", {}),
}


def scored(table: Table, searches: Mapping[str, Callable[[Task], Collection[str] | Mask]]) -> Iterator[dict[str, Any]]:
    """By search and budget of trials: perplexity over that of the best mask, how often that one was found, and how many
    trials were used, as means over the tasks."""
    for (name, search), trials in ((pair, trials) for pair in searches.items() for trials in TRIALS):
        own, used, found = list[tuple[float, float]](), list[int](), 0
        for task in tasks(table, trials):
            own.append(task.excess(search))
            used.append(len(task.asked))
            found += own[-1][0] < 1e-9
        seen, unseen = np.mean(own, axis=0)
        yield {
            "search": name,
            "trials": trials,
            "used": round(float(np.mean(used))),
            "over_best": round(math.exp(seen), 4),
            "over_best_other_rows": round(math.exp(unseen), 4),
            "best_found": f"{found} of {len(own)}",
        }


def make(model: Path, texts: Path, out: Path) -> None:
    """Compute the table, which is written when it is whole; the trials beside it are kept."""
    seen, source = observer(), {"source": "path", "path": str(model)}
    wanted = Calibration(data={**source, "path": str(texts)}, split="all", num_rows=ROWS, seq_len=LENGTH)
    rows = draw_rows(read_texts(texts), load_tokenizer(model), wanted, (), seen.note)
    own, trials = LocalModel(source="path", path=str(model), dtype="bfloat16"), out.with_suffix(".trials")
    with open_material(model, own, Runtime(), trials, seen) as material:
        fields = store_fields(rows.digest, material.identity, "bfloat16", "perplexity")
        store = TrialStore(fields, rows.row_keys, trials)
        ask = Objective(rows, store, material.scorer, seen)
        costs = count_parameters(material.config)
        found, sizes = known(ask, costs, BLOCKS, seen)
        about = {"model": material.identity, "rows": rows.digest, "origin": json.dumps(dict(ask.origin))}
        write(out, found, sizes, **about)
        store.close()


def known(
    ask: Callable[..., list[MaskScore]], costs: Costs, count: int, seen: Observer
) -> tuple[dict[Mask, tuple[float, ...]], dict[str, int]]:
    """The row losses of all single blocks, all pairs, and all subsets of those `count` blocks whose removal alone costs
    least for what they take; and what each of these takes, in units of the smallest one."""
    singles = [Mask({block}) for block in costs.blocks]
    dense, *alone = ask([DENSE, *singles])
    found = {score.mask: score.row_loss for score in (dense, *alone)}
    rises = {score.mask: score.rise_over(dense) / costs.ratio(score.mask) for score in alone}
    blocks = sorted(singles, key=rises.__getitem__)[:count]
    masks = [one | other for one, other in combinations(singles, 2)]
    masks += [DENSE.union(*chosen) for size in range(3, count + 1) for chosen in combinations(blocks, size)]
    masks.sort(key=lambda mask: sorted((block.layer, block.kind) for block in mask))
    for start in range(0, len(masks), CHUNK):
        seen.begin(f"masks from {start} of {len(masks)}", start / len(masks))
        found |= {score.mask: score.row_loss for score in ask(masks[start : start + CHUNK])}
        seen.end(f"{len(found)} masks")
    smallest = min(costs.blocks.values())
    return found, {format_mask(mask): round(sum(costs.blocks[block] for block in mask) / smallest) for mask in blocks}


def write(path: Path, found: Mapping[Mask, Sequence[float]], sizes: Mapping[str, int], **about: str) -> None:
    table = pa.table({"mask": [format_mask(mask) for mask in found], "nll": list(found.values())}, SCHEMA)
    write_table(path, table, {**about, "sizes": json.dumps(sizes)})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.searches", description=(__doc__ or "").splitlines()[0])
    if sys.argv[1:2] == ["make"]:
        for name in ("model", "texts", "table"):
            parser.add_argument(name, type=Path)
        given = parser.parse_args(sys.argv[2:])
        make(given.model, given.texts, given.table)
        return
    parser.add_argument("table", type=Path)
    parser.add_argument("search", nargs="?", help="FILE.py:FUNCTION")
    given = parser.parse_args()
    own = {}
    if given.search:
        file, _, name = given.search.rpartition(":")
        own = {given.search: runpy.run_path(file)[name]}
    for line in scored(Table.read(given.table), {**own, **OURS}):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
