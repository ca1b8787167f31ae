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

    def distance(mask: Mask) -> tuple[float, float]:
        return goal.distance(mask), -goal.share(mask)

    mask = min([DENSE, *masks], key=distance)
    if mask == DENSE:
        smallest_share = min(map(goal.share, masks))
        raise InputError(
            f"budget {goal.budget.text!r} is nearest to removing nothing; the smallest that removes"
            f" a block here is {smallest_share:.4f}"
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
        class_of = by or goal.share
        units_by_class: dict[Hashable, list[Mask]] = {}
        for unit in units:
            members = units_by_class.setdefault(class_of(unit), [])
            members.append(unit)
        self.classes = list(units_by_class.values())
        mask_by_composition = self._one_mask_each()
        masks = mask_by_composition.values()
        # Units of unequal size may leave a gap that is wider than the tolerance.
        if not any(map(goal.is_met, masks)):
            goal = goal.around(nearest(goal, masks))
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
        removed = []
        present = []
        exchanges = []
        for units in self.classes:
            removed_units = [unit for unit in units if unit <= mask]
            present_units = [unit for unit in units if not unit <= mask]
            removed.append(removed_units)
            present.append(present_units)
            if removed_units and present_units:
                exchanges.append(Exchange(removed_units, 1, present_units, 1))
        for counts in self.compositions:
            changes = {}
            for number, count in enumerate(counts):
                change = count - len(removed[number])
                if change:
                    changes[number] = change
            if len(changes) != 2:
                continue
            shrinking = min(changes, key=changes.__getitem__)
            growing = max(changes, key=changes.__getitem__)
            restored = -changes[shrinking]
            added = changes[growing]
            # One unit of a class stands for one or several of one other class.
            if min(restored, added) == 1:
                exchange = Exchange(removed[shrinking], restored, present[growing], added)
                exchanges.append(exchange)
        return exchanges


def by_prediction(
    mask: Mask, exchanges: list[Exchange], change: Mapping[Mask, float]
) -> Iterator[Mask]:
    """All masks that one exchange leads to, those with the lowest predicted loss first. `change` is
    the predicted change of the loss by unit."""

    def predicted_masks(exchange: Exchange) -> Iterator[tuple[float, Mask]]:
        restorable = sorted(exchange.restorable, key=change.__getitem__)
        removable = sorted(exchange.removable, key=change.__getitem__)
        units = restorable + removable
        restorable_costs = [change[unit] for unit in restorable]
        removable_costs = [change[unit] for unit in removable]
        sizes = (exchange.restored, exchange.removed)
        for predicted, choice in cheapest([restorable_costs, removable_costs], sizes):
            chosen = [units[index] for index in choice]
            restored = DENSE.union(*chosen[: exchange.restored])
            removed = DENSE.union(*chosen[exchange.restored :])
            yield predicted, (mask - restored) | removed

    streams = [predicted_masks(exchange) for exchange in exchanges]
    for _, exchanged in heapq.merge(*streams, key=itemgetter(0)):
        yield exchanged


Choice = tuple[int, ...]
"""Chosen indices of several lists that lie one after the other, ascending."""


def cheapest(costs: list[list[float]], sizes: tuple[int, ...]) -> Iterator[tuple[float, Choice]]:
    """Choose sizes[k] of costs[k], for each k, in all ways, the lowest sum first: yields the sum
    and the choice.

    Each list of costs is ascending. Then any choice is reached from the cheapest one, the first of
    each list, by moving one index up by one at a time, and no move lowers the sum.
    """
    all_costs: list[float] = []
    indices: list[int] = []
    ends: list[int] = []
    for list_costs, size in zip(costs, sizes, strict=True):
        start = len(all_costs)
        indices += range(start, start + size)
        all_costs += list_costs
        ends += [len(all_costs)] * size

    def total(choice: Choice) -> float:
        # One sum in one order: equal choices have equal totals to the last bit.
        return sum(all_costs[index] for index in choice)

    first_choice = tuple(indices)
    waiting = [(total(first_choice), first_choice)]
    reached = {first_choice}
    while waiting:
        cost, choice = heapq.heappop(waiting)
        yield cost, choice
        for position, index in enumerate(choice):
            moved = index + 1
            # An index neither leaves its list nor passes the next one.
            if moved == ends[position] or moved in choice:
                continue
            following = (*choice[:position], moved, *choice[position + 1 :])
            if following not in reached:
                reached.add(following)
                heapq.heappush(waiting, (total(following), following))
