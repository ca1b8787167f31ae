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
"""A move is scored if the surrogate predicts a rise of less than SLACK times its median error over
the RECENT last moves."""

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
    """Yield an iteration for each forward step and for each attempt to improve its mask, and at the
    end one in which all known masks that meet the goal compete."""
    search = FloatingSearch(problem, options.tries)
    costs = costs_of(problem, options)
    index = 0
    step = 0
    base: MaskScore | None = None
    units = search.removable_units(DENSE)
    while units:
        iteration = replace(forward(problem, step, base, units, costs), index=index)
        yield iteration
        base = search.best_of_step(iteration)
        index += 1
        step += 1
        neighborhood = search.goal.around(base.mask)
        has_moved = True
        while has_moved:
            iteration = replace(search.improve(base, neighborhood), index=index)
            yield iteration
            index += 1
            has_moved = iteration.removed != base.mask
            base = iteration.scores[iteration.chosen]
            # A restoration removes less than the neighborhood allows.
            if not neighborhood.is_met(base.mask):
                neighborhood = search.goal.around(base.mask)
        units = search.removable_units(base.mask)
    yield replace(search.answer(), index=index)


class FloatingSearch:
    """The scores that a floating search knows, and the moves that they suggest."""

    def __init__(self, problem: Problem, tries: int) -> None:
        self._problem = problem
        self._units = problem.units
        self._tries = tries
        self._order = unit_order(problem.units)
        self.goal = Space(problem.units, goal_of_problem(problem)).goal
        self._scores: dict[Mask, MaskScore] = {}
        self._tried: set[Mask] = set()
        self._overflowing: set[Mask] = set()
        """Units whose removal made the model overflow. They are not removed again."""
        self._errors: list[float] = []
        """The surrogate's errors: by how much a move's rise was larger than predicted."""

    def removable_units(self, mask: Mask) -> list[Mask]:
        """Units that may be removed next without removing more than the goal allows."""
        units = []
        for unit in self._units:
            is_kept = not unit <= mask
            if is_kept and unit not in self._overflowing and self._fits(mask | unit):
                units.append(unit)
        return units

    def _fits(self, mask: Mask) -> bool:
        return self.goal.share(mask) <= self.goal.target + self.goal.tolerance + 1e-12

    def best_of_step(self, iteration: Iteration) -> MaskScore:
        """The best known mask that removes as much as a forward step's choice."""
        for score, unit in zip(iteration.scores, iteration.added, strict=True):
            if score.loss < math.inf:
                self._scores[score.mask] = score
            elif unit:
                self._overflowing.add(unit)
        chosen = iteration.scores[iteration.chosen]
        rivals = [chosen, *self._scores_around(chosen.mask)]
        return min(rivals, key=lambda score: score.loss)

    def _scores_around(self, mask: Mask) -> list[MaskScore]:
        """The known masks that remove as much as this one, if they are scored on all rows."""
        neighborhood = self.goal.around(mask)
        scores = []
        for score in self._scores.values():
            if score.is_complete and neighborhood.is_met(score.mask):
                scores.append(score)
        return scores

    def improve(self, base: MaskScore, neighborhood: Goal) -> Iteration:
        """Score some restorations, and some swaps within the neighborhood. The choice is the best
        of them, or the base if none is better."""
        surrogate = fit(self._units, self._scores.values())
        # A restoration competes with the best mask of its own size, a swap with the base.
        rivals = self._restorations(base.mask)
        for mask in self._swaps(base.mask, neighborhood, surrogate):
            rivals[mask] = base
        masks = list(rivals)
        predicted_rises = surrogate(masks) - surrogate([rival.mask for rival in rivals.values()])
        margin = math.inf
        if self._errors:
            margin = SLACK * float(np.median(np.abs(self._errors[-RECENT:])))
        predicted_by_rival: dict[MaskScore, dict[Mask, float]] = {}
        for number in np.argsort(predicted_rises, kind="stable")[: self._tries]:
            if predicted_rises[number] < margin:
                mask = masks[number]
                predicted = predicted_by_rival.setdefault(rivals[mask], {})
                predicted[mask] = predicted_rises[number]

        scores = {base.mask: base}
        best, largest_gain = base, 0.0
        for rival, predicted in predicted_by_rival.items():
            challengers = sorted(predicted, key=self._order)
            for score in self._problem.select.challenge(rival, challengers):
                scores[score.mask] = score
                if score.loss == math.inf:
                    continue
                self._scores[score.mask] = score
                rise = score.rise_over(rival)
                self._errors.append(rise - predicted[score.mask])
                if score.is_complete and -rise > largest_gain:
                    best, largest_gain = score, -rise
        self._tried.update(scores)
        return compared(0, list(scores.values()), best)

    def _restorations(self, mask: Mask) -> dict[Mask, MaskScore]:
        """Masks with one unit less that have no score, and for each the best known mask that
        removes as much."""
        rivals = {}
        for unit in self._units:
            restored = mask - unit
            if not unit <= mask or restored in self._scores:
                continue
            scores = self._scores_around(restored)
            if scores:
                rivals[restored] = min(scores, key=lambda score: score.loss)
        return rivals

    def _swaps(self, mask: Mask, neighborhood: Goal, surrogate: Surrogate) -> list[Mask]:
        """Masks that one exchange leads to and that were not tried, the most promising first."""
        flipped = [mask ^ unit for unit in self._units]
        rises = surrogate(flipped) - surrogate([mask])
        rise_by_unit = dict(zip(self._units, rises, strict=True))
        exchanges = Space(self._units, neighborhood).exchanges(mask)
        swaps = []
        for swapped in by_prediction(mask, exchanges, rise_by_unit):
            score = self._scores.get(swapped)
            is_scored = score is not None and score.is_complete
            if is_scored or swapped in self._tried or not self._fits(swapped):
                continue
            added = swapped - mask
            if not any(unit <= added for unit in self._overflowing):
                swaps.append(swapped)
            if len(swaps) == POOL:
                break
        return swaps

    def answer(self) -> Iteration:
        """Compare the known masks that meet the goal. If none does, those that are as near to it as
        the nearest."""
        complete = [mask for mask, score in self._scores.items() if score.is_complete]
        masks = sorted(complete, key=self._order)
        goal = self.goal
        if not any(map(goal.is_met, masks)):
            goal = goal.around(nearest(goal, masks))
        finalists = [self._scores[mask] for mask in masks if goal.is_met(mask)]
        return compared(0, finalists, min(finalists, key=lambda score: score.loss))
