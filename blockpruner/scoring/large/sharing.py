"""How tasks are shared out among workers, so that the costliest piece of work is as cheap as it can be."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from blockpruner.core.blocks import BlockId, BlockKind, Mask
from blockpruner.core.families import Config, count_parameters
from blockpruner.scoring.work import Rows, Task, Unit

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class WalkCosts:
    """Multiplications per token: of each block in the order of the walk, and of the head. They are the parameters."""

    blocks: tuple[int, ...]
    head: int

    @classmethod
    def of(cls, config: Config) -> WalkCosts:
        """Read from a checkpoint's config."""
        counts = count_parameters(config).blocks
        return cls(
            tuple(counts[block] for block in sorted(counts, key=_position)),
            int(config["vocab_size"]) * int(config["hidden_size"]),
        )

    def of_mask(self, removed: Sequence[int], start: int = 0) -> int:
        """From block `start` to the loss, without the blocks at the positions `removed`."""
        return self.head + sum(self.blocks[start:]) - sum(self.blocks[i] for i in removed if i >= start)


@dataclass(frozen=True)
class _Leaf:
    """One mask of a task, by number, and its cost: of its whole walk, and of the part that the leaf before lacks."""

    task: int
    mask: Mask
    alone: int
    after: int


def share_out(tasks: Sequence[Task], rows: Rows, pieces: int, costs: WalkCosts) -> list[list[Task]]:
    """Split tasks into at most `pieces` pieces of work; the costliest piece costs as little as it can.

    Masks are put in the order in which the walk would reach them, where neighbours share the longest prefixes, and
    the sequence of all tasks' masks is cut. A shared prefix counts once in each piece. Row ranges stay whole.
    """
    leaves: list[_Leaf] = []
    for number, task in enumerate(tasks):
        tokens = len(task.span) * max(len(rows[i]) for i in task.span)
        order = sorted(task.masks, key=_walk_order)
        places = [sorted(_position(block) for block in mask) for mask in order]
        after = [costs.of_mask(b, _parting(a, b)) for a, b in pairwise(places)]
        alone = [costs.of_mask(place) for place in places]
        for mask, own, rest in zip(order, alone, [alone[0], *after], strict=True):
            leaves.append(_Leaf(number, mask, tokens * own, tokens * rest))
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


def unfinished(tasks: Sequence[Task], units: Iterable[Unit]) -> list[Task]:
    """What is left of tasks once some units are known; those may cover parts of a task's rows."""
    done = {(unit.mask, unit.start + offset) for unit in units for offset in range(len(unit.loss))}
    left: dict[Task, list[Mask]] = {}
    for task in tasks:
        for mask in task.masks:
            missing = [row for row in task.span if (mask, row) not in done]
            edges = [0, *(i for i, (a, b) in enumerate(pairwise(missing), 1) if b != a + 1), len(missing)]
            for start, stop in pairwise(edges):
                if start < stop:
                    rest = range(missing[start], missing[stop - 1] + 1)
                    left.setdefault(replace(task, span=rest, masks=()), []).append(mask)
    return [replace(task, masks=tuple(masks)) for task, masks in left.items()]


def _fill(leaves: Sequence[_Leaf], limit: int) -> list[list[_Leaf]]:
    """Cut the leaves into the fewest runs whose cost stays within `limit`."""
    runs: list[list[_Leaf]] = []
    cost = limit
    for leaf in leaves:
        if cost + leaf.after > limit:
            runs.append([])
            cost = leaf.alone
        else:
            cost += leaf.after
        runs[-1].append(leaf)
    return runs


def _position(block: BlockId) -> int:
    """Place of a block in the walk: layer by layer, MHA before MLP."""
    return 2 * block.layer + (block.kind is BlockKind.MLP)


def _walk_order(mask: Mask) -> list[float]:
    """Where masks part, the walk first runs the side without the block."""
    return [*sorted(_position(block) for block in mask), float("inf")]


def _parting(before: Sequence[int], removed: Sequence[int]) -> int:
    """The first position at which two different masks part."""
    return min(set(before) ^ set(removed))
