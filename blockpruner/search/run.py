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
    if observer is None:
        observer = SilentObserver()

    def run_from_the_start() -> tuple[dict[str, list[Iteration]], Counts]:
        metric = request.metric
        objective = Objective(calibration, stores[metric.name], scorer, observer, metric)
        # Each choice is reported by its perplexity, whatever the search minimises.
        nll = objective
        if metric.name != NLL.name:
            nll = Objective(calibration, stores[NLL.name], scorer, observer)

        def counts_so_far() -> Counts:
            return objective.counts if nll is objective else objective.counts + nll.counts

        traces: dict[str, list[Iteration]] = {}
        steps: list[Took] = []
        counted: Took = (0, 0, 0.0)
        run = SearchOfModel(request, objective, nll, resources, observer)
        for budget, iterations in run.iterations_by_budget(budgets).items():
            traces[budget] = []
            for iteration in iterations:
                total = counts_so_far().step
                timed, other, seconds = map(sub, total, counted)
                on_iteration(budget, iteration, (timed, other, seconds))
                traces[budget].append(iteration)
                steps.append(total)
                counted = total
        return traces, replace(counts_so_far(), iterations=len(steps), steps=tuple(steps))

    return in_one_origin(run_from_the_start, observer)


def require_searchable(request: Request, resources: Resources, budgets: Sequence[str]) -> None:
    """Refuse budgets that no sequence of removals meets, as far as the resources are known; see
    `require_reachable`."""
    units = units_of(request, resources)
    for text in budgets:
        budget = parse_budget(text, resources["parameters"])
        # The time of blocks is known only after it was measured.
        if budget.resource in resources:
            require_reachable(budget, units, resources[budget.resource])


def units_of(request: Request, resources: Resources) -> list[Mask]:
    """What the search may remove at once, in tie-break order. Where a resource prices removals,
    only what takes something of it."""
    layers = len(resources["parameters"].blocks) // 2
    units = removable_units(layers, request.score.unit, request.score.candidates)
    price = request.options.price
    # A loss per unit of a price that is zero would be infinite.
    if price in resources:
        units = that_cost(units, resources[price])
    if not units:
        raise InputError(
            f"score.options.per {price}: no candidate takes anything of it; valid with these"
            " candidates: none, parameters"
        )
    return units


class SearchOfModel:
    """One search over one model."""

    def __init__(
        self,
        request: Request,
        objective: Objective,
        nll: Objective,
        resources: Resources,
        observer: Observer,
    ) -> None:
        """`nll` is the objective in which every choice is reported. It may be the same one."""
        self._request = request
        self._objective = objective
        self._nll = nll
        self._resources = resources
        self._observer = observer
        self._units = units_of(request, resources)
        self._rows_before = 0
        """Rows computed before the current iteration."""

    def iterations_by_budget(self, budgets: Sequence[str]) -> dict[str, Iterator[Iteration]]:
        """The iterations by budget; those of a nested search, which serve all budgets, under ""."""
        goals = []
        for text in budgets:
            budget = parse_budget(text, self._resources["parameters"])
            require_reachable(budget, self._units, self._costs(budget))
            goals.append(budget)
        # One sequence of removals serves every budget: each takes a prefix of it.
        if self._request.search.nested:
            return {"": self._search_for_all(goals)}
        return {budget.text: self._search_for(budget) for budget in goals}

    def _costs(self, budget: Budget) -> Costs:
        return self._resources[budget.resource]

    def _search_for_all(self, budgets: Sequence[Budget]) -> Iterator[Iteration]:
        """Iterations until no further removal could change which prefix meets any of the
        budgets."""
        prefixes: list[Mask] = []
        remaining = list(self._units)
        search = self._start_search(None, self._units)
        while True:
            unsettled = []
            for budget in budgets:
                if not is_settled(budget, prefixes, self._costs(budget), remaining):
                    unsettled.append(budget)
            if not unsettled:
                return
            mask = prefixes[-1] if prefixes else DENSE
            progress = min(self._progress(budget, mask) for budget in budgets)
            self._observer.begin(f"removal {len(prefixes) + 1}", min(1.0, progress))
            iteration = next(search, None)
            # Only an order that the user gives can end early.
            if iteration is None:
                budget = unsettled[0]
                raise InputError(
                    f"budget {budget.text!r} is not reached: the removals end at"
                    f" {budget.amount(mask, self._costs(budget))}; ask for less, or give a longer"
                    " score.options.order"
                )
            iteration = self._report(iteration)
            yield iteration
            prefixes.append(iteration.removed)
            # A unit such as a layer may be in part removed, and can still be chosen.
            remaining = [unit for unit in remaining if not unit <= iteration.removed]

    def _progress(self, budget: Budget, mask: Mask) -> float:
        """The share of a budget that a mask has removed."""
        if budget.blocks is not None:
            return len(mask) / budget.blocks
        return self._costs(budget).ratio(mask) / (budget.ratio or 1.0)

    def _search_for(self, budget: Budget) -> Iterator[Iteration]:
        """Iterations of a search for one budget; the last one's choice is the answer."""
        costs = self._costs(budget)
        units = self._units if budget.ratio is None else that_cost(self._units, costs)
        search = self._start_search(goal_of(budget, units, costs), units)
        for number in count(1):
            self._observer.begin(f"budget {budget.text}, step {number}")
            iteration = next(search, None)
            if iteration is None:
                self._observer.end("the search ends here", cached=True)
                return
            yield self._report(iteration)

    def _start_search(self, goal: Goal | None, units: Sequence[Mask]) -> Iterator[Iteration]:
        costs = self._resources.get(self._request.options.price)
        # A selection learns from the steps of its own search alone.
        select = make_select(self._objective, self._request.score, costs)
        problem = Problem(
            units, self._objective, select, self._objective.rows, goal, self._resources
        )
        return self._request.search.run(problem, self._request.options)

    def _report(self, iteration: Iteration) -> Iteration:
        """The iteration with the NLL of what it chose; the observer gets a line and a table of
        it."""
        nll = self._nll_of(iteration)
        iteration = replace(iteration, nll=nll, origin=self._objective.origin)
        rows_now = self._objective.counts.rows_computed
        # Nothing was computed: all losses came from the trial store.
        is_cached = rows_now == self._rows_before
        self._rows_before = rows_now
        added = iteration.added[iteration.chosen]
        # Searches such as the genetic one look at whole masks, which add no single unit.
        if added:
            choice = f"removed {format_mask(added)}"
        else:
            choice = f"best so far {format_mask(iteration.removed) or 'dense'}"
        ratio = self._resources["parameters"].ratio(iteration.removed)
        self._observer.end(
            f"{choice}, perplexity {iteration.perplexity:.4f}, ratio {ratio:.4f}",
            candidate_table(iteration),
            cached=is_cached,
        )
        return iteration

    def _nll_of(self, iteration: Iteration) -> tuple[MaskScore | None, ...]:
        """The NLL of the iteration's choice, of the dense model in the first iteration, and of all
        masks where NLL is the metric."""
        masks = {iteration.removed}
        # The first iteration's table also shows where the search started from.
        if iteration.index == 0:
            masks.add(DENSE)
        nll_by_mask = {}
        if self._objective is self._nll:
            nll_by_mask = {score.mask: score for score in iteration.scores}
        missing = []
        for mask in masks:
            if mask not in nll_by_mask or not nll_by_mask[mask].is_complete:
                missing.append(mask)
        nll_by_mask |= dict(zip(missing, self._nll(missing), strict=True))
        return tuple(nll_by_mask.get(score.mask) for score in iteration.scores)


def candidate_table(iteration: Iteration) -> list[dict[str, object]]:
    """A row for each mask that an iteration considered, for the observer."""
    table = []
    rows = zip(iteration.added, iteration.scores, iteration.nll, strict=True)
    for number, (unit, score, nll) in enumerate(rows):
        has_perplexity = nll is not None and nll.row_loss
        table.append(
            {
                "candidate": format_mask(unit or score.mask) or "(dense)",
                "loss": score.loss,
                "perplexity": nll.perplexity if nll is not None and has_perplexity else None,
                "rows": f"{score.rows_used}/{score.rows_total}",
                "chosen": number == iteration.chosen,
            }
        )
    return table
