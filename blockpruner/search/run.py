"""A search from start to stop: over its objective, until every budget is settled, each iteration written at once.

Decides when a search may stop and what a run of it counts. What is considered in an iteration is the method's
decision, what a trial is the store's.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from blockpruner.blocks import DENSE, Mask, format_mask, removable_units
from blockpruner.budgets import Budget, Goal, goal_of, is_settled, parse_budget, require_reachable
from blockpruner.calibration import CalibrationSet
from blockpruner.errors import InputError
from blockpruner.families import ParameterCounts, count_parameters
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
from blockpruner.tables import read_json, storage_error, write_json
from blockpruner.transforms import TRANSFORMS
from blockpruner.transforms.planning import PLANNERS, Bench, Material
from blockpruner.trials import TrialStore, require_rows, store_fingerprint


class SearchRun:
    """One search over one model.

    Args:
        objective: of the metric that the search minimises.
        nll: of perplexity, in which every choice is reported; the same one where that is the metric.
        score: as from `search_settings`.
        units: what may be removed at once, in tie-break order.
    """

    def __init__(
        self,
        objective: Objective,
        nll: Objective,
        score: Mapping[str, Any],
        units: Sequence[Mask],
        counts: ParameterCounts,
        observer: Observer,
    ) -> None:
        self._objective = objective
        self._nll = nll
        self._units = units
        self._counts = counts
        self._observer = observer
        self._method = method_of(score["method"])
        self._options = score["options"]
        self._score = score
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
        wanted = [parse_budget(text, self._counts) for text in budgets]
        for budget in wanted:
            require_reachable(budget, self._units, self._counts)
        searches = {"": self._nested(wanted)} if self._method.nested else {b.text: self._for(b) for b in wanted}
        found: dict[str, list[Iteration]] = {name: [] for name in searches}
        for name, iterations in searches.items():
            for iteration in iterations:
                on_iteration(name, iteration)
                found[name].append(iteration)
        return found

    def _nested(self, budgets: Sequence[Budget]) -> Iterator[Iteration]:
        """Iterations until no further removal could change which prefix meets any of the budgets."""
        furthest = max((b.ratio or (b.blocks or 0) / len(self._counts.blocks) for b in budgets), default=1.0)
        prefixes: list[Mask] = []
        remaining = list(self._units)
        search = self._search(None)
        while not all(is_settled(budget, prefixes, self._counts, remaining) for budget in budgets):
            # how much of the way to the furthest budget is done
            done = self._counts.ratio(prefixes[-1] if prefixes else DENSE) / furthest
            self._observer.begin(f"iteration {len(prefixes)}", min(1.0, done))
            found = next(search, None)
            if found is None:
                raise self._out_of_removals(budgets, prefixes, remaining)
            iteration = self._reported(found, len(remaining))
            yield iteration
            prefixes.append(iteration.removed)
            remaining = [unit for unit in remaining if not unit <= iteration.removed]

    def _out_of_removals(
        self, budgets: Sequence[Budget], prefixes: Sequence[Mask], remaining: Sequence[Mask]
    ) -> InputError:
        text = next(b.text for b in budgets if not is_settled(b, prefixes, self._counts, remaining))
        last = prefixes[-1] if prefixes else DENSE
        return InputError(
            f"budget {text!r} is not reached: the removals end at {len(last)}blocks, ratio "
            f"{self._counts.ratio(last):.4f}; ask for less, or give a longer score.options.order"
        )

    def _for(self, budget: Budget) -> Iterator[Iteration]:
        """Iterations of a search for one budget; the last one's choice is the answer."""
        search = self._search(goal_of(budget, self._units, self._counts))
        while True:
            self._observer.begin(f"budget {budget.text}, step")
            try:
                iteration = next(search)
            except StopIteration:
                return
            yield self._reported(iteration)

    def _search(self, goal: Goal | None) -> Iterator[Iteration]:
        select = accelerate(self._objective, self._score)  # what it has learned belongs to one search alone
        return self._method.search(
            Problem(self._units, self._objective, select, self._objective.rows, goal), **self._options
        )

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
            f"{what}, perplexity {iteration.perplexity:.4f}, "
            f"ratio {self._counts.ratio(iteration.removed):.4f}{considered}",
            [
                {
                    "added" if candidates is not None else "removed": format_mask(unit or score.mask) or "(dense)",
                    "loss": score.loss,
                    "perplexity": plain.perplexity if plain is not None and plain.row_loss else None,
                    "rows": f"{score.rows_used}/{score.rows_total}",
                }
                for unit, score, plain in zip(iteration.added, iteration.scores, iteration.nll, strict=True)
            ],
            cached=computed == 0,
        )
        return iteration

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
) -> None:
    """Score one run far enough for its budgets; write its iteration tables, `current.json` and the counts.

    Args:
        scores: the run's folder of traces; tables present seed the trial stores (a clone after `dvc pull`).
        trials: folder of all trial stores.
        score: the run's `score` section, every key of which is part of the search's fingerprint, defaults filled in.
        make_scorer, make_bench: load the model, for a method that ends in a mask and for one that changes weights.
    """
    score = search_settings(score)
    require_rows(len(calibration.rows))
    started = time.monotonic()
    facts = {"rows": len(calibration.rows), "tokens": calibration.tokens, "digest": calibration.digest}
    if score["method"] in TRANSFORMS:
        material = Material(calibration, model_identity, dtype, config, trials, make_bench, observer)
        current, counts = _plan_transform(scores, score, budgets, material)
    else:
        current, counts = _search(
            scores, trials, calibration, model_identity, dtype, config, score, budgets, make_scorer, observer
        )
    write_current(scores, {**current, "score": score, "calibration": facts})
    counts["tokens_per_second"] = round(counts["tokens"] / counts["seconds"], 1) if counts["seconds"] else None
    counts["seconds"] = round(counts["seconds"], 2)
    write_json(metrics, {**counts, "wall_seconds": round(time.monotonic() - started, 2)})


def _search(
    scores: Path,
    trials: Path,
    calibration: CalibrationSet,
    model_identity: str,
    dtype: str,
    config: Mapping[str, Any],
    score: Mapping[str, Any],
    budgets: Sequence[str],
    make_scorer: Callable[[], Scorer],
    observer: Observer,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run a search that ends in a mask; what `current.json` says of it, and its counts."""
    method, metric = method_of(score["method"]), metric_of(score["metric"])
    counts = count_parameters(config)
    units = removable_units(int(config["num_hidden_layers"]), score["unit"], score["candidates"])
    fields = {
        name: store_fingerprint(calibration.digest, model_identity, dtype, name)
        for name in sorted({metric.loss, PERPLEXITY.loss})
    }
    search = search_fingerprint(fields[metric.loss], score)
    current = {"kind": "mask", "search": search, "nested": method.nested, "store": fields[metric.loss]}
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
        traces = SearchRun(objective, nll, score, units, counts, observer).traces(
            budgets, lambda name, iteration: write_iteration(trace_directory(scores, current, name), iteration, search)
        )
    done = asdict(objective.counts)
    if nll is not objective:
        done = {key: value + asdict(nll.counts)[key] for key, value in done.items()}
    return current, {"iterations": sum(map(len, traces.values())), **done}


def _plan_transform(
    scores: Path, score: Mapping[str, Any], budgets: Sequence[str], material: Material
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Find what a transformation does for each budget; what `current.json` says of it, and what was computed."""
    calibration, observer, method = material.calibration, material.observer, score["method"]
    fields = store_fingerprint(calibration.digest, material.model_identity, material.dtype, PERPLEXITY.loss)
    search = search_fingerprint(fields, score)
    current: dict[str, Any] = {"kind": method, "search": search, "nested": False, "store": fields}

    with ExitStack() as stack:
        stack.enter_context(exclusive(material.trials / f"{fingerprint(fields)}.lock", observer))
        store = TrialStore(fields, len(calibration.rows), material.trials)
        stack.callback(store.close)
        dense = Objective(calibration, store, lambda: material.bench.scorer(), observer)
        current["dense_nll"] = dense([DENSE])[0].loss
        for text in budgets:
            path = trace_directory(scores, current, text) / "details.json"
            observer.begin(f"{method} for {text}")
            is_known = path.exists()
            if not is_known:
                write_json(path, PLANNERS[method](parse_budget(text, material.counts), score["options"], material))
            found = {key: value for key, value in read_json(path).items() if key != "nll"}
            observer.end(", ".join(f"{key} {value}" for key, value in found.items()), cached=is_known)
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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = open(path, "a+")  # noqa: SIM115
    except OSError as error:
        raise storage_error(path, error) from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            holder = handle.read().strip() or "unknown"
            observer.note(f"process {holder} computes the same trials; waiting for it, then reusing them")
            fcntl.flock(handle, fcntl.LOCK_EX)
        handle.seek(0)
        handle.truncate()
        handle.write(str(os.getpid()))
        handle.flush()
        yield
