"""The masks that a goal allows: how one becomes another, and in which order they come.

Nothing here is scored. Units that count the same are of one class: all units where the goal counts
blocks; MHA blocks and MLP blocks where it counts a resource. How many units of each class a mask
removes is its composition, and the composition alone decides whether the mask meets the goal.
"""

import heapq
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

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
    found = min([DENSE, *masks], key=lambda mask: (goal.distance(mask), -goal.share(mask)))
    if found == DENSE:
        raise InputError(
            f"budget {goal.budget.text!r} is nearest to removing nothing; the smallest that removes"
            f" a block here is {min(map(goal.share, masks)):.4f}"
        )
    return found


def unit_order(units: Sequence[Mask]) -> Callable[[Mask], tuple[int, ...]]:
    """A sort key by which, of two masks, the one comes first that removes the first unit in which
    they differ: greedy's tie-break."""
    return lambda mask: tuple(i for i, unit in enumerate(units) if unit <= mask)


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
        kinds: dict[Hashable, list[Mask]] = {}
        for unit in units:
            kinds.setdefault((by or goal.share)(unit), []).append(unit)
        self.classes = list(kinds.values())
        some = {  # one mask of each composition
            counts: DENSE.union(
                *(unit for kind, n in zip(self.classes, counts, strict=True) for unit in kind[:n])
            )
            for counts in product(*(range(len(kind) + 1) for kind in self.classes))
            if any(counts)
        }
        if not any(map(goal.is_met, some.values())):
            goal = goal.around(nearest(goal, some.values()))
        self.goal = goal
        self.compositions = [counts for counts, mask in some.items() if goal.is_met(mask)]

    def exchanges(self, mask: Mask) -> list[Exchange]:
        """All ways from one of the masks to others, those within a kind first."""
        removed = [[unit for unit in kind if unit <= mask] for kind in self.classes]
        kept = [[unit for unit in kind if not unit <= mask] for kind in self.classes]
        found = [Exchange(r, 1, k, 1) for r, k in zip(removed, kept, strict=True) if r and k]
        for counts in self.compositions:
            change = [after - len(before) for after, before in zip(counts, removed, strict=True)]
            fewer = [kind for kind, n in enumerate(change) if n < 0]
            more = [kind for kind, n in enumerate(change) if n > 0]
            if len(fewer) == len(more) == 1:
                restored, added = -change[fewer[0]], change[more[0]]
                if 1 in (restored, added):
                    found.append(Exchange(removed[fewer[0]], restored, kept[more[0]], added))
        return found


def by_prediction(
    mask: Mask, exchanges: list[Exchange], change: Mapping[Mask, float]
) -> Iterator[Mask]:
    """All masks that one exchange leads to, those with the lowest predicted loss first."""

    def of(exchange: Exchange) -> Iterator[tuple[float, Mask]]:
        back, out = (
            sorted(units, key=change.__getitem__)
            for units in (exchange.restorable, exchange.removable)
        )
        costs = [[change[unit] for unit in units] for units in (back, out)]
        for predicted, (restored, removed) in cheapest(
            costs, (exchange.restored, exchange.removed)
        ):
            fewer = mask - DENSE.union(*(back[i] for i in restored))
            yield predicted, fewer | DENSE.union(*(out[i] for i in removed))

    for _, other in heapq.merge(*map(of, exchanges), key=lambda found: found[0]):
        yield other


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
        return sum(costs[k][i] for k, indices in enumerate(choice) for i in indices)

    waiting, seen = [(total(first), first)], {first}
    while waiting:
        cost, choice = heapq.heappop(waiting)
        yield cost, choice
        for k, indices in enumerate(choice):
            ends = [*indices[1:], len(costs[k])]
            for place, (i, end) in enumerate(zip(indices, ends, strict=True)):
                if i + 1 < end:
                    moved = (*indices[:place], i + 1, *indices[place + 1 :])
                    following = (*choice[:k], moved, *choice[k + 1 :])
                    if following not in seen:
                        seen.add(following)
                        heapq.heappush(waiting, (total(following), following))
