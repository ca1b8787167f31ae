"""Methods that search no mask: their details are found first and kept in a file, then become a
plan.

Details are JSON that only the method itself reads: merges, or widths. How they are applied to
weights is decided in the method's own folder.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockpruner.core.blocks import DENSE, Mask
from blockpruner.core.budgets import Budget, parse_budget
from blockpruner.core.errors import InputError
from blockpruner.core.families import Config
from blockpruner.core.options import Options, read_options
from blockpruner.core.plan import Plan
from blockpruner.methods.kind import Job, Kind, make_plan
from blockpruner.scoring.metrics import NLL, perplexity
from blockpruner.scoring.objectives import Counts, Objective, in_one_origin
from blockpruner.scoring.scorers import LazyScorer
from blockpruner.scoring.work import Rows
from blockpruner.search.trace import TOOK, Current, search_fingerprint, trace_directory
from blockpruner.store.files import read_json, read_kept_json, write_sealed_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Details = dict[str, Any]
"""What a method will do, as JSON. Under "nll" it may hold the mean NLL of each calibration row in
the pruned model."""

Planner = Callable[[Any, Job], Callable[[Budget], Details]]
"""From the method's own options, finds what to do for budgets. Raises InputError where nothing
meets one."""


@dataclass(frozen=True)
class Removed:
    """What a model loses by a plan's details."""

    gone: Mask = DENSE
    """Blocks that it does without."""
    pruned: int | None = None
    """Its parameters, where `gone` does not say how many are left."""
    order: tuple[str, ...] = ()
    """The steps, in words."""


def share_of(budget: Budget, method: str) -> float:
    """The share of all parameters that a budget asks for; raises InputError for any other
    budget."""
    if budget.ratio is None or budget.resource != "parameters":
        raise InputError(
            f"budget {budget.text!r} is met by removing blocks, and {method} removes none; give a"
            ' share of all parameters ("0.22")'
        )
    return budget.ratio


def weights_kind(
    name: str,
    title: str,
    *,
    plan: Planner,
    removed: Callable[[Details, Config], Removed],
    apply_: Callable[[PreTrainedModel, Plan, Rows], PreTrainedModel],
    identity: Callable[[Plan, str], dict[str, Any]] = Kind.identity,
    options: type[Options] = Options,
    version: int = 1,
    **others: Any,
) -> Kind:
    """A kind of method that searches no mask; `name` is its `score.method`, and `others` are fields
    of `Kind`. The `version` is raised when the method plans something else for the same budget, or
    makes other weights of a plan."""
    score, commit = partial(_score, name, options, plan, version), partial(_commit, removed)
    others["identity"] = lambda plan, rows: {**identity(plan, rows), "version": version}
    others["pruned"] = lambda plan, config: removed(plan.details, config).pruned
    return Kind(name, title, score, commit, apply_, options=options, **others)


def _score(
    name: str, options: type[Options], plan: Planner, version: int, job: Job
) -> tuple[Current, Counts]:
    """Find the details for each budget; and the dense model's NLL, where a method measures that of
    a pruned one."""
    from blockpruner.scoring.engine import Engine

    method_options = read_options(name, options, job.score.options)
    loss = NLL.name
    observer = job.material.observer
    fields = {
        "method": name,
        "metric": job.score.metric,
        "options": method_options.model_dump(),
        "version": version,
    }
    search = search_fingerprint(job.store_fields(loss), fields)
    current = job.current(name, search, False, method_options, loss)
    dense_nll, counts = None, Counts()
    measures_nll = False
    with (
        job.stores([loss]) as stores,
        closing(LazyScorer(lambda: Engine(job.material.dense()))) as scorer,
    ):
        details_for = plan(method_options, job)
        for text in job.budgets:
            path = trace_directory(job.folder, current, text) / "details.json"
            observer.begin(f"{name} for {text}")
            details = read_kept_json(path, observer.note)
            is_cached = details is not None
            if details is None:
                started = time.monotonic()
                details = details_for(parse_budget(text, job.resources["parameters"]))
                seconds = round(time.monotonic() - started, 2)
                write_sealed_json(path.with_name(TOOK), {"took": [0, 0, seconds]})
                write_sealed_json(path, details)
            measures_nll |= "nll" in details
            observer.end(_words(details), cached=is_cached)

        def measure_dense() -> tuple[float, Counts]:
            objective = Objective(job.calibration, stores[loss], scorer, observer)
            return objective([DENSE])[0].loss, objective.counts

        if measures_nll:
            dense_nll, counts = in_one_origin(measure_dense, observer)
    return replace(current, dense_nll=dense_nll), counts


def _words(details: Details) -> str:
    """The details that are short enough for a line of progress."""
    words = []
    for key, value in details.items():
        if key not in ("nll", "channels"):
            words.append(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}")
    return ", ".join(words)


def _commit(
    removed: Callable[[Details, Config], Removed],
    scores: Path,
    config: Config,
    budget: str,
    current: Current,
) -> tuple[Plan, Sequence[Path]]:
    """The plan for a budget from the details that were found for it."""
    details = read_json(trace_directory(scores, current, budget) / "details.json", sealed=True)
    losses = removed(details, config)
    row_nll = details.pop("nll", None)
    dense_perplexity = current.dense_nll and perplexity(current.dense_nll)
    pruned_perplexity = perplexity(math.fsum(row_nll) / len(row_nll)) if row_nll else None
    plan = make_plan(
        current,
        budget,
        config,
        perplexities=(dense_perplexity, pruned_perplexity),
        details=details,
        **vars(losses),
    )
    return plan, []
