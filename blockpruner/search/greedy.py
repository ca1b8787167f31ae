"""Greedy search: remove the unit whose removal leaves the lowest score, again and again (arXiv 2406.10594, alg. 1).

Decides the order of removal. Sequences are nested: the first k removals answer every smaller budget, so the
caller stops when its budgets are settled. Since only the lowest score of an iteration matters, `select` may leave
candidates out that cannot have it. Over whole layers it is SLEB (arXiv 2402.09025).
"""

from __future__ import annotations

from collections.abc import Generator, Iterator

from blockpruner.blocks import DENSE, Mask
from blockpruner.search.iteration import Iteration
from blockpruner.search.problem import Problem
from blockpruner.search.space import goal_of_problem, is_settled


def greedy(problem: Problem) -> Iterator[Iteration]:
    """Yield iterations until nothing is left to remove."""
    removed: Mask = DENSE
    remaining = list(problem.units)
    index = 0
    while remaining:
        base = [removed] if index == 0 else []
        selection = problem.select(index, removed, base + [removed | unit for unit in remaining])
        scores = selection.scores
        complete = [i for i, s in enumerate(scores) if s.is_complete and s.mask != removed]
        best = min(complete, key=lambda i: scores[i].loss)
        added = tuple(None if score.mask == removed else score.mask - removed for score in scores)
        yield Iteration(index, scores, added, best, selection.lazy_choice)
        remaining = [unit for unit in remaining if unit != added[best]]
        removed = scores[best].mask
        index += 1


def greedy_to_goal(problem: Problem) -> Generator[Iteration, None, list[Mask]]:
    """Yield iterations until no further removal could change which prefix is nearest to the problem's goal.

    Returns:
        What each iteration left removed, the prefixes; `space.nearest` of them is greedy's own answer.
    """
    goal = goal_of_problem(problem)
    prefixes: list[Mask] = []
    for iteration in greedy(problem):
        yield iteration
        prefixes.append(iteration.removed)
        if is_settled(goal, iteration.removed, problem.units):
            break
    return prefixes
