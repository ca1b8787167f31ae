"""Greedy search: remove the unit whose removal leaves the lowest score, again and again (arXiv
2406.10594, alg. 1).

Sequences are nested: the first k removals answer every smaller budget, and the caller stops when
its budgets are settled. Only the lowest score of an iteration matters, so `select` may leave out
candidates that cannot have it. Over whole layers it is the algorithm of SLEB (arXiv 2402.09025), by
Block Influence that of LLM-Drop's iterative script (arXiv 2406.15786). With a price, the rise of
the loss is divided by what a removal saves of a resource. Then MHA and MLP blocks are weighed by
what they cost.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import Field

from blockpruner.core.blocks import DENSE, BlockKind, Mask
from blockpruner.core.families import Costs
from blockpruner.core.options import Options
from blockpruner.scoring.objectives import MaskScore
from blockpruner.search.iteration import Iteration
from blockpruner.search.problem import Problem
from blockpruner.search.racing import worth


class PricedOptions(Options):
    per: Literal["none", "parameters", "kv", "latency"] = "none"
    """The resource whose share prices a removal. With "none" all removals cost the same."""

    @property
    def price(self) -> str:
        return self.per


class GreedyOptions(PricedOptions):
    mha_share: float | None = Field(
        default=None, ge=0, le=1, exclude_if=lambda value: value is None
    )
    """The share of MHA blocks among what is removed, held as nearly as can be at every step; null:
    losses decide."""


def greedy(problem: Problem, options: GreedyOptions) -> Iterator[Iteration]:
    """Yield iterations until nothing is left to remove."""
    costs = costs_of(problem, options)
    base: MaskScore | None = None
    remaining = list(problem.units)
    index = 0
    while remaining:
        units = (
            remaining if options.mha_share is None else _nearest(remaining, base, options.mha_share)
        )
        iteration = forward(problem, index, base, units, costs)
        yield iteration
        base = iteration.scores[iteration.chosen]
        remaining = [unit for unit in remaining if not unit <= base.mask]
        index += 1


def _nearest(units: Sequence[Mask], base: MaskScore | None, share: float) -> list[Mask]:
    """The units after whose removal the share of MHA blocks in the mask is nearest to a share."""

    removed = DENSE if base is None else base.mask

    def distance(unit: Mask) -> float:
        mask = removed | unit
        mha_count = sum(block.kind is BlockKind.MHA for block in mask)
        return round(abs(mha_count / len(mask) - share), 9)

    smallest = min(distance(unit) for unit in units)
    return [unit for unit in units if distance(unit) == smallest]


def costs_of(problem: Problem, options: PricedOptions) -> Costs | None:
    """What prices a removal; None where all cost the same."""
    return None if options.per == "none" else problem.resources[options.per]


def forward(
    problem: Problem, step: int, base: MaskScore | None, units: Sequence[Mask], costs: Costs | None
) -> Iteration:
    """One step: the best of some units to remove next. The first one has no base, and asks for the
    dense model, too."""
    removed = DENSE if base is None else base.mask
    masks = [removed | unit for unit in units]
    selection = problem.select(step, removed, [DENSE, *masks] if base is None else masks)
    scores = selection.scores
    base_score = base or scores[0]
    complete = [i for i, s in enumerate(scores) if s.is_complete and s.mask != removed]
    best = min(complete, key=lambda i: worth(scores[i], base_score, costs))
    added = tuple(None if score.mask == removed else score.mask - removed for score in scores)
    return Iteration(step, scores, added, best, selection.lazy_choice)
