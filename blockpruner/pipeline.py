"""The way through the house: `run` makes a pruned model, from its texts to its checkpoints.

    calibrate -> check -> score -> commit -> heal -> train -> export

Command and API call `run`. A stage of the DAG calls one step of the same run, and a study calls
several; two further steps belong to the stages alone: `evaluation.suite` measures, and
`reporting.report` writes the page. What lies where is decided by a `Workspace`. Torch is loaded by
the steps that compute."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockpruner import splits
from blockpruner.checkpoints.output import Output
from blockpruner.config.sections import Run, Target, score_of
from blockpruner.core.errors import InputError
from blockpruner.core.families import Config
from blockpruner.core.plan import Plan
from blockpruner.core.progress import Observer
from blockpruner.core.settings import Model, Runtime
from blockpruner.evaluation.kinds import Loss
from blockpruner.healing.settings import Compensate, Train
from blockpruner.inputs.checkpoints import checkpoint_identity, checkpoint_weights
from blockpruner.methods.kind import Material
from blockpruner.methods.recipes import (
    compensation,
    is_judged,
    proposals,
    require_reached,
    searches,
)
from blockpruner.methods.registry import KINDS, kind_of_method
from blockpruner.methods.score import score_run
from blockpruner.scoring.settings import Score
from blockpruner.search.trace import Current, search_cost, trace_directory
from blockpruner.splits import Pool, Rows
from blockpruner.store.files import read_json
from blockpruner.store.manifest import COMPENSATE_FACTS, HEALED_PLAN, TRAIN_FACTS
from blockpruner.store.plans import load_plan
from blockpruner.store.provenance import fingerprint
from blockpruner.versions import PLAN_VERSION, SCORE_VERSION, SEARCH_VERSION, WEIGHTS_VERSION
from blockpruner.workspace import Dense, Workspace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from blockpruner.healing.choice import Healing
    from blockpruner.methods.apply import Pruning

MEMORY_ADVICE = {
    "search": "score with streaming",
    "refit": "leave it out (compensate none)",
    "training": "train adapters (lora)",
}
"""How a step takes less memory."""


@dataclass(frozen=True)
class Outcome:
    """A pruned model, as `run` leaves it."""

    pruning: Pruning
    """Its plan and its healed weights."""
    compensation: Mapping[str, Any]
    """The facts of its compensation, with the name of its search."""
    search_folder: Path
    """The iteration tables of its search."""
    counts: Mapping[str, Mapping[str, Any]]
    """By search, what was computed."""
    perplexity: Mapping[str, Mapping[str, float]]
    """The perplexity of texts set aside, by what was done: before and after."""


def has_judges(settings: Run, max_loss: float | None) -> bool:
    """Whether rows judge the model of a run, and its texts have to be in the pool."""
    method = compensation(settings.compensate.method, settings.score.method)
    return is_judged(settings.score.method, method) or max_loss is not None


def run(
    settings: Run,
    budget: str,
    dense: Dense,
    pool: Pool,
    workspace: Workspace,
    *,
    max_loss: float | None = None,
    output: Output | None = None,
) -> Outcome:
    """Prune a model: the whole way, which every door takes.

    1. Draw the rows: those of the search, of the fit, of training, and those that judge.
    2. Refuse what no later step could finish, before a search that may take hours.
    3. Search, compensate the proposals, and keep the best by the rows that judge.
    4. Train, where the settings ask for it.
    5. Write the checkpoints to `output`.

    A piece of work that the workspace holds is not done again. Of equal runs at the same time one
    computes, and the others wait for it.

    Raises:
        InputError: texts, budget, memory or folders that do not suffice, before the search; a model
            of which a kind of text has lost more than `max_loss`, before its checkpoint.
    """
    # 1. Rows
    rows = splits.calibrate(
        settings.calibration,
        settings.compensate,
        settings.train,
        pool,
        dense.tokenizer,
        dense.config,
        workspace.note,
        judged=has_judges(settings, max_loss),
        at_most=True,
    )
    # 2 and 3. Checks, search and compensation, unless the workspace holds their result
    key = work_key(settings, rows, dense, budget)
    search_folder, compensated = workspace.searches(key), workspace.compensated(key)
    with workspace.alone(key, "searches and fits the same"):
        counts = _search_and_heal(settings, budget, dense, rows, workspace, key, output)
    facts = read_json(compensated / COMPENSATE_FACTS)
    # The name of a checkpoint and training are no part of the key: both reuse the same fit.
    target = output.path.name if output else ""
    is_trained = settings.train is not None
    plan = replace(load_plan(compensated / HEALED_PLAN), target=target, train=is_trained)
    pruning = _healed(dense, plan, rows, compensated)
    perplexity = {}
    if "perplexity" in facts:
        perplexity["compensated"] = facts["perplexity"]
    # 4. Training
    if settings.train is not None:
        folder = _train(settings.train, pruning, rows, workspace)
        pruning = _healed(dense, plan, rows, folder)
        if pruning.healed and "training" in pruning.healed.perplexity:
            perplexity["trained"] = pruning.healed.perplexity["training"]
    # 5. Checkpoints
    require_kept(pruning.plan, max_loss)
    if output is not None:
        write_checkpoints(pruning, output, workspace)
    return Outcome(pruning, facts, search_folder, counts, perplexity)


def _search_and_heal(
    settings: Run,
    budget: str,
    dense: Dense,
    rows: Rows,
    workspace: Workspace,
    key: str,
    output: Output | None,
) -> dict[str, dict[str, Any]]:
    """Make the compensated model, unless the workspace holds it. Returns what each search
    computed."""
    from blockpruner.healing import choice

    method = compensation(settings.compensate.method, settings.score.method)
    search_folder, compensated = workspace.searches(key), workspace.compensated(key)
    is_kept = workspace.is_whole(compensated, HEALED_PLAN, COMPENSATE_FACTS)
    plan = load_plan(compensated / HEALED_PLAN) if is_kept else None
    # A folder in the way is refused now, not after hours of search.
    if output is not None:
        output.require_free(plan and replace(plan, train=settings.train is not None))
    if not is_kept:
        check(
            rows,
            dense.config,
            dense.dtype,
            workspace.runtime,
            settings.score,
            settings.compensate,
            method,
            settings.train,
            budget,
        )
    with dense.open(workspace) as material:
        time_generation = None
        # A measurement is kept under the identity of a model's files, which one in memory has not.
        if dense.folder is not None:
            time_generation = partial(
                latency,
                material,
                search_folder,
                dense.folder,
                settings.model,
                settings.score,
                workspace.runtime,
            )
        # Searches that are kept are read again: their counts are part of the outcome.
        counts = score(material, rows, settings.score, [budget], search_folder, time_generation)
        if not is_kept:
            proposed = commit(
                search_folder,
                settings.score,
                dense.config,
                budget,
                rows,
                target="",
                run=dense.title,
                compensate=method,
                dense=dense.folder,
            )
            material.scorer.close()  # a model of its own, or states that it keeps, would take room
            best = heal(material.dense, proposed, rows, workspace.observer)
            data = settings.compensate.data or settings.calibration.data
            choice.keep(compensated, best, dense.pruning(best.plan, rows.search), data)
    return counts


def work_key(settings: Run, rows: Rows, dense: Dense, budget: str) -> str:
    """The fingerprint of all that decides the compensated model."""
    splits = (rows.search, rows.fit, rows.tuning, rows.judge)
    facts = settings.model_dump(
        mode="json", include={"score": True, "compensate": True, "model": {"dtype"}}
    )
    facts |= {
        "method": compensation(settings.compensate.method, settings.score.method),
        "base": dense.identity,
        "rows": [*(split.digest for split in splits), *rows.judge.kinds],
        "budget": budget,
        "version": [SCORE_VERSION, SEARCH_VERSION, PLAN_VERSION, WEIGHTS_VERSION],
    }
    return fingerprint(facts)


def _healed(dense: Dense, plan: Plan, rows: Rows, folder: Path) -> Pruning:
    """The model of a plan with the healed weights of a folder, if it has any."""
    from blockpruner.methods.healed import find_healed

    pruning = dense.pruning(plan, rows.search)
    healed = find_healed([folder], pruning.identity)
    return replace(pruning, healed=healed, plan=healed.plan(plan) if healed else plan)


def _train(settings: Train, pruning: Pruning, rows: Rows, workspace: Workspace) -> Path:
    """The folder of the trained weights, which is made unless the workspace holds it."""
    facts = {
        "of": pruning.identity,
        "since": pruning.healed and pruning.healed.digest,
        "rows": [rows.train.digest, rows.validation.digest],
        "recipe": settings.model_dump(mode="json"),
        "version": WEIGHTS_VERSION,
        "judge": rows.judge.digest,
    }
    key = fingerprint(facts)
    folder = workspace.trained(key)
    with workspace.alone(key, "trains the same"):
        if not workspace.is_whole(folder, TRAIN_FACTS):
            train(pruning, settings, rows, workspace.training_states, folder, workspace.observer)
    return folder


def write_checkpoints(pruning: Pruning, output: Output, workspace: Workspace) -> None:
    """Write the formats of an output that are not there yet."""
    with workspace.alone(fingerprint({"out": str(output.path)}), f"writes {output.path}"):
        # Asked while the lock is held: an equal run may have written them meanwhile.
        missing = output.missing(pruning)
        dtype = output.dtype or pruning.dtype
        export(replace(pruning, dtype=dtype), missing, output.quantizations)


def require_room(
    config: Config,
    dtype: str,
    runtime: Runtime,
    score: Score,
    compensate: str,
    train: Train | None,
    budget: str,
) -> None:
    """Refuse, before a search, a run for which a GPU has too little memory. Devices of workers, and
    a model that is split over several, are not counted."""
    from blockpruner.healing.memory import step_bytes
    from blockpruner.model import accelerator
    from blockpruner.model.models import resolve_device

    if runtime.device == "split" or runtime.executor != "local":
        return
    device = resolve_device(runtime.device)
    # A CPU can swap, and what else its processes will take is not known.
    if device.type == "cpu":
        return
    room = accelerator.total_memory(device)
    for step, size in step_bytes(config, dtype, score, compensate, train, budget).items():
        # Streaming holds one layer at a time, for the search alone.
        if size <= room or (step == "search" and runtime.streaming):
            continue
        raise InputError(
            f"{step} takes {size / 2**30:.1f} GiB of memory at least, and {device} has"
            f" {room / 2**30:.1f}; {MEMORY_ADVICE[step]}, or choose a larger device or the CPU",
            rule="too-large",
            key="device",
            value=str(device),
        )


def require_fit(rows: Rows, compensate: Compensate, method: str) -> None:
    """Refuse, before a search, a compensation without a row to fit to and another to check on."""
    if method != "none" and not rows.fit.rows:
        raise InputError(
            f"compensate {method} is fitted to rows of {compensate.seq_len} tokens and checked on"
            " others, and the texts do not fill two; give more texts, or compensate: none",
            rule="too-few-rows",
            key="compensate",
        )


def check(
    rows: Rows,
    config: Config,
    dtype: str,
    runtime: Runtime,
    score: Score,
    compensate: Compensate,
    method: str,
    train: Train | None,
    budget: str,
) -> None:
    """Refuse, before a search, what no later step could finish: a budget that no search reaches,
    too few rows to compensate by `method`, too little memory for a step. Raises InputError."""
    require_reached(score, config, budget)
    require_fit(rows, compensate, method)
    require_room(config, dtype, runtime, score, method, train, budget)


def check_targets(
    rows: Rows,
    config: Config,
    runtime: Runtime,
    run: Run,
    targets: Iterable[Target],
    method: str,
) -> None:
    """Check those of a run's targets that the search by `method` serves. Raises InputError."""
    for target in targets:
        if (target.method or run.score.method) == method:
            check(
                rows,
                config,
                run.model.dtype,
                runtime,
                score_of(run, method),
                run.compensate,
                target.compensate or compensation(run.compensate.method, method),
                run.train if target.train else None,
                target.budget,
            )


def require_kept(plan: Plan, max_loss: float | None) -> None:
    """Refuse, before it is written, a model of which a kind of text has lost more than
    `max_loss`."""
    if max_loss is None or not plan.kinds:
        return
    loss = Loss.of(plan.kinds)
    if loss.worst > max_loss:
        enough = math.ceil(100 * loss.worst) / 100
        raise InputError(
            f"{loss}: more than --max-loss {max_loss:g}, so nothing is written; all work is kept:"
            f" run again with --max-loss {enough:.2f}, or a smaller budget",
            rule="too-much-lost",
            key="max_loss",
            value=max_loss,
        )


def score(
    material: Material,
    rows: Rows,
    score: Score,
    budgets: Sequence[str],
    folder: Path,
    latency: Callable[[], Mapping[str, Any]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Search far enough for the budgets, by every search of the recipe.

    Each search leaves its tables at `folder`/<its name>. `latency` and the values by search are
    those of `methods.score.score_run`. Raises InputError for settings or budgets that cannot be
    met, before anything is computed."""
    budgets_by_search: dict[str, list[str]] = {}
    for budget in budgets:
        require_reached(score, material.config, budget)
        for name in _competing(score, material.config, budget, rows):
            budgets_by_search.setdefault(name, []).append(budget)
    counts = {}
    for number, (name, reached) in enumerate(budgets_by_search.items(), 1):
        if len(budgets_by_search) > 1:
            material.observer.note(f"search {number} of {len(budgets_by_search)}: {name}")
        search = searches(score)[name]
        # Channels are chosen by the fit that follows, so on its rows.
        is_fitted = kind_of_method(search.method).uses_fit_rows and len(rows.fit.rows) > 1
        scored_rows = rows.fit if is_fitted else rows.search
        counts[name] = score_run(material, scored_rows, search, reached, folder / name, latency)
    return counts


def latency(
    material: Material, folder: Path, dense: Path, model: Model, score: Score, runtime: Runtime
) -> Mapping[str, Any]:
    """The time of generation and of each block, as `score` asks for it. It is kept at `folder`, and
    for all runs in the folder of trials."""
    from blockpruner.evaluation.latency import kept_latency

    assert material.trials is not None
    return kept_latency(
        folder, material.trials, dense, model, score.latency, runtime, material.observer
    )


def _competing(score: Score, config: Config, budget: str, rows: Rows) -> list[str]:
    """The searches that propose plans for a budget. Only the first does if no row judges them."""
    names = list(proposals(score, config, budget))
    return names if rows.judge.rows else names[:1]


@dataclass(frozen=True)
class Proposal:
    """A plan that a search proposes for a budget."""

    name: str
    """The name of the search in its recipe."""
    plan: Plan
    tables: Sequence[Path] = field(default=(), compare=False)
    """The iteration tables that it used, in order."""
    cost: Mapping[str, float] = field(default_factory=dict, compare=False)
    """What its search took; empty if a table has no record of it."""


def total_cost(proposals: Sequence[Proposal]) -> dict[str, float]:
    """What the searches of all proposals took; empty if a table has no record of it."""
    if not all(proposal.cost for proposal in proposals):
        return {}
    names = proposals[0].cost
    return {name: round(sum(proposal.cost[name] for proposal in proposals), 2) for name in names}


def commit(
    folder: Path,
    score: Score,
    config: Config,
    budget: str,
    rows: Rows,
    *,
    target: str,
    run: str,
    compensate: str,
    train: bool = False,
    dense: Path | None = None,
) -> list[Proposal]:
    """The plan of each search of the recipe for a budget, from the folder as `score` left it.

    Several are judged by `heal`. With the folder of the `dense` model the plans name it by its
    content. Raises InputError if the budget cannot be met, or a file of a search is missing or
    damaged.
    """
    # What a plan says of its target, beside what the search decided.
    facts: dict[str, Any] = {
        "target": target,
        "run": run,
        "compensate": compensate,
        "train": train,
    }
    if dense is not None:
        facts |= {"base": checkpoint_identity(dense), "weights": checkpoint_weights(dense)}
    proposed = []
    for name in _competing(score, config, budget, rows):
        current = Current.load(folder / name)
        plan, tables = KINDS[current.kind].commit(folder / name, config, budget, current)
        cost = search_cost(tables, trace_directory(folder / name, current, budget))
        proposed.append(Proposal(name, replace(plan, **facts), tables, cost))
    return proposed


def heal(
    dense: Callable[[], PreTrainedModel],
    proposed: Sequence[Proposal],
    rows: Rows,
    observer: Observer,
) -> Healing:
    """Compensate each proposal as its plan asks, and keep the best by the rows that judge; see
    `choice.choose`."""
    from blockpruner.healing.choice import choose

    plans = {proposal.name: proposal.plan for proposal in proposed}
    return choose(dense, plans, rows.fit, rows.tuning, rows.judge, rows.search, observer)


def train(
    pruning: Pruning,
    train: Train,
    rows: Rows,
    states: Path,
    out: Path,
    observer: Observer,
) -> None:
    """Train the model of a plan from its compensated weights on; weights and facts are at `out`. A
    killed training continues from its `states`."""
    from blockpruner.healing.train import write_trained

    validation = rows.validation if rows.validation.rows else None
    write_trained(out, pruning, train, rows.train, validation, states, observer, rows.judge)


def export(
    pruning: Pruning,
    folders: Mapping[str, Path],
    quantizations: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Write verified checkpoints of a plan's model, a new folder for each format.

    Args:
        quantizations: types of further, quantized files, by format.

    Raises:
        InputError: one of the folders is not empty, before anything is written; or a format cannot
            hold the model, and its folder is not written.
    """
    from blockpruner.checkpoints.registry import EXPORTS
    from blockpruner.store.files import require_free

    # All folders first: none of the checkpoints is written if one is in the way.
    for folder in folders.values():
        require_free(folder)
    for form, folder in folders.items():
        write: Any = EXPORTS[form].write
        types = tuple((quantizations or {}).get(form, ()))
        if types:
            write(pruning, folder, quantizations=types)
        else:
            write(pruning, folder)


def exported(form: str, folder: Path) -> dict[str, Any]:
    """Facts on a checkpoint: format, path, `for` (the engines that load it), verified,
    verified_by."""
    from blockpruner.checkpoints.registry import engines_of
    from blockpruner.store.files import read_json
    from blockpruner.store.manifest import REPORT_FILE

    engines = engines_of(form, folder)
    # A format of another package may write no report.
    has_report = (folder / REPORT_FILE).exists()
    report = read_json(folder / REPORT_FILE) if has_report else {}
    return {
        "format": form,
        "path": str(folder),
        "for": engines,
        "verified": bool(report.get("ok")),
        "verified_by": report.get("engine", ", ".join(engines)),
    }
