"""A search from start to stop: over its objective, until every budget is settled, each iteration written at once.

Decides when a search may stop and what a run of it counts. What is considered in an iteration is the method's
decision, what a trial is the store's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from blockpruner.blocks import DENSE, Mask, format_mask, removable_units
from blockpruner.budgets import (
    Budget,
    Goal,
    Resources,
    goal_of,
    is_settled,
    parse_budget,
    require_reachable,
    resources_of,
    that_cost,
)
from blockpruner.calibration import CalibrationSet
from blockpruner.errors import InputError
from blockpruner.families import Costs
from blockpruner.locks import hold, this_process
from blockpruner.progress import Observer
from blockpruner.provenance import fingerprint
from blockpruner.scoring.accelerate import accelerate
from blockpruner.scoring.metrics import PERPLEXITY, metric_of
from blockpruner.scoring.objectives import Objective, Score
from blockpruner.scoring.work import Scorer
from blockpruner.search import method_of, search_settings
from blockpruner.search.iteration import Iteration
from blockpruner.search.problem import Problem
from blockpruner.search.trace import search_fingerprint, seed_stores, trace_directory, write_current, write_iteration
from blockpruner.tables import read_json, write_json
from blockpruner.transforms import TRANSFORMS
from blockpruner.transforms.planning import PLANNERS, Bench, Material
from blockpruner.trials import TrialStore, require_rows, store_fingerprint

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


def score_run(
    scores: Path,
    trials: Path,
    *,
    calibration: CalibrationSet,
    model_identity: str,
    dtype: str,
    config: Mapping[str, Any],
    score: Mapping[str, Any],
    budgets: Sequence[str],
    make_scorer: Callable[[], Scorer],
    make_bench: Callable[[], Bench],
    observer: Observer,
    metrics: Path,
    latency: Callable[[], Mapping[str, Any]] | None = None,
) -> None:
    """Score one run far enough for its budgets; write its iteration tables, `current.json` and the counts.

    Args:
        scores: the run's folder of traces; tables present seed the trial stores (a clone after `dvc pull`).
        trials: folder of all trial stores.
        score: the run's `score` section, every key of which is part of the search's fingerprint, defaults filled in.
        make_scorer, make_bench: load the model, for a method that ends in a mask and for one that changes weights.
        latency: what generation and each block takes (`budgets.resources_of`); asked for only where a budget is a
            speed-up, or removals are priced by it.

    Raises:
        InputError: settings or budgets that cannot be met, before anything is computed.
    """
    score = search_settings(score)
    require_rows(len(calibration.rows))
    known = _known_latency(config, score, budgets, latency)
    resources = resources_of(config, known)
    started = time.monotonic()
    facts = {"rows": len(calibration.rows), "tokens": calibration.tokens, "digest": calibration.digest}
    if score["method"] in TRANSFORMS:
        material = Material(calibration, model_identity, dtype, config, resources, trials, make_bench, observer)
        current, counts = _plan_transform(scores, score, budgets, material, known)
    else:
        current, counts = _search(
            scores, trials, calibration, model_identity, dtype, resources, score, budgets, make_scorer, observer, known
        )
    write_current(scores, {**current, "score": score, "calibration": facts})
    counts["tokens_per_second"] = round(counts["tokens"] / counts["seconds"], 1) if counts["seconds"] else None
    counts["seconds"] = round(counts["seconds"], 2)
    write_json(metrics, {**counts, "wall_seconds": round(time.monotonic() - started, 2)})


def _known_latency(
    config: Mapping[str, Any],
    score: Mapping[str, Any],
    budgets: Sequence[str],
    latency: Callable[[], Mapping[str, Any]] | None,
) -> Mapping[str, Any] | None:
    """The measurement, where something depends on it; other budgets are checked before it is made."""
    resources = resources_of(config)
    wanted = [parse_budget(text, resources["parameters"]) for text in budgets]
    if "latency" not in {budget.resource for budget in wanted} | {score["options"].get("per")}:
        return None
    if score["method"] not in TRANSFORMS:
        units = removable_units(int(config["num_hidden_layers"]), score["unit"], score["candidates"])
        for budget in wanted:
            if budget.resource in resources:
                require_reachable(budget, units, resources[budget.resource])
    if latency is None:
        raise InputError(f"budgets {list(budgets)} or score.options.per need a speed-up, and {UNTIMED}")
    return latency()


def _search(
    scores: Path,
    trials: Path,
    calibration: CalibrationSet,
    model_identity: str,
    dtype: str,
    resources: Resources,
    score: Mapping[str, Any],
    budgets: Sequence[str],
    make_scorer: Callable[[], Scorer],
    observer: Observer,
    latency: Mapping[str, Any] | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run a search that ends in a mask; what `current.json` says of it, and its counts."""
    method, metric = method_of(score["method"]), metric_of(score["metric"])
    units = removable_units(len(resources["parameters"].blocks) // 2, score["unit"], score["candidates"])
    fields = {
        name: store_fingerprint(calibration.digest, model_identity, dtype, name)
        for name in sorted({metric.loss, PERPLEXITY.loss})
    }
    priced = {"latency": latency} if score["options"].get("per") == "latency" else {}
    search = search_fingerprint(fields[metric.loss], {**score, **priced})
    current = {
        "kind": "mask", "search": search, "nested": method.nested, "store": fields[metric.loss], "latency": latency
    }  # fmt: skip
    with ExitStack() as stack:
        stores = {}
        for name, field in fields.items():  # in one order everywhere, so that two processes cannot wait for each other
            stack.enter_context(exclusive(trials / f"{fingerprint(field)}.lock", observer))
            stores[name] = TrialStore(field, len(calibration.rows), trials)
            stack.callback(stores[name].close)
        own, plain = stores[metric.loss], stores[PERPLEXITY.loss]
        seeded = seed_stores(scores / search, search, own, plain, influence=metric.influence)
        for problem in [*seeded, *(line for store in stores.values() for line in store.problems)]:
            observer.note(f"warning: {problem}")
        observer.note(f"calibration: {len(calibration.rows)} rows, {calibration.tokens} tokens; search {search}")
        scorer = _Once(make_scorer)
        stack.callback(scorer.close)
        objective = nll = Objective(calibration, own, scorer, observer, metric)
        if own is not plain:
            nll = Objective(calibration, plain, scorer, observer)
        traces = SearchRun(objective, nll, score, units, resources, observer).traces(
            budgets, lambda name, iteration: write_iteration(trace_directory(scores, current, name), iteration, search)
        )
    done = asdict(objective.counts)
    if nll is not objective:
        done = {key: value + asdict(nll.counts)[key] for key, value in done.items()}
    return current, {"iterations": sum(map(len, traces.values())), **done}


def _plan_transform(
    scores: Path,
    score: Mapping[str, Any],
    budgets: Sequence[str],
    material: Material,
    latency: Mapping[str, Any] | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Find what a transformation does for each budget; what `current.json` says of it, and what was computed."""
    calibration, observer, method = material.calibration, material.observer, score["method"]
    fields = store_fingerprint(calibration.digest, material.model_identity, material.dtype, PERPLEXITY.loss)
    search = search_fingerprint(fields, score)
    current: dict[str, Any] = {"kind": method, "search": search, "nested": False, "store": fields, "latency": latency}
    with ExitStack() as stack:
        stack.enter_context(exclusive(material.trials / f"{fingerprint(fields)}.lock", observer))
        store = TrialStore(fields, len(calibration.rows), material.trials)
        stack.callback(store.close)
        dense = Objective(calibration, store, lambda: material.bench.scorer(), observer)
        for text in budgets:
            path = trace_directory(scores, current, text) / "details.json"
            observer.begin(f"{method} for {text}")
            is_known = path.exists()
            if not is_known:
                budget = parse_budget(text, material.resources["parameters"])
                write_json(path, PLANNERS[method](budget, score["options"], material))
            found = {key: value for key, value in read_json(path).items() if key != "nll"}
            observer.end(", ".join(f"{key} {value}" for key, value in found.items()), cached=is_known)
        current["dense_nll"] = dense([DENSE])[0].loss
    return current, {"iterations": 0, **asdict(dense.counts)}


class _Once:
    """A scorer for several objectives: made when the first one asks, closed in the end."""

    def __init__(self, make: Callable[[], Scorer]) -> None:
        self._make = make
        self._made: Scorer | None = None

    def __call__(self) -> Scorer:
        if self._made is None:
            self._made = self._make()
        return self._made

    def close(self) -> None:
        if self._made is not None:
            self._made.close()


@contextmanager
def exclusive(path: Path, observer: Observer) -> Iterator[None]:
    """Hold a lock file; while another process computes the same trials, say so and wait for it."""

    def busy(holder: str) -> None:
        observer.note(f"process {holder} computes the same trials; waiting for it, then reusing them")

    with hold(path, this_process(), busy):
        yield
