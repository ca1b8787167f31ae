"""A search from start to stop: over its objective, until every budget is settled, each iteration written at once.

Decides when a search may stop and what a run of it counts. What is considered in an iteration is the method's
decision, what a trial is the store's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from blockpruner.core.blocks import DENSE, Mask, format_mask
from blockpruner.core.budgets import (
    Budget,
    Goal,
    Resources,
    goal_of,
    is_settled,
    parse_budget,
    require_reachable,
    that_cost,
)
from blockpruner.core.errors import InputError
from blockpruner.core.families import Costs
from blockpruner.core.progress import Observer
from blockpruner.scoring.accelerate import accelerate
from blockpruner.scoring.objectives import Objective, Score
from blockpruner.search import method_of
from blockpruner.search.iteration import Iteration
from blockpruner.search.problem import Problem

UNTIMED = "what blocks take of the time is not known here: the stage score measures it"


class SearchRun:
    """One search over one model.

    Args:
        objective: of the metric that the search minimises.
        nll: of perplexity, in which every choice is reported; the same one where that is the metric.
        score: as from `search_settings`.
        units: what may be removed at once, in tie-break order; of those only what takes of the resource that prices
            removals, where one does.
    """

    def __init__(
        self,
        objective: Objective,
        nll: Objective,
        score: Mapping[str, Any],
        units: Sequence[Mask],
        resources: Resources,
        observer: Observer,
    ) -> None:
        self._objective = objective
        self._nll = nll
        self._resources = resources
        self._observer = observer
        self._method = method_of(score["method"])
        self._options = score["options"]
        self._score = score
        price = resources.get(self._options.get("per", "none"))
        self._units = units if price is None else that_cost(units, price)
        if not self._units:
            raise InputError(
                f"score.options.per {self._options['per']}: no candidate takes anything of it; valid with these "
                "candidates: none, parameters"
            )
        self._known = 0

    def traces(
        self, budgets: Sequence[str], on_iteration: Callable[[str, Iteration], object] = lambda budget, iteration: None
    ) -> dict[str, list[Iteration]]:
        """Search for all budgets; the trace by budget, or one for all of them, under "", where the search is nested.

        Args:
            on_iteration: receives the trace's name and each iteration when it is complete.

        Raises:
            InputError: a budget that cannot be reached, before anything is computed; or one that a search's removals
                end before.
        """
        wanted = [parse_budget(text, self._resources["parameters"]) for text in budgets]
        for budget in wanted:
            if budget.resource not in self._resources:
                raise InputError(f"budget {budget.text!r} is a speed-up, and {UNTIMED}")
            require_reachable(budget, self._units, self._costs(budget))
        searches = {"": self._nested(wanted)} if self._method.nested else {b.text: self._for(b) for b in wanted}
        found: dict[str, list[Iteration]] = {name: [] for name in searches}
        for name, iterations in searches.items():
            for iteration in iterations:
                on_iteration(name, iteration)
                found[name].append(iteration)
        return found

    def _costs(self, budget: Budget) -> Costs:
        return self._resources[budget.resource]

    def _nested(self, budgets: Sequence[Budget]) -> Iterator[Iteration]:
        """Iterations until no further removal could change which prefix meets any of the budgets."""
        prefixes: list[Mask] = []
        remaining = list(self._units)
        search = self._search(None, self._units)
        while not all(is_settled(budget, prefixes, self._costs(budget), remaining) for budget in budgets):
            mask = prefixes[-1] if prefixes else DENSE
            done = min((self._done(budget, mask) for budget in budgets), default=0.0)
            self._observer.begin(f"iteration {len(prefixes)}", min(1.0, done))
            found = next(search, None)
            if found is None:
                raise self._out_of_removals(budgets, prefixes, remaining)
            iteration = self._reported(found, len(remaining))
            yield iteration
            prefixes.append(iteration.removed)
            remaining = [unit for unit in remaining if not unit <= iteration.removed]

    def _done(self, budget: Budget, mask: Mask) -> float:
        """How much of the way to a budget a mask is."""
        if budget.blocks is not None:
            return len(mask) / budget.blocks
        return self._costs(budget).ratio(mask) / (budget.ratio or 1.0)

    def _out_of_removals(
        self, budgets: Sequence[Budget], prefixes: Sequence[Mask], remaining: Sequence[Mask]
    ) -> InputError:
        budget = next(b for b in budgets if not is_settled(b, prefixes, self._costs(b), remaining))
        last = prefixes[-1] if prefixes else DENSE
        return InputError(
            f"budget {budget.text!r} is not reached: the removals end at {budget.amount(last, self._costs(budget))}; "
            "ask for less, or give a longer score.options.order"
        )

    def _for(self, budget: Budget) -> Iterator[Iteration]:
        """Iterations of a search for one budget; the last one's choice is the answer."""
        costs = self._costs(budget)
        units = self._units if budget.ratio is None else that_cost(self._units, costs)
        search = self._search(goal_of(budget, units, costs), units)
        while True:
            self._observer.begin(f"budget {budget.text}, step")
            try:
                iteration = next(search)
            except StopIteration:
                return
            yield self._reported(iteration)

    def _search(self, goal: Goal | None, units: Sequence[Mask]) -> Iterator[Iteration]:
        select = accelerate(self._objective, self._score)  # what it has learned belongs to one search alone
        problem = Problem(units, self._objective, select, self._objective.rows, goal, self._resources)
        return self._method.search(problem, **self._options)

    def _reported(self, iteration: Iteration, candidates: int | None = None) -> Iteration:
        """The iteration with the NLL of what it chose, told to the observer.

        Args:
            candidates: how many units could have been removed; None where that is not what a step is made of.
        """
        iteration = replace(iteration, nll=self._nll_of(iteration))
        asked = self._objective.counts.rows_computed
        computed, self._known = asked - self._known, asked
        best, added = iteration.scores[iteration.chosen], iteration.added[iteration.chosen]
        what = (
            f"removed {format_mask(added)}" if added else f"best so far {format_mask(best.mask) or 'the dense model'}"
        )
        considered = "" if candidates is None else _considered(iteration, candidates)
        self._observer.end(
            f"{what}, {self._loss_words(best)}perplexity {iteration.perplexity:.4f}, "
            f"ratio {self._resources['parameters'].ratio(iteration.removed):.4f}{considered}",
            [
                {
                    "added" if candidates is not None else "removed": format_mask(unit or score.mask) or "(dense)",
                    "loss": score.loss,
                    "perplexity": plain.perplexity if plain is not None and plain.row_loss else None,
                    "rows": f"{score.rows_used}/{score.rows_total}",
                    "chosen": number == iteration.chosen,
                }
                for number, (unit, score, plain) in enumerate(
                    zip(iteration.added, iteration.scores, iteration.nll, strict=True)
                )
            ],
            cached=computed == 0,
        )
        return iteration

    def _loss_words(self, score: Score) -> str:
        """What decides, where that is not perplexity."""
        same = self._objective is self._nll or math.isnan(score.loss)
        return "" if same else f"{self._objective.metric.name} {score.loss:.4f}, "

    def _nll_of(self, iteration: Iteration) -> tuple[Score | None, ...]:
        own = self._objective is self._nll
        wanted = {iteration.removed} | ({DENSE} if iteration.index == 0 else set())
        found = {score.mask: score for score in iteration.scores if own}
        missing = [mask for mask in wanted if mask not in found or not found[mask].is_complete]
        found |= dict(zip(missing, self._nll(missing), strict=True))
        return tuple(found.get(score.mask) for score in iteration.scores)


def _considered(iteration: Iteration, candidates: int) -> str:
    """What an iteration spent, and what an audit of it says."""
    scores = [score for score, added in zip(iteration.scores, iteration.added, strict=True) if added is not None]
    complete = sum(score.is_complete for score in scores)
    if not complete:
        return ""
    text = f"; {complete} of {candidates} candidates scored on all rows"
    if complete < len(scores):
        text += f", {len(scores) - complete} dropped by the race"
    if len(scores) < candidates:
        text += f", {candidates - len(scores)} not considered"
    if iteration.lazy_choice is not None:
        same = iteration.lazy_choice == iteration.removed
        base = iteration.removed - (iteration.added[iteration.chosen] or DENSE)
        text += "; audit: the same choice" if same else f"; audit: not {format_mask(iteration.lazy_choice - base)}"
    return text
