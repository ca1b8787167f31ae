"""Swap search: restore a removed unit and remove another one instead, as long as that lowers the loss.

Greedy cannot undo a removal; this search can. It first asks what restoring or removing each single unit does to the
loss. The sum of these changes predicts the effect of a swap, and the most promising swaps are then scored.
"""

import heapq
from collections.abc import Iterator, Mapping
from itertools import islice

from pydantic import Field

from blockpruner.core.blocks import DENSE, Mask
from blockpruner.core.budgets import is_settled
from blockpruner.core.options import Options
from blockpruner.search.greedy import GreedyOptions, greedy
from blockpruner.search.iteration import Iteration
from blockpruner.search.problem import Problem
from blockpruner.search.space import Exchange, Space, goal_of_problem, nearest, unit_order

BATCH = 16
"""How many swaps are asked for at once. They share forward passes, but those after one that helps are wasted."""


class SwapOptions(Options):
    tries: int = Field(default=64, ge=0)
    """How many swaps of a mask are scored without success before the search ends; 0 tries all of them, and so ends in
    a local optimum."""


def swap(problem: Problem, options: SwapOptions) -> Iterator[Iteration]:
    """Yield greedy's iterations, one for each swap that helped, and a last one for none. All masks stay as near to the
    budget as greedy's own."""
    goal, prefixes = goal_of_problem(problem), list[Mask]()
    costs = problem.resources[goal.budget.resource]
    for iteration in greedy(problem, GreedyOptions()):
        yield iteration
        prefixes.append(iteration.removed)
        if is_settled(goal.budget, prefixes, costs, [unit for unit in problem.units if not unit <= prefixes[-1]]):
            break
    index, mask = len(prefixes), nearest(goal, prefixes)
    space, order = Space(problem.units, goal.around(mask)), unit_order(problem.units)
    known = {mask}  # of the space: no better than the current mask
    while True:
        probes = [mask ^ unit for unit in problem.units]  # restored where it was removed, else removed
        found = {score.mask: score for score in problem.ask([mask, *probes])}
        change = {unit: found[mask ^ unit].loss - found[mask].loss for unit in problem.units}
        swaps = (other for other in by_prediction(mask, space.exchanges(mask), change) if other not in known)
        best, tried = found[mask], 0
        while best.mask == mask:
            batch = list(islice(swaps, min(BATCH, options.tries - tried) if options.tries else BATCH))
            if not batch:
                break
            scores = problem.ask(sorted(batch, key=order))
            best = min([best, *scores], key=lambda score: score.loss)  # of equals the first
            found |= {score.mask: score for score in scores}
            known.update(batch)
            tried += len(batch)
        yield Iteration(index, tuple(found.values()), (None,) * len(found), list(found).index(best.mask))
        if best.mask == mask:
            return
        mask = best.mask
        index += 1


def by_prediction(mask: Mask, exchanges: list[Exchange], change: Mapping[Mask, float]) -> Iterator[Mask]:
    """All masks that one exchange leads to, those with the lowest predicted loss first."""

    def of(exchange: Exchange) -> Iterator[tuple[float, Mask]]:
        back, out = (sorted(units, key=change.__getitem__) for units in (exchange.restorable, exchange.removable))
        costs = [[change[unit] for unit in units] for units in (back, out)]
        for predicted, (restored, removed) in cheapest(costs, (exchange.restored, exchange.removed)):
            fewer = mask - DENSE.union(*(back[i] for i in restored))
            yield predicted, fewer | DENSE.union(*(out[i] for i in removed))

    for _, other in heapq.merge(*map(of, exchanges), key=lambda found: found[0]):
        yield other


Choice = tuple[tuple[int, ...], ...]
"""The indices that are chosen from each of several lists."""


def cheapest(costs: list[list[float]], sizes: tuple[int, ...]) -> Iterator[tuple[float, Choice]]:
    """Choose sizes[k] of costs[k], for each k, in all ways, the lowest sum first: yields the sum, and for each list the
    indices chosen, ascending.

    Each list of costs is ascending. Then any choice is reached from the cheapest one, the first of each list, by moving
    one index up by one at a time, and no move lowers the sum.
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
