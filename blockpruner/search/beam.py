"""Beam search: greedy that keeps the `width` best masks of each number of removed units, instead of one.

Decides which masks are kept and when a path ends. Two orders of removal that lead to one mask count once. A path ends
where greedy ends: at the first mask that one unit more would take farther from the goal. The best kept mask that meets
the goal is the answer. A width of 1 is greedy; a width that keeps every mask is an exhaustive search.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pydantic import Field

from blockpruner.core.blocks import DENSE, Mask
from blockpruner.core.options import Options
from blockpruner.scoring.objectives import MaskScore
from blockpruner.search.iteration import Iteration
from blockpruner.search.problem import Problem
from blockpruner.search.space import goal_of_problem, is_settled, nearest, unit_order


class BeamOptions(Options):
    width: int = Field(default=3, ge=1)
    """How many masks are kept at each size."""


def beam(problem: Problem, options: BeamOptions) -> Iterator[Iteration]:
    """Yield one iteration for each number of removed units, and one in which the kept masks that meet the goal compete.

    Where none of the kept masks meets the goal, those compete that remove as much as the nearest one.

    Raises:
        InputError: the budget is nearest to removing nothing.
    """
    goal, units, order = goal_of_problem(problem), problem.units, unit_order(problem.units)
    live, best = [DENSE], DENSE
    kept: list[MaskScore] = []
    index = 0
    while live:
        masks = {mask | unit for mask in live for unit in units if not unit <= mask}
        scores = problem.ask([*([DENSE] if index == 0 else []), *sorted(masks, key=order)])
        ranked = sorted((score for score in scores if score.mask), key=lambda score: score.loss)  # stable: unit order
        yield Iteration(index, tuple(scores), _added(scores, best, units), scores.index(ranked[0]))
        best = ranked[0].mask
        kept += ranked[: options.width]
        live = [score.mask for score in ranked[: options.width] if not is_settled(goal, score.mask, units)]
        index += 1
    if not any(goal.is_met(score.mask) for score in kept):
        goal = goal.around(nearest(goal, [score.mask for score in kept]))
    finished = sorted((score for score in kept if goal.is_met(score.mask)), key=lambda score: order(score.mask))
    winner = min(finished, key=lambda score: score.loss)
    yield Iteration(index, tuple(finished), (None,) * len(finished), finished.index(winner))


def _added(scores: list[MaskScore], base: Mask, units: Sequence[Mask]) -> tuple[Mask | None, ...]:
    """The unit that a mask has beyond the last choice, None where it is not that mask with one unit more."""
    extended = {base | unit: unit for unit in units if not unit <= base}
    return tuple(extended.get(score.mask) for score in scores)
