"""Scoring one run far enough for its budgets, whatever kind of method it names."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from blockpruner.core.budgets import parse_budget, resources_of
from blockpruner.core.errors import InputError
from blockpruner.core.families import Config
from blockpruner.core.plan import Plan
from blockpruner.core.progress import Observer
from blockpruner.core.settings import Model, Runtime
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.inputs.checkpoints import checkpoint_identity, require_unchanged
from blockpruner.methods.kind import Job, Material
from blockpruner.methods.registry import check_score, require_budgets
from blockpruner.scoring.scorers import LazyScorer, make_scorer
from blockpruner.scoring.settings import Score
from blockpruner.scoring.work import Scorer
from blockpruner.search.iteration import stabilities
from blockpruner.search.trace import read_trace, trace_directory
from blockpruner.store.files import read_json, remove_temporaries
from blockpruner.store.trials import require_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def open_material(
    checkpoint: Path, model: Model, runtime: Runtime, trials: Path, observer: Observer
) -> Iterator[Material]:
    """A fetched checkpoint as methods use it. Torch is loaded only when something must be computed,
    which raises InputError if the files are not those that were fetched.

    Searches and fits share one model in memory, unless the scorer streams it, lies on Ray workers,
    or has a device that is too small for fits."""
    identity, config = checkpoint_identity(checkpoint), read_json(checkpoint / "config.json")

    @cache
    def dense() -> PreTrainedModel:
        from blockpruner.fitting.offload import load_for_fit
        from blockpruner.model.models import set_threads

        require_unchanged(checkpoint)
        set_threads(runtime.threads)
        return load_for_fit(
            checkpoint, model.dtype, runtime.device, model.trust_remote_code, runtime.attention
        )

    def scorer() -> Scorer:
        from blockpruner.fitting.offload import is_fitted_whole
        from blockpruner.scoring.engine import Engine

        is_in_memory = runtime.executor == "local" and not runtime.streaming
        if is_in_memory and is_fitted_whole(config, model.dtype, runtime.device):
            return Engine(dense(), runtime.batch_tokens)
        require_unchanged(checkpoint)
        return make_scorer(
            checkpoint,
            model.dtype,
            runtime,
            trust_remote_code=model.trust_remote_code,
            note=observer.note,
            advance=observer.advance,
        )

    with closing(LazyScorer(scorer)) as lazy:
        yield Material(identity, model.dtype, config, trials, lazy, dense, observer)


def score_run(
    material: Material,
    calibration: CalibrationSet,
    score: Score,
    budgets: Sequence[str],
    folder: Path,
    latency: Callable[[], Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Score one run far enough for its budgets; write its iteration tables and `current.json` to
    its folder. Returns what was computed and reused, how long it took, and the mean stability of a
    nested search. Raises InputError for settings or budgets that cannot be met, before anything is
    computed. `latency` measures what generation and each block takes (`budgets.resources_of`),
    where a budget is a speed-up or the time prices removals."""
    kind = check_score(score)
    started = time.monotonic()
    require_rows(len(calibration.rows))
    remove_temporaries(folder)
    if not kind.removes_blocks:
        require_budgets(score, material.config, tuple(budgets))
    measured_latency = _known_latency(material.config, score, tuple(budgets), latency)
    resources = resources_of(material.config, measured_latency)
    current, counted = kind.score(
        Job(material, calibration, score, tuple(budgets), folder, resources, measured_latency)
    )
    current.save(folder)
    counts: dict[str, Any] = asdict(counted)
    counts["tokens_per_second"] = (
        round(counts["tokens"] / counts["seconds"], 1) if counts["seconds"] else None
    )
    counts["seconds"] = round(counts["seconds"], 2)
    # Only the steps of a nested search are one sequence, whose choices can be compared.
    if current.nested:
        trace = read_trace(trace_directory(folder, current, ""), current.search)
        by_step = stabilities(trace, str(current.score.options.get("per", "none")))
        comparable = [step for step in by_step if step]
        if comparable:
            counts["rivals"] = fmean(len(step.rivals) for step in comparable)
            counts["kept"] = fmean(step.kept for step in comparable)
    return {**counts, "wall_seconds": round(time.monotonic() - started, 2)}


def taken(results: Mapping[str, Mapping[str, Any]], plan: Plan) -> dict[str, float]:
    """What a plan's searches took by what `score_run` found of each: seconds, and scores asked for
    and computed. Of a nested search it is the part up to the plan's last removal."""
    if not results:
        return {}
    costs = [
        (counts["trials_computed"], counts["trials_reused"], counts["seconds"])
        for counts in results.values()
    ]
    if plan.nested and len(results) == 1:
        (counts,) = results.values()
        # Each step has the sums up to itself.
        steps = counts.get("steps", ())[: len(plan.order)]
        costs = list(steps[-1:]) or costs
    computed, reused, seconds = map(sum, zip(*costs, strict=True))
    return {"seconds": seconds, "trials_asked": computed + reused, "trials_computed": computed}


def headline(counts: Mapping[str, Any]) -> dict[str, float]:
    """What neither the machine nor the stores decide of a result of `score_run`: iterations, masks
    scored on all rows, and the mean stability."""
    figures = {
        "iterations": counts["iterations"],
        "trials": counts["trials_computed"] + counts["trials_reused"],
    }
    return figures | {name: round(counts[name], 4) for name in ("rivals", "kept") if name in counts}


def _known_latency(
    config: Config,
    score: Score,
    budgets: tuple[str, ...],
    latency: Callable[[], Mapping[str, Any]] | None,
) -> Mapping[str, Any] | None:
    """The measurement, where something depends on it; other budgets are checked before it is
    made."""
    resources = resources_of(config)
    limited = {parse_budget(text, resources["parameters"]).resource for text in budgets}
    if "latency" not in limited | {score.options.get("per")}:
        return None
    require_budgets(score, config, budgets)
    if latency is None:
        raise InputError(
            f"budgets {list(budgets)} or score.options.per need a speed-up, and what blocks take of"
            " the time is not known here: the stage score measures it"
        )
    return latency()
