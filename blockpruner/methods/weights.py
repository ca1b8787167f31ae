"""Methods that search no mask: their details are found first and kept in a file, then become a
plan.

Details are JSON that only the method itself reads: merges, or widths. A subclass in the method's
own folder decides how they are applied to weights.
"""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blockpruner.core.blocks import DENSE, Mask
from blockpruner.core.budgets import Budget, parse_budget
from blockpruner.core.errors import InputError
from blockpruner.core.families import Config
from blockpruner.core.markdown import code
from blockpruner.core.options import read_options
from blockpruner.core.plan import Plan
from blockpruner.methods.kind import Job, Kind, make_plan
from blockpruner.scoring.metrics import NLL, perplexity
from blockpruner.scoring.objectives import Counts, Objective, in_one_origin
from blockpruner.scoring.scorers import LazyScorer
from blockpruner.search.trace import TOOK, Current, search_fingerprint, trace_directory
from blockpruner.store.files import read_json, read_kept_json, write_sealed_json

Details = Mapping[str, Any]
"""What a method will do, as JSON. Under "nll" it may hold the mean NLL of each calibration row in
the pruned model."""


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


class WeightsKind(Kind):
    """A kind of method that searches no mask: a subclass plans details for each budget."""

    version = 1
    """Raised when the method plans something else for the same budget, or makes other weights of a
    plan."""

    @abstractmethod
    def planner(self, options: Any, job: Job) -> Callable[[Budget], Details]:
        """The function that finds what to do for a budget; it raises InputError if nothing meets
        the budget. The options are of the kind's own type."""

    @abstractmethod
    def removed(self, details: Details, config: Config) -> Removed:
        """What a model loses by these details."""

    def facts(self, plan: Plan, rows: str) -> dict[str, Any]:
        """As `identity`, without the version."""
        return {**plan.details, "rows": rows}

    def identity(self, plan: Plan, rows: str) -> dict[str, Any]:
        return {**self.facts(plan, rows), "version": self.version}

    def pruned_parameters(self, plan: Plan, config: Config) -> int | None:
        return self.removed(plan.details, config).pruned

    def score(self, job: Job) -> tuple[Current, Counts]:
        """Find the details for each budget. If they hold the NLL of the pruned model, that of the
        dense model is measured, too."""
        from blockpruner.scoring.engine import Engine

        options = read_options(self.name, self.options, job.score.options)
        loss = NLL.name
        observer = job.material.observer
        fields = {
            "method": self.name,
            "metric": job.score.metric,
            "options": options.model_dump(),
            "version": self.version,
        }
        search = search_fingerprint(job.store_fields(loss), fields)
        current = job.current(self.name, search, False, options, loss)
        dense_nll, counts = None, Counts()
        measures_nll = False
        with (
            job.stores([loss]) as stores,
            closing(LazyScorer(lambda: Engine(job.material.dense()))) as scorer,
        ):
            details_for = self.planner(options, job)
            for text in job.budgets:
                path = trace_directory(job.folder, current, text) / "details.json"
                observer.begin(f"{self.name} for {text}")
                stored = read_kept_json(path, observer.note)
                if stored is not None:
                    details = stored
                else:
                    started = time.monotonic()
                    details = details_for(parse_budget(text, job.resources["parameters"]))
                    seconds = round(time.monotonic() - started, 2)
                    write_sealed_json(path.with_name(TOOK), {"took": [0, 0, seconds]})
                    write_sealed_json(path, details)
                measures_nll |= "nll" in details
                observer.end(_words(details), cached=stored is not None)

            def measure_dense() -> tuple[float, Counts]:
                objective = Objective(job.calibration, stores[loss], scorer, observer)
                return objective([DENSE])[0].loss, objective.counts

            if measures_nll:
                dense_nll, counts = in_one_origin(measure_dense, observer)
        return replace(current, dense_nll=dense_nll), counts

    def commit(
        self, scores: Path, config: Config, budget: str, current: Current
    ) -> tuple[Plan, Sequence[Path]]:
        path = trace_directory(scores, current, budget) / "details.json"
        details = dict(read_json(path, sealed=True))
        row_nll = details.pop("nll", None)
        removed = self.removed(details, config)
        dense_perplexity = current.dense_nll and perplexity(current.dense_nll)
        pruned_perplexity = perplexity(math.fsum(row_nll) / len(row_nll)) if row_nll else None
        plan = make_plan(
            current,
            budget,
            config,
            perplexities=(dense_perplexity, pruned_perplexity),
            details=details,
            **vars(removed),
        )
        return plan, []

    def method_words(self, plan: Plan, unit: str) -> str:
        return plan.method

    def removed_words(self, plan: Plan) -> str:
        return f"{plan.ratio:.1%} of the parameters"

    def card_words(self, plan: Plan) -> str:
        return f"with weights changed by {code(plan.method)}"


def _words(details: Details) -> str:
    """The details that are short enough for a line of progress."""
    words = []
    for key, value in details.items():
        if key not in ("nll", "channels"):
            words.append(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}")
    return ", ".join(words)
