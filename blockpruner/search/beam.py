"""Beam search: greedy that keeps several masks of a step, and extends each of them.

Of all masks with one removal more, those stay whose rise of the loss is the lowest for what they
remove. One mask kept is greedy with that price. Masks that remove as much as the goal are not
extended; the best of them is the answer.
"""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from blockpruner.core.blocks import DENSE, Mask
from blockpruner.scoring.objectives import MaskScore
from blockpruner.search.greedy import PricedOptions, costs_of
from blockpruner.search.iteration import Iteration, compared
from blockpruner.search.problem import Problem
from blockpruner.search.racing import worth
from blockpruner.search.space import Space, goal_of_problem, unit_order


class BeamOptions(PricedOptions):
    per: Literal["none", "parameters", "kv", "latency"] = "parameters"
    """The resource whose share prices removals. With "none" all cost the same."""
    width: int = Field(default=4, ge=1)
    """How many masks stay after each step."""


def beam(problem: Problem, options: BeamOptions) -> Iterator[Iteration]:
    """Yield an iteration for each step, whose choice is its best mask, and one in which all masks
    that meet the goal compete."""
    goal = Space(problem.units, goal_of_problem(problem)).goal
    largest_share = goal.target + goal.tolerance + 1e-12
    costs = costs_of(problem, options)
    (dense,) = problem.ask([DENSE])
    beams = [dense]
    finalists: dict[Mask, MaskScore] = {}
    index = 0
    while True:
        masks = set()
        for base in beams:
            for unit in problem.units:
                mask = base.mask | unit
                if mask != base.mask and goal.share(mask) <= largest_share:
                    masks.add(mask)
        if not masks:
            break
        scores = problem.ask(sorted(masks, key=unit_order(problem.units)))
        for score in scores:
            if goal.is_met(score.mask):
                finalists[score.mask] = score
        ranked = sorted(scores, key=lambda score: worth(score, dense, costs))
        beams = ranked[: options.width]
        yield compared(index, [dense, *scores] if index == 0 else scores, beams[0])
        index += 1
    best = min(finalists.values(), key=lambda score: score.loss)
    yield compared(index, list(finalists.values()), best)
