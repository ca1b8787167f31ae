"""A search from start to stop: over its objective, until every budget is settled, each iteration
reported at once.

Decides when a search may stop and what it reports. Which masks an iteration considers is the
search's decision; what a trial is, the store's.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from operator import sub

from blockpruner.core.blocks import DENSE, Mask, format_mask, removable_units
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
from blockpruner.core.progress import Observer, SilentObserver
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.scoring.metrics import NLL
from blockpruner.scoring.objectives import Counts, MaskScore, Objective, in_one_origin
from blockpruner.scoring.work import Scorer
from blockpruner.search.iteration import Iteration
from blockpruner.search.problem import Problem
from blockpruner.search.racing import make_select
from blockpruner.search.registry import Request
from blockpruner.search.trace import Took
from blockpruner.store.trials import TrialStore

OnIteration = Callable[[str, Iteration, Took], object]
"""Receives the budget that a trace is for ("" where one trace serves all), each iteration when it
is complete, and what it took as in `Counts.steps`, less the iterations before."""


def search(
    request: Request,
    calibration: CalibrationSet,
    stores: Mapping[str, TrialStore],
    scorer: Scorer,
    resources: Resources,
    budgets: Sequence[str],
    observer: Observer | None = None,
    on_iteration: OnIteration = lambda budget, iteration, took: None,
) -> tuple[dict[str, list[Iteration]], Counts]:
    """Search far enough for every budget. Returns the trace of each budget, or one under "" that
    serves every budget where the search is nested; and what it took. Raises InputError for a budget
    that cannot be reached, before anything is computed; or one that a search's removals end before.
    The stores are of `request.losses`, by name."""
    seen = observer or SilentObserver()

    def searched() -> tuple[dict[str, list[Iteration]], Counts]:
        own = nll = Objective(
            calibration, stores[request.metric.name], scorer, seen, request.metric
        )
        if request.metric.name != NLL.name:
            nll = Objective(calibration, stores[NLL.name], scorer, seen)
        found: dict[str, list[Iteration]] = {}
        steps: list[Took] = []
        for budget, iterations in _Run(request, own, nll, resources, seen).traces(budgets).items():
            found[budget] = []
            for iteration in iterations:
                counts = own.counts if nll is own else own.counts + nll.counts
                steps.append(counts.step)
                timed, other, seconds = map(
                    sub, steps[-1], steps[-2] if len(steps) > 1 else (0, 0, 0.0)
                )
                on_iteration(budget, iteration, (timed, other, seconds))
                found[budget].append(iteration)
        counts = own.counts if nll is own else own.counts + nll.counts
        return found, replace(counts, iterations=len(steps), steps=tuple(steps))

    return in_one_origin(searched, seen)


def require_searchable(request: Request, resources: Resources, budgets: Sequence[str]) -> None:
    """Refuse budgets that no sequence of removals meets, as far as the resources are known; see
    `require_reachable`."""
    units = units_of(request, resources)
    for budget in (parse_budget(text, resources["parameters"]) for text in budgets):
        if budget.resource in resources:
            require_reachable(budget, units, resources[budget.resource])


def units_of(request: Request, resources: Resources) -> list[Mask]:
    """What the search may remove at once, in tie-break order. Where a resource prices removals,
    only what takes something of it."""
    layers = len(resources["parameters"].blocks) // 2
    units = removable_units(layers, request.score.unit, request.score.candidates)
    price = request.options.price
    found = that_cost(units, resources[price]) if price in resources else units
    if not found:
        raise InputError(
            f"score.options.per {price}: no candidate takes anything of it; valid with these"
            " candidates: none, parameters"
        )
    return found


class _Run:
    """One search over one model; `nll` is the objective in which every choice is reported, maybe
    the same one."""

    def __init__(
        self,
        request: Request,
        objective: Objective,
        nll: Objective,
        resources: Resources,
        observer: Observer,
    ) -> None:
        self._request, self._objective, self._nll = request, objective, nll
        self._resources, self._observer = resources, observer
        self._units = units_of(request, resources)
        self._known = 0

    def traces(self, budgets: Sequence[str]) -> dict[str, Iterator[Iteration]]:
        """The iterations by budget, or under "" those for all budgets, where the search is
        nested."""
        wanted = [parse_budget(text, self._resources["parameters"]) for text in budgets]
        for budget in wanted:
            require_reachable(budget, self._units, self._costs(budget))
        return (
            {"": self._nested(wanted)}
            if self._request.search.nested
            else {b.text: self._for(b) for b in wanted}
        )

    def _costs(self, budget: Budget) -> Costs:
        return self._resources[budget.resource]

    def _nested(self, budgets: Sequence[Budget]) -> Iterator[Iteration]:
        """Iterations until no further removal could change which prefix meets any of the
        budgets."""
        prefixes: list[Mask] = []
        remaining = list(self._units)
        search = self._search(None, self._units)
        while not all(
            is_settled(budget, prefixes, self._costs(budget), remaining) for budget in budgets
        ):
            mask = prefixes[-1] if prefixes else DENSE
            done = min((self._done(budget, mask) for budget in budgets), default=0.0)
            self._observer.begin(f"removal {len(prefixes) + 1}", min(1.0, done))
            found = next(search, None)
            if found is None:
                budget = next(
                    b for b in budgets if not is_settled(b, prefixes, self._costs(b), remaining)
                )
                raise InputError(
                    f"budget {budget.text!r} is not reached: the removals end at"
                    f" {budget.amount(mask, self._costs(budget))}; ask for less, or give a longer"
                    " score.options.order"
                )
            iteration = self._reported(found)
            yield iteration
            prefixes.append(iteration.removed)
            remaining = [unit for unit in remaining if not unit <= iteration.removed]

    def _done(self, budget: Budget, mask: Mask) -> float:
        """How much of the way to a budget a mask is."""
        if budget.blocks is not None:
            return len(mask) / budget.blocks
        return self._costs(budget).ratio(mask) / (budget.ratio or 1.0)

    def _for(self, budget: Budget) -> Iterator[Iteration]:
        """Iterations of a search for one budget; the last one's choice is the answer."""
        costs = self._costs(budget)
        units = self._units if budget.ratio is None else that_cost(self._units, costs)
        search = self._search(goal_of(budget, units, costs), units)
        for number in count(1):
            self._observer.begin(f"budget {budget.text}, step {number}")
            found = next(search, None)
            if found is None:
                self._observer.end("the search ends here", cached=True)
                return
            yield self._reported(found)

    def _search(self, goal: Goal | None, units: Sequence[Mask]) -> Iterator[Iteration]:
        # what it has learned belongs to one search alone
        costs = self._resources.get(self._request.options.price)
        select = make_select(self._objective, self._request.score, costs)
        problem = Problem(
            units, self._objective, select, self._objective.rows, goal, self._resources
        )
        return self._request.search.run(problem, self._request.options)

    def _reported(self, iteration: Iteration) -> Iteration:
        """The iteration with the NLL of what it chose; the observer gets a line and a table of
        it."""
        iteration = replace(iteration, nll=self._nll_of(iteration), origin=self._objective.origin)
        asked = self._objective.counts.rows_computed
        computed, self._known = asked - self._known, asked
        added = iteration.added[iteration.chosen]
        what = (
            f"removed {format_mask(added)}"
            if added
            else f"best so far {format_mask(iteration.removed) or 'dense'}"
        )
        ratio = self._resources["parameters"].ratio(iteration.removed)
        rows = zip(iteration.added, iteration.scores, iteration.nll, strict=True)
        self._observer.end(
            f"{what}, perplexity {iteration.perplexity:.4f}, ratio {ratio:.4f}",
            [
                {
                    "candidate": format_mask(unit or score.mask) or "(dense)",
                    "loss": score.loss,
                    "perplexity": (
                        plain.perplexity if plain is not None and plain.row_loss else None
                    ),
                    "rows": f"{score.rows_used}/{score.rows_total}",
                    "chosen": number == iteration.chosen,
                }
                for number, (unit, score, plain) in enumerate(rows)
            ],
            cached=computed == 0,
        )
        return iteration

    def _nll_of(self, iteration: Iteration) -> tuple[MaskScore | None, ...]:
        own = self._objective is self._nll
        wanted = {iteration.removed} | ({DENSE} if iteration.index == 0 else set())
        found = {score.mask: score for score in iteration.scores if own}
        missing = [mask for mask in wanted if mask not in found or not found[mask].is_complete]
        found |= dict(zip(missing, self._nll(missing), strict=True))
        return tuple(found.get(score.mask) for score in iteration.scores)
