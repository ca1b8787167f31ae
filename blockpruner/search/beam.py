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
    goal, costs = Space(problem.units, goal_of_problem(problem)).goal, costs_of(problem, options)
    order, most = unit_order(problem.units), goal.wanted + goal.tolerance + 1e-12
    (dense,) = problem.ask([DENSE])
    bases, met, index = [dense], dict[Mask, MaskScore](), 0
    while bases:
        masks = {
            base.mask | unit for base in bases for unit in problem.units if not unit <= base.mask
        }
        wider = sorted((mask for mask in masks if goal.share(mask) <= most), key=order)
        if not wider:
            break
        scores = problem.ask(wider)
        met |= {score.mask: score for score in scores if goal.is_met(score.mask)}
        bases = sorted(scores, key=lambda score: worth(score, dense, costs))[: options.width]
        yield compared(index, [dense, *scores] if index == 0 else scores, bases[0])
        index += 1
    best = min(met.values(), key=lambda score: score.loss)
    yield compared(index, list(met.values()), best)
