"""A run of a method: its trials, traces and counts, whichever kind of method it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from blockpruner.core.blocks import DENSE, removable_units
from blockpruner.core.budgets import (
    Resources,
    parse_budget,
    require_reachable,
    resources_of,
)
from blockpruner.core.errors import InputError
from blockpruner.core.progress import Observer
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.methods.planning import PLANNERS, Bench, Material
from blockpruner.methods.transforms import TRANSFORMS
from blockpruner.scoring.metrics import NLL, metric_of
from blockpruner.scoring.objectives import Objective
from blockpruner.scoring.scorers import LazyScorer
from blockpruner.scoring.work import Scorer
from blockpruner.search import method_of, search_settings
from blockpruner.search.run import UNTIMED, SearchRun
from blockpruner.search.trace import search_fingerprint, seed_stores, trace_directory, write_current, write_iteration
from blockpruner.store.files import read_json, write_json
from blockpruner.store.locks import hold, this_process
from blockpruner.store.provenance import fingerprint
from blockpruner.store.trials import TrialStore, require_rows, store_fingerprint


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
    scorer: Scorer,
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
        scorer: for a method that ends in a mask; its owner closes it.
        make_bench: loads the model, for a method that changes weights.
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
            scores, trials, calibration, model_identity, dtype, resources, score, budgets, scorer, observer, known
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
    scorer: Scorer,
    observer: Observer,
    latency: Mapping[str, Any] | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run a search that ends in a mask; what `current.json` says of it, and its counts."""
    method, metric = method_of(score["method"]), metric_of(score["metric"])
    units = removable_units(len(resources["parameters"].blocks) // 2, score["unit"], score["candidates"])
    fields = {
        name: store_fingerprint(calibration.digest, model_identity, dtype, name)
        for name in sorted({metric.key, NLL.key})
    }
    priced = {"latency": latency} if score["options"].get("per") == "latency" else {}
    search = search_fingerprint(fields[metric.key], {**score, **priced})
    current = {
        "kind": "mask", "search": search, "nested": method.nested, "store": fields[metric.key], "latency": latency
    }  # fmt: skip
    with ExitStack() as stack:
        stores = {}
        for name, field in fields.items():  # in one order everywhere, so that two processes cannot wait for each other
            stack.enter_context(exclusive(trials / f"{fingerprint(field)}.lock", observer))
            stores[name] = TrialStore(field, len(calibration.rows), trials)
            stack.callback(stores[name].close)
        own, plain = stores[metric.key], stores[NLL.key]
        seeded = seed_stores(scores / search, search, own, plain, influence=metric.influence)
        for problem in [*seeded, *(line for store in stores.values() for line in store.problems)]:
            observer.note(f"warning: {problem}")
        observer.note(f"calibration: {len(calibration.rows)} rows, {calibration.tokens} tokens; search {search}")
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
    fields = store_fingerprint(calibration.digest, material.model_identity, material.dtype, NLL.key)
    search = search_fingerprint(fields, score)
    current: dict[str, Any] = {"kind": method, "search": search, "nested": False, "store": fields, "latency": latency}
    with ExitStack() as stack:
        stack.enter_context(exclusive(material.trials / f"{fingerprint(fields)}.lock", observer))
        store = TrialStore(fields, len(calibration.rows), material.trials)
        stack.callback(store.close)
        dense = Objective(calibration, store, LazyScorer(lambda: material.bench.scorer()), observer)
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


@contextmanager
def exclusive(path: Path, observer: Observer) -> Iterator[None]:
    """Hold a lock file; while another process computes the same trials, say so and wait for it."""

    def busy(holder: str) -> None:
        observer.note(f"process {holder} computes the same trials; waiting for it, then reusing them")

    with hold(path, this_process(), busy):
        yield
