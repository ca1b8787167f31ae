"""Floating search: greedy that goes back. After each removal it takes swaps and restorations as long as they help.

Sequential floating selection (Pudil et al., 1994) with prices. A forward step is greedy's. Then units are swapped while
that lowers the loss, and the mask stays as near to the amount of the resource that the forward step reached as masks of
one budget are. A restoration is taken if its mask is better than every known one that removes as much. Of every amount
the best known mask is the one to go on from.

A swap is predicted as the sum of what its parts did when they were last scored: removals in forward steps, restorations
in the current mask. The best predicted ones compete with the current mask. A walk depends on its budget in its last
steps only, so several budgets share most of their trials.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby, islice
from typing import Literal

from pydantic import Field

from blockpruner.core.blocks import DENSE, Mask
from blockpruner.core.budgets import Goal
from blockpruner.scoring.objectives import MaskScore
from blockpruner.search.greedy import GreedyOptions, costs_of, forward
from blockpruner.search.iteration import Iteration
from blockpruner.search.problem import Problem
from blockpruner.search.space import Space, goal_of_problem, nearest, unit_order
from blockpruner.search.swap import by_prediction


class FloatingOptions(GreedyOptions):
    per: Literal["none", "parameters", "kv", "latency"] = "parameters"
    """The resource whose share prices a removal in forward steps. With "none" all removals cost the same."""
    tries: int = Field(default=16, ge=1)
    """How many swaps of a mask are scored, the best predicted ones, before the search goes on."""


def floating(problem: Problem, options: FloatingOptions) -> Iterator[Iteration]:
    """Yield an iteration for each forward step and each attempt to better its mask, and one in which all known masks
    that meet the goal compete.

    Raises:
        InputError: the budget is nearest to removing nothing, or the price is a resource that was not measured.
    """
    walk, costs = _Walk(problem, options.tries), costs_of(problem, options)
    index = steps = 0
    base: MaskScore | None = None
    while fitting := walk.fitting(DENSE if base is None else base.mask):
        iteration = replace(forward(problem, steps, base, fitting, costs), index=index)
        yield iteration
        base = walk.taken(iteration, base or iteration.scores[0])
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
        self._known: dict[Mask, MaskScore] = {}
        self._tried: set[Mask] = set()
        self._change = dict.fromkeys(problem.units, math.inf)
        """Of each unit what its removal, or its restoration, did to the loss when it was scored last."""

    def fitting(self, mask: Mask) -> list[Mask]:
        """Units that may be removed next without removing more than the goal allows."""
        return [unit for unit in self._units if not unit <= mask and self._fits(mask | unit)]

    def _fits(self, mask: Mask) -> bool:
        return self.goal.share(mask) <= self.goal.wanted + self.goal.tolerance + 1e-12

    def taken(self, iteration: Iteration, before: MaskScore) -> MaskScore:
        """The best known mask that removes as much as a forward step's choice."""
        scores = {unit: score for unit, score in zip(iteration.added, iteration.scores, strict=True) if unit}
        self._learn(scores, before)
        chosen = iteration.scores[iteration.chosen]
        around = self.goal.around(chosen.mask)
        like = [score for score in self._known.values() if around.is_met(score.mask)]
        return min([chosen, *like], key=lambda score: score.loss)

    def _learn(self, scores: dict[Mask, MaskScore], before: MaskScore) -> None:
        """Args:
        scores: of the mask of `before` with one unit removed, or restored.
        """
        for unit, score in scores.items():
            self._change[unit] = score.loss - math.fsum(before.row_loss[: score.rows_used]) / score.rows_used
        self._known |= {score.mask: score for score in [before, *scores.values()] if score.is_complete}

    def _gain(self, score: MaskScore, known: Mapping[Mask, MaskScore]) -> float:
        """How much better a mask is than all those known before that remove as much; 0 where there was none."""
        around = self.goal.around(score.mask)
        like = [other.loss for other in known.values() if around.is_met(other.mask)]
        return min(like) - score.loss if like and score.is_complete else 0.0

    def bettered(self, base: MaskScore, around: Goal) -> Iteration:
        """A restoration or a swap that helps, or the mask itself.

        Args:
            around: what a swapped mask removes.
        """
        removed = sorted((unit for unit in self._units if unit <= base.mask), key=self.goal.share)
        known = dict(self._known)
        found: dict[Mask, MaskScore] = {base.mask: base}
        for _, group in groupby(removed, key=self.goal.share):
            units = list(group)
            scores = self._problem.select.challenge(base, [base.mask - unit for unit in units])
            self._learn(dict(zip(units, scores, strict=True)), base)
            found |= {score.mask: score for score in scores}
        best = max(found.values(), key=lambda score: self._gain(score, known))
        if self._gain(best, known) <= 0:
            best = base
            if swaps := self._swaps(base.mask, around):
                scores = self._problem.select.challenge(base, swaps)
                found |= {score.mask: score for score in scores}
                complete = [base, *(score for score in scores if score.is_complete)]
                self._known |= {score.mask: score for score in complete}
                best = min(complete, key=lambda score: score.loss)
        return _compared(list(found.values()), best)

    def _swaps(self, mask: Mask, around: Goal) -> list[Mask]:
        """The best predicted ones of those that were not tried."""
        exchanges = Space(self._units, around).exchanges(mask)
        new = (
            other
            for other in by_prediction(mask, exchanges, self._change)
            if other not in self._known and other not in self._tried and self._fits(other)
        )
        swaps = sorted(islice(new, self._tries), key=self._order)
        self._tried.update(swaps)
        return swaps

    def answer(self) -> Iteration:
        """The known masks that meet the goal, or those that are as near to it as the nearest, and the best of them."""
        masks = sorted(self._known, key=self._order)
        goal = self.goal
        if not any(map(goal.is_met, masks)):
            goal = goal.around(nearest(goal, masks))
        finished = [self._known[mask] for mask in masks if goal.is_met(mask)]
        return _compared(finished, min(finished, key=lambda score: score.loss))


def _compared(scores: Sequence[MaskScore], best: MaskScore) -> Iteration:
    return Iteration(0, tuple(scores), (None,) * len(scores), scores.index(best))
