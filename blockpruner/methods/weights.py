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
class Left:
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
    left: Callable[[Details, Config], Left],
    apply_: Callable[[PreTrainedModel, Plan, Rows], PreTrainedModel],
    identity: Callable[[Plan, str], dict[str, Any]] = Kind.identity,
    options: type[Options] = Options,
    version: int = 1,
    **others: Any,
) -> Kind:
    """A kind of method that searches no mask; `name` is its `score.method`, and `others` are fields
    of `Kind`. The `version` is raised when the method plans something else for the same budget, or
    makes other weights of a plan."""
    score, commit = partial(_score, name, options, plan, version), partial(_commit, left)
    others["identity"] = lambda plan, rows: {**identity(plan, rows), "version": version}
    others["pruned"] = lambda plan, config: left(plan.details, config).pruned
    return Kind(name, title, score, commit, apply_, options=options, **others)


def _score(
    name: str, options: type[Options], plan: Planner, version: int, job: Job
) -> tuple[Current, Counts]:
    """Find the details for each budget; and the dense model's NLL, where a method measures that of
    a pruned one."""
    from blockpruner.scoring.engine import Engine

    chosen, nll, is_measured = read_options(name, options, job.score.options), None, False
    loss, observer = NLL.name, job.material.observer
    fields = {
        "method": name,
        "metric": job.score.metric,
        "options": chosen.model_dump(),
        "version": version,
    }
    current = job.current(
        name, search_fingerprint(job.store_fields(loss), fields), False, chosen, loss
    )
    with (
        job.stores([loss]) as stores,
        closing(LazyScorer(lambda: Engine(job.material.dense()))) as scorer,
    ):
        find, counts = plan(chosen, job), Counts()
        for text in job.budgets:
            path = trace_directory(job.folder, current, text) / "details.json"
            observer.begin(f"{name} for {text}")
            known, started = read_kept_json(path, observer.note), time.monotonic()
            found = known or find(parse_budget(text, job.resources["parameters"]))
            if known is None:
                write_sealed_json(
                    path.with_name(TOOK), {"took": [0, 0, round(time.monotonic() - started, 2)]}
                )
                write_sealed_json(path, found)
            is_measured |= "nll" in found
            words = (
                f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
                for key, value in found.items()
                if key not in ("nll", "channels")
            )
            observer.end(", ".join(words), cached=known is not None)

        def dense() -> tuple[float, Counts]:
            objective = Objective(job.calibration, stores[loss], scorer, observer)
            return objective([DENSE])[0].loss, objective.counts

        if is_measured:
            nll, counts = in_one_origin(dense, observer)
    return replace(current, dense_nll=nll), counts


def _commit(
    left: Callable[[Details, Config], Left],
    scores: Path,
    config: Config,
    budget: str,
    current: Current,
) -> tuple[Plan, Sequence[Path]]:
    """The plan for a budget from the details that were found for it."""
    details = read_json(trace_directory(scores, current, budget) / "details.json", sealed=True)
    found, nll, dense = left(details, config), details.pop("nll", None), current.dense_nll
    known = dense and perplexity(dense), perplexity(math.fsum(nll) / len(nll)) if nll else None
    return (
        make_plan(current, budget, config, perplexities=known, details=details, **vars(found)),
        [],
    )
