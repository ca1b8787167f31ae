"""A search from start to stop: over its objective, until every budget is settled, each iteration written at once.

Decides when a search may stop and what a run of it counts. What is considered in an iteration is the method's
decision, what a trial is the store's.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from blockpruner.blocks import DENSE, Mask, format_mask, removable_units
from blockpruner.budgets import is_settled, parse_budget, require_reachable
from blockpruner.calibration import CalibrationSet
from blockpruner.families import ParameterCounts, count_parameters
from blockpruner.progress import Observer
from blockpruner.provenance import fingerprint
from blockpruner.scoring.accelerate import Selection, accelerate, settings_of
from blockpruner.scoring.objectives import Objective
from blockpruner.scoring.work import Scorer
from blockpruner.search import search_of
from blockpruner.search.iteration import Iteration
from blockpruner.search.trace import search_fingerprint, seed_store, write_current, write_iteration
from blockpruner.tables import storage_error, write_json
from blockpruner.trials import TrialStore, require_rows, store_fingerprint


def run_search(
    objective: Objective,
    score: Mapping[str, Any],
    units: Sequence[Mask],
    budgets: Sequence[str],
    counts: ParameterCounts,
    observer: Observer,
    on_iteration: Callable[[Iteration], object] = lambda iteration: None,
) -> list[Iteration]:
    """Run a search until no further removal could change which prefix meets any of the budgets.

    Args:
        score: method, and acceleration with its settings.
        units: what may be removed at once, in tie-break order.
        on_iteration: receives each iteration when it is complete.
    """
    wanted = [parse_budget(text, counts) for text in budgets]
    for budget in wanted:
        require_reachable(budget, units, counts)
    furthest = max((b.ratio or (b.blocks or 0) / len(counts.blocks) for b in wanted), default=1.0)
    trace: list[Iteration] = []
    prefixes: list[Mask] = []
    remaining = list(units)
    known = 0

    def share(mask: Mask) -> float:
        """How much of the way to the furthest budget a mask is, for the progress display."""
        return min(1.0, counts.ratio(mask) / furthest)

    accelerated = accelerate(objective, score)

    def select(index: int, base: Mask, masks: Sequence[Mask]) -> Selection:
        observer.begin(f"iteration {index}", share(prefixes[-1] if prefixes else DENSE))
        return accelerated(index, base, masks)

    search = search_of(score["method"])(select, units)
    while not all(is_settled(budget, prefixes, counts, remaining) for budget in wanted):
        candidates = len(remaining)
        iteration = next(search)
        trace.append(iteration)
        on_iteration(iteration)
        prefixes.append(iteration.removed)
        remaining = [unit for unit in remaining if not unit <= iteration.removed]
        computed, known = objective.counts.rows_computed - known, objective.counts.rows_computed
        best, added = iteration.scores[iteration.chosen], iteration.added[iteration.chosen]
        observer.end(
            f"removed {format_mask(added or DENSE)}, perplexity {best.perplexity:.4f}, "
            f"ratio {counts.ratio(iteration.removed):.4f}; {_considered(iteration, candidates)}",
            [
                {
                    "added": format_mask(unit) if unit else "(dense)",
                    "perplexity": score.perplexity,
                    "nll": score.nll,
                    "rows": f"{score.rows_used}/{score.rows_total}",
                }
                for unit, score in zip(iteration.added, iteration.scores, strict=True)
            ],
            cached=computed == 0,
        )
    return trace


def _considered(iteration: Iteration, candidates: int) -> str:
    """What an iteration spent, and what an audit of it says."""
    scores = [score for score, added in zip(iteration.scores, iteration.added, strict=True) if added is not None]
    complete = sum(score.rows_used == score.rows_total for score in scores)
    text = f"{complete} of {candidates} candidates scored on all rows"
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
    observer: Observer,
    metrics: Path,
) -> list[Iteration]:
    """Score one run far enough for its budgets; write its iteration tables, `current.json` and the counts.

    Args:
        scores: the run's folder of traces; tables present seed the trial store (a clone after `dvc pull`).
        trials: folder of all trial stores.
        score: the run's `score` section, every key of which is part of the search's fingerprint, defaults filled in.
    """
    score = dict(score) | settings_of(score)
    require_rows(len(calibration.rows))
    counts = count_parameters(config)
    units = removable_units(int(config["num_hidden_layers"]), score["unit"], score["candidates"])
    search_of(score["method"])
    store_fields = store_fingerprint(calibration.digest, model_identity, dtype, score["metric"])
    search = search_fingerprint(store_fields, score)
    started = time.monotonic()
    with exclusive(trials / f"{fingerprint(store_fields)}.lock", observer):
        store = TrialStore(store_fields, len(calibration.rows), trials)
        for problem in [*seed_store(scores / search, search, store), *store.problems]:
            observer.note(f"warning: {problem}")
        observer.note(f"calibration: {len(calibration.rows)} rows, {calibration.tokens} tokens; search {search}")
        objective = Objective(calibration, store, make_scorer, observer)
        try:
            trace = run_search(
                objective, score, units, budgets, counts, observer,
                lambda iteration: write_iteration(scores / search, iteration, search),
            )  # fmt: skip
        finally:
            objective.close()
            store.close()
    facts = {"rows": len(calibration.rows), "tokens": calibration.tokens, "digest": calibration.digest}
    write_current(scores, {"search": search, "store": store_fields, "score": dict(score), "calibration": facts})
    done = asdict(objective.counts)
    done["tokens_per_second"] = round(done["tokens"] / done["seconds"], 1) if done["seconds"] else None
    done["seconds"] = round(done["seconds"], 2)
    write_json(metrics, {"iterations": len(trace), "wall_seconds": round(time.monotonic() - started, 2), **done})
    return trace


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
