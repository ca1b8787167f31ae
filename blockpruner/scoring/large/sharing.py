"""How tasks are shared out among workers: the costliest piece of work shall be as cheap as it can be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from blockpruner.core.blocks import BlockId, Mask
from blockpruner.core.families import FAMILIES, Config, count_parameters
from blockpruner.scoring.walk import Step, runs, steps_of
from blockpruner.scoring.work import Rows, ScoredRows, Task


@dataclass(frozen=True)
class WalkCosts:
    """Multiplications per token in the steps of a walk; each parameter of a block counts one."""

    steps: Sequence[Step]
    blocks: Mapping[BlockId, int]
    head: int

    @classmethod
    def of(cls, config: Config) -> WalkCosts:
        """Read from a checkpoint's config."""
        parallel = FAMILIES[str(config["model_type"])].is_parallel(config)
        steps = steps_of(int(config["num_hidden_layers"]), parallel)
        return cls(steps, count_parameters(config).blocks, int(config["vocab_size"]) * int(config["hidden_size"]))

    def leaves(self, masks: Sequence[Mask]) -> list[tuple[Mask, int, int]]:
        """The masks as a walk reaches them, with their cost alone and their cost after the mask before."""
        whole, found = self.head + sum(self.blocks.values()), []
        for group, ran in runs(self.steps, masks):
            after = self.head + sum(self.blocks[block] for block in ran)
            found += [(mask, whole - sum(self.blocks[block] for block in mask), after) for mask in group]
        return found


@dataclass(frozen=True)
class _Leaf:
    task: int
    """Its number."""
    mask: Mask
    alone: int
    """Cost of the whole walk to the loss."""
    after: int
    """Cost of what the walk to the leaf before does not share."""


def _tokens(task: Task, rows: Rows) -> int:
    return len(task.span) * max(len(rows[i]) for i in task.span)


def share_out(tasks: Sequence[Task], rows: Rows, pieces: int, costs: WalkCosts) -> list[list[Task]]:
    """Split tasks into at most `pieces` pieces of work; the costliest piece costs as little as it can.

    Masks stay in the order of the walk, where neighbours share the longest prefixes, and the sequence of all tasks'
    masks is cut. A shared prefix counts once in each piece. Row ranges stay whole.
    """
    walks = {masks: costs.leaves(masks) for masks in {task.masks for task in tasks}}
    leaves: list[_Leaf] = []
    for number, task in enumerate(tasks):
        tokens = _tokens(task, rows)
        leaves += [_Leaf(number, mask, tokens * alone, tokens * after) for mask, alone, after in walks[task.masks]]
    low, high = max(leaf.alone for leaf in leaves), sum(leaf.after for leaf in leaves)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_fill(leaves, middle)) <= pieces else (middle + 1, high)
    shared: list[list[Task]] = []
    for piece in _fill(leaves, high):
        masks: dict[int, list[Mask]] = {}
        for leaf in piece:
            masks.setdefault(leaf.task, []).append(leaf.mask)
        shared.append([replace(tasks[number], masks=tuple(part)) for number, part in masks.items()])
    return shared


def _fill(leaves: Sequence[_Leaf], limit: int) -> list[list[_Leaf]]:
    """Cut the leaves into the fewest runs whose cost stays within `limit`."""
    pieces: list[list[_Leaf]] = []
    cost = limit
    for leaf in leaves:
        if cost + leaf.after > limit:
            pieces.append([])
            cost = leaf.alone
        else:
            cost += leaf.after
        pieces[-1].append(leaf)
    return pieces


def unfinished(tasks: Sequence[Task], known: Iterable[ScoredRows]) -> list[Task]:
    """What is left of tasks once some values are known; those may cover parts of a task's rows."""
    done = {(scored.mask, row) for scored in known for row in scored.span}
    left: dict[Task, list[Mask]] = {}
    for task in tasks:
        for mask in task.masks:
            missing = tuple(row for row in task.span if (mask, row) not in done)
            if missing:
                rest = task.span if len(missing) == len(task.span) else missing
                left.setdefault(replace(task, span=rest, masks=()), []).append(mask)
    return [replace(task, masks=tuple(masks)) for task, masks in left.items()]
