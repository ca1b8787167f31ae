"""Adjacent layers: remove the run of layers that the metric calls cheapest, of as many layers as the budget asks for.

By angular distance it is the method of arXiv 2403.17887, d(x^l, x^(l+n)) for each first layer l. A run of n layers need
not contain the best run of n - 1, so each budget has a search of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

from blockpruner.core.blocks import DENSE, BlockKind
from blockpruner.core.errors import InputError
from blockpruner.core.options import Options
from blockpruner.search.iteration import Iteration
from blockpruner.search.problem import Problem
from blockpruner.search.space import goal_of_problem, nearest


def contiguous(problem: Problem, options: Options) -> Iterator[Iteration]:
    """Yield one iteration: every run of as many adjacent layers as come nearest to the goal.

    Raises:
        InputError: units that are not layers, or a budget that is nearest to removing nothing.
    """
    goal, units = goal_of_problem(problem), problem.units
    if any(len(unit) < len(BlockKind) for unit in units):
        raise InputError("method: contiguous removes adjacent layers, and score.unit is block; set unit: layer")
    runs = [DENSE.union(*units[i : i + n]) for n in range(1, len(units) + 1) for i in range(len(units) - n + 1)]
    size = len(nearest(goal, runs))
    runs = [run for run in runs if len(run) == size]
    dense, *scores = problem.ask([DENSE, *runs])
    best = min(range(len(runs)), key=lambda i: scores[i].loss)  # of equals the first
    yield Iteration(0, (dense, *scores), (None, *runs), 1 + best)
