"""The masks that a goal allows: how one becomes another, and in which order they come.

Nothing here is scored. Units that count the same are of one class: all units where the goal counts
blocks; MHA blocks and MLP blocks where it counts a resource. How many units of each class a mask
removes is its composition, and the composition alone decides whether the mask meets the goal.
"""

import heapq
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from operator import itemgetter

from blockpruner.core.blocks import DENSE, Mask
from blockpruner.core.budgets import Goal
from blockpruner.core.errors import InputError
from blockpruner.search.problem import Problem


def goal_of_problem(problem: Problem) -> Goal:
    """Raises InputError where every unit is farther from the goal than the dense model, before
    anything is scored."""
    assert problem.goal is not None
    nearest(problem.goal, problem.units)
    return problem.goal


def nearest(goal: Goal, masks: Iterable[Mask]) -> Mask:
    """The mask nearest to the goal that removes something; a tie goes to the larger, as in
    `choose_prefix`. Raises InputError where the dense model is nearer."""
    masks = list(masks)
    mask = min([DENSE, *masks], key=lambda mask: (goal.distance(mask), -goal.share(mask)))
    if mask == DENSE:
        raise InputError(
            f"budget {goal.budget.text!r} is nearest to removing nothing; the smallest that removes"
            f" a block here is {min(map(goal.share, masks)):.4f}"
        )
    return mask


def unit_order(units: Sequence[Mask]) -> Callable[[Mask], tuple[int, ...]]:
    """A sort key by which, of two masks, the one comes first that removes the first unit in which
    they differ: greedy's tie-break."""

    def removed_indices(mask: Mask) -> tuple[int, ...]:
        return tuple(index for index, unit in enumerate(units) if unit <= mask)

    return removed_indices


@dataclass(frozen=True)
class Exchange:
    """A way to change a mask within the goal: restore some removed units of one class and remove
    kept ones instead."""

    restorable: Sequence[Mask]
    restored: int
    """How many of the restorable units are restored. This number or `removed` is 1."""
    removable: Sequence[Mask]
    removed: int


class Space:
    """All masks over units that meet a goal; where there is none, all that come as near to it as
    the nearest does.

    Units of a class have in common what `by` says; without it, they count the same. `compositions`
    are all that meet the goal: how many units of each class a mask removes.
    """

    def __init__(
        self, units: Sequence[Mask], goal: Goal, by: Callable[[Mask], Hashable] | None = None
    ) -> None:
        units_by_class: dict[Hashable, list[Mask]] = {}
        class_of = by or goal.share
        for unit in units:
            units_by_class.setdefault(class_of(unit), []).append(unit)
        self.classes = list(units_by_class.values())
        mask_by_composition = self._one_mask_each()
        if not any(map(goal.is_met, mask_by_composition.values())):
            goal = goal.around(nearest(goal, mask_by_composition.values()))
        self.goal = goal
        self.compositions = []
        for counts, mask in mask_by_composition.items():
            if goal.is_met(mask):
                self.compositions.append(counts)

    def _one_mask_each(self) -> dict[tuple[int, ...], Mask]:
        """A mask of each composition that removes something."""
        count_ranges = [range(len(units) + 1) for units in self.classes]
        masks = {}
        for counts in product(*count_ranges):
            mask = DENSE
            for units, count in zip(self.classes, counts, strict=True):
                mask = mask.union(*units[:count])
            if mask:
                masks[counts] = mask
        return masks

    def exchanges(self, mask: Mask) -> list[Exchange]:
        """All ways from one of the masks to others, those within a class first."""
        removed = [[unit for unit in units if unit <= mask] for units in self.classes]
        kept = [[unit for unit in units if not unit <= mask] for units in self.classes]
        exchanges = []
        for removed_units, kept_units in zip(removed, kept, strict=True):
            if removed_units and kept_units:
                exchanges.append(Exchange(removed_units, 1, kept_units, 1))
        for counts in self.compositions:
            changes = []
            for count, removed_units in zip(counts, removed, strict=True):
                changes.append(count - len(removed_units))
            fewer = [number for number, change in enumerate(changes) if change < 0]
            more = [number for number, change in enumerate(changes) if change > 0]
            # One unit of a class stands for one or several of one other class.
            if len(fewer) == len(more) == 1:
                restored = -changes[fewer[0]]
                added = changes[more[0]]
                if 1 in (restored, added):
                    exchanges.append(Exchange(removed[fewer[0]], restored, kept[more[0]], added))
        return exchanges


def by_prediction(
    mask: Mask, exchanges: list[Exchange], change: Mapping[Mask, float]
) -> Iterator[Mask]:
    """All masks that one exchange leads to, those with the lowest predicted loss first. `change` is
    the predicted change of the loss by unit."""

    def predicted_masks(exchange: Exchange) -> Iterator[tuple[float, Mask]]:
        restorable = sorted(exchange.restorable, key=change.__getitem__)
        removable = sorted(exchange.removable, key=change.__getitem__)
        costs = [[change[unit] for unit in restorable], [change[unit] for unit in removable]]
        sizes = (exchange.restored, exchange.removed)
        for predicted, (restored, removed) in cheapest(costs, sizes):
            restored_units = DENSE.union(*(restorable[index] for index in restored))
            removed_units = DENSE.union(*(removable[index] for index in removed))
            yield predicted, (mask - restored_units) | removed_units

    streams = [predicted_masks(exchange) for exchange in exchanges]
    for _, exchanged in heapq.merge(*streams, key=itemgetter(0)):
        yield exchanged


Choice = tuple[tuple[int, ...], ...]
"""The indices that are chosen from each of several lists."""


def cheapest(costs: list[list[float]], sizes: tuple[int, ...]) -> Iterator[tuple[float, Choice]]:
    """Choose sizes[k] of costs[k], for each k, in all ways, the lowest sum first: yields the sum,
    and for each list the indices chosen, ascending.

    Each list of costs is ascending. Then any choice is reached from the cheapest one, the first of
    each list, by moving one index up by one at a time, and no move lowers the sum.
    """
    first: Choice = tuple(tuple(range(size)) for size in sizes)

    def total(choice: Choice) -> float:
        # One sum in one order: equal choices have equal totals to the last bit.
        return sum(costs[number][i] for number, indices in enumerate(choice) for i in indices)

    waiting = [(total(first), first)]
    seen = {first}
    while waiting:
        cost, choice = heapq.heappop(waiting)
        yield cost, choice
        for following in _next_choices(choice, costs):
            if following not in seen:
                seen.add(following)
                heapq.heappush(waiting, (total(following), following))


def _next_choices(choice: Choice, costs: list[list[float]]) -> Iterator[Choice]:
    """The choices in which one index is larger by one."""
    for number, indices in enumerate(choice):
        ends = [*indices[1:], len(costs[number])]
        for position, (index, end) in enumerate(zip(indices, ends, strict=True)):
            if index + 1 < end:
                moved = (*indices[:position], index + 1, *indices[position + 1 :])
                yield (*choice[:number], moved, *choice[number + 1 :])
