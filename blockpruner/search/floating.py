"""Floating search: greedy that goes back. After each removal it takes swaps and restorations as
long as they help.

Sequential floating selection (Pudil et al., 1994) with prices. A forward step is greedy's. Then
units are swapped while that lowers the loss, and the mask stays as near to the amount of the
resource that the forward step reached as masks of one budget are. A unit is restored if the mask is
then better than every known one that removes as much. Of every amount the best known mask is the
one to go on from.

A surrogate of all losses that the search has asked for ranks swaps and restorations, and those
compete that it does not call worse by much more than it is used to err. A walk depends on its
budget in its last steps only, so several budgets share most of their trials.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Literal

import numpy as np
from pydantic import Field

from blockpruner.core.blocks import DENSE, Mask
from blockpruner.core.budgets import Goal
from blockpruner.scoring.objectives import MaskScore
from blockpruner.search.greedy import PricedOptions, costs_of, forward
from blockpruner.search.iteration import Iteration, compared
from blockpruner.search.problem import Problem
from blockpruner.search.space import Space, by_prediction, goal_of_problem, nearest, unit_order
from blockpruner.search.surrogate import Surrogate, fit

SLACK, RECENT = 2.0, 32
"""A move is scored if the surrogate does not call it worse by more than SLACK times its median
error of late."""

POOL = 1000
"""How many swaps the surrogate ranks: those with the lowest sum of the effects of their single
changes."""


class FloatingOptions(PricedOptions):
    per: Literal["none", "parameters", "kv", "latency"] = "parameters"
    """The resource whose share prices a removal in forward steps. With "none" all removals cost the
    same."""
    tries: int = Field(default=12, ge=1)
    """How many swaps and restorations of a mask are scored, at most, before the search goes on."""


def floating(problem: Problem, options: FloatingOptions) -> Iterator[Iteration]:
    """Yield an iteration for each forward step and each attempt to better its mask, and one in
    which all known masks that meet the goal compete."""
    walk, costs = _Walk(problem, options.tries), costs_of(problem, options)
    index = steps = 0
    base: MaskScore | None = None
    while fitting := walk.fitting(DENSE if base is None else base.mask):
        iteration = replace(forward(problem, steps, base, fitting, costs), index=index)
        yield iteration
        base = walk.taken(iteration)
        index, steps, moved = index + 1, steps + 1, True
        around = walk.goal.around(base.mask)
        while moved:
            iteration = replace(walk.bettered(base, around), index=index)
            yield iteration
            index += 1
            moved = iteration.removed != base.mask
            base = iteration.scores[iteration.chosen]
            around = around if around.is_met(base.mask) else walk.goal.around(base.mask)
    yield replace(walk.answer(), index=index)


class _Walk:
    """What a walk has seen."""

    def __init__(self, problem: Problem, tries: int) -> None:
        self._problem, self._units, self._tries = problem, problem.units, tries
        self._order = unit_order(problem.units)
        self.goal = Space(problem.units, goal_of_problem(problem)).goal
        self._scores: dict[Mask, MaskScore] = {}
        self._tried: set[Mask] = set()
        self._overflown: set[Mask] = set()
        """Units whose removal has made the model overflow, which are not removed again."""
        self._errors: list[float] = []
        """The errors of the surrogate's predictions of what a move changes."""

    def fitting(self, mask: Mask) -> list[Mask]:
        """Units that may be removed next without removing more than the goal allows."""
        left = (unit for unit in self._units if not unit <= mask and unit not in self._overflown)
        return [unit for unit in left if self._fits(mask | unit)]

    def _fits(self, mask: Mask) -> bool:
        return self.goal.share(mask) <= self.goal.wanted + self.goal.tolerance + 1e-12

    def taken(self, iteration: Iteration) -> MaskScore:
        """The best known mask that removes as much as a forward step's choice."""
        self._scores |= {score.mask: score for score in iteration.scores if score.loss < math.inf}
        added = zip(iteration.scores, iteration.added, strict=True)
        self._overflown |= {unit for score, unit in added if unit and score.loss == math.inf}
        chosen = iteration.scores[iteration.chosen]
        return min([chosen, *self._like(chosen.mask)], key=lambda score: score.loss)

    def _like(self, mask: Mask) -> list[MaskScore]:
        """Known masks that remove as much, scored on all rows."""
        around = self.goal.around(mask)
        return [
            score
            for score in self._scores.values()
            if score.is_complete and around.is_met(score.mask)
        ]

    def bettered(self, base: MaskScore, around: Goal) -> Iteration:
        """The best of some restorations, and of some swaps that stay `around` a goal; or the mask
        itself where none helps."""
        energy = fit(self._units, self._scores.values())
        rivals = self._restorations(base.mask) | dict.fromkeys(
            self._swaps(base.mask, around, energy), base
        )
        masks = list(rivals)
        change = energy(masks) - energy([score.mask for score in rivals.values()])
        margin = (
            SLACK * float(np.median(np.abs(self._errors[-RECENT:]))) if self._errors else math.inf
        )
        chosen = [i for i in np.argsort(change, kind="stable")[: self._tries] if change[i] < margin]
        found, best, gain = {base.mask: base}, base, 0.0
        for rival in dict.fromkeys(rivals[masks[i]] for i in chosen):
            against = {masks[i]: change[i] for i in chosen if rivals[masks[i]] == rival}
            for score in self._problem.select.challenge(rival, sorted(against, key=self._order)):
                found[score.mask] = score
                if score.loss == math.inf:
                    continue
                self._scores[score.mask] = score
                rise = score.rise_over(rival)
                self._errors.append(rise - against[score.mask])
                if score.is_complete and -rise > gain:
                    best, gain = score, -rise
        self._tried.update(found)
        return compared(0, list(found.values()), best)

    def _restorations(self, mask: Mask) -> dict[Mask, MaskScore]:
        """Masks with one unit less that were not tried, and the best known one that removes as much
        as each."""
        masks = [mask - unit for unit in self._units if unit <= mask]
        like = {other: self._like(other) for other in masks if other not in self._scores}
        return {
            other: min(scores, key=lambda score: score.loss)
            for other, scores in like.items()
            if scores
        }

    def _swaps(self, mask: Mask, around: Goal, energy: Surrogate) -> list[Mask]:
        """Masks that one exchange leads to and that were not tried, the most promising ones."""
        change = dict(
            zip(
                self._units,
                energy([mask ^ unit for unit in self._units]) - energy([mask]),
                strict=True,
            )
        )
        swaps = by_prediction(mask, Space(self._units, around).exchanges(mask), change)
        new = (other for other in swaps if other not in self._tried and self._fits(other))
        new = (other for other in new if not any(unit <= other - mask for unit in self._overflown))
        complete = {mask for mask, score in self._scores.items() if score.is_complete}
        return list(islice((other for other in new if other not in complete), POOL))

    def answer(self) -> Iteration:
        """The known masks that meet the goal, or those that are as near to it as the nearest, and
        the best of them."""
        masks = sorted(
            (mask for mask, score in self._scores.items() if score.is_complete), key=self._order
        )
        goal = self.goal
        if not any(map(goal.is_met, masks)):
            goal = goal.around(nearest(goal, masks))
        finished = [self._scores[mask] for mask in masks if goal.is_met(mask)]
        return compared(0, finished, min(finished, key=lambda score: score.loss))
