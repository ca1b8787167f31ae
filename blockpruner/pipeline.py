"""The way through the house: one function for each step, called by every door.

    calibrate -> check -> score -> commit -> heal -> train -> export

Decides what a step is made of, and which rows are kept apart: texts on which models are evaluated
or judged are seen by no search, no fit and no training. The doors (stages, command, API, form)
decide where files are kept and what is shown. Torch is loaded by the steps that compute. Two steps
belong to the stages alone: `evaluation.suite` measures, and `reporting.report` writes the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockpruner.core.errors import InputError
from blockpruner.core.families import Config
from blockpruner.core.plan import Plan
from blockpruner.core.progress import Observer
from blockpruner.core.settings import Model, Runtime, Texts
from blockpruner.evaluation.kinds import Loss
from blockpruner.evaluation.settings import Perplexity
from blockpruner.healing.settings import Compensate, Train
from blockpruner.inputs.calibration import (
    CalibrationSet,
    draw,
    draw_rows,
    require_embedded,
    sharing,
)
from blockpruner.inputs.checkpoints import checkpoint_identity, checkpoint_weights
from blockpruner.inputs.settings import Calibration
from blockpruner.inputs.sources import shipped_texts
from blockpruner.inputs.texts import TextKind, by_kind, judging_texts
from blockpruner.methods.kind import Material
from blockpruner.methods.recipes import compensation, proposals, require_reached, searches
from blockpruner.methods.registry import KINDS, kind_of_method
from blockpruner.methods.score import score_run
from blockpruner.scoring.settings import Score
from blockpruner.search.trace import Current, search_cost, trace_directory
from blockpruner.settings import Run, Target, score_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from blockpruner.healing.choice import Healing
    from blockpruner.methods.apply import Pruning

Note = Callable[[str], object]
"""Receives a line for the user."""

NONE = CalibrationSet(())

JUDGING_SHARE = 8
"""One text in 8 of each kind is set aside to judge."""

JUDGING_ROWS, JUDGING_TOKENS = 12, 128
"""The most rows of each kind of text that judge, and their tokens."""

MEMORY_ADVICE = {
    "search": "score with streaming",
    "refit": "leave it out (compensate none)",
    "training": "train adapters (lora)",
}
"""How a step takes less memory."""


@dataclass(frozen=True)
class Pool:
    """The texts that a run draws from, by their use."""

    search: Sequence[str]
    """Calibration texts."""
    fit: Sequence[str] | None = None
    """Texts of the compensation; None: those of the search."""
    train: Sequence[str] | None = None
    judge: Sequence[str] = ()
    """Texts of further kinds that judge. A kind that the fit has, too, is judged by texts of the
    fit."""
    evaluated: Sequence[str] = ()
    """Texts on which models are evaluated."""


@dataclass(frozen=True)
class Rows:
    """Every token row that decides something about a pruned model."""

    search: CalibrationSet
    """The rows on which masks are scored."""
    fit: CalibrationSet = NONE
    """The rows to which weights are fitted."""
    tuning: CalibrationSet = NONE
    """The rows on which the strength of a fit is chosen."""
    judge: CalibrationSet = NONE
    """The rows that choose between proposals and accept a fit, kind after kind. Neither search nor
    fit nor training has seen their texts."""
    train: CalibrationSet = NONE
    validation: CalibrationSet = NONE
    """The rows that choose the best state of training."""

    def save(self, folder: Path, source: str) -> None:
        for split in fields(self):
            getattr(self, split.name).save(folder / f"{split.name}.parquet", source)

    @classmethod
    def load(cls, folder: Path, *names: str) -> Rows:
        """Read the splits of these names, or all."""
        names = names or tuple(split.name for split in fields(cls))
        return cls(**{name: CalibrationSet.load(folder / f"{name}.parquet") for name in names})


def our_judging_texts(load: Callable[[Texts], Sequence[str]], note: Note) -> Sequence[str]:
    """Our own texts, which judge what kinds of text lose that the user's texts do not have.

    Without a network they may be out of reach. Nothing but the judging asks for them here, so the
    run goes on without them, and `note` receives a warning.
    """
    try:
        texts = load(shipped_texts())
    except InputError as error:
        note(f"warning: what other kinds of text lose is not judged: {error}")
        texts = ()
    return judging_texts(texts)


def calibrate(
    calibration: Calibration,
    compensate: Compensate,
    train: Train | None,
    pool: Pool,
    tokenizer: Any,
    config: Config,
    note: Note,
    *,
    judged: bool,
    at_most: bool = False,
) -> Rows:
    """Draw every row of a run; `note` receives what was left out.

    Args:
        judged: whether rows are set aside that judge.
        at_most: whether fewer rows than are asked for will do.

    Raises:
        InputError: the texts are too few; it names how many there are.
    """
    from blockpruner.healing.rows import compensation_rows, training_rows

    context = config.get("max_position_embeddings") or compensate.seq_len
    fit_texts = pool.search if pool.fit is None else pool.fit
    judge, reserved = NONE, set[str]()
    if judged:
        # First of all: no other draw may see these texts, or texts that share a paragraph with
        # them.
        judge, judging = _set_aside(compensate, fit_texts, pool, tokenizer, context, note)
        every_text = {*fit_texts, *pool.search, *(pool.train or ())}
        reserved = judging | sharing(every_text, judging)
    search = draw_rows(
        pool.search,
        tokenizer,
        calibration,
        pool.evaluated,
        note,
        at_most=at_most,
        reserved=reserved,
    )
    try:
        fit, tuning = compensation_rows(
            fit_texts, tokenizer, compensate, pool.evaluated, context, reserved, note
        )
    except InputError:
        # No row comes out. `require_fit` refuses that, where something is compensated at all.
        fit = tuning = NONE
    rows = Rows(search, fit, tuning, judge)
    if train is not None and pool.train is not None:
        trained, validation = training_rows(
            pool.train, tokenizer, train, pool.evaluated, note, at_most=at_most, reserved=reserved
        )
        rows = replace(rows, train=trained, validation=validation or NONE)
    for split in vars(rows).values():
        require_embedded(split.rows, tokenizer, config)
    return rows


def _set_aside(
    compensate: Compensate,
    fit_texts: Sequence[str],
    pool: Pool,
    tokenizer: Any,
    context: int,
    note: Note,
) -> tuple[CalibrationSet, set[str]]:
    """The rows that judge, the same number of each kind, and the texts in them."""
    from blockpruner.evaluation.perplexity import held_out

    evaluated = sharing({*fit_texts, *pool.judge}, pool.evaluated)
    fitted_kinds = _last_of_each_kind(fit_texts, evaluated, compensate.seed)
    texts_by_kind = dict(fitted_kinds)
    for kind, texts in by_kind(pool.judge).items():
        if _title(kind) not in fitted_kinds:
            texts_by_kind[_title(kind)] = texts
    settings = Perplexity(
        seq_len=min(JUDGING_TOKENS, compensate.seq_len, context),
        max_rows=JUDGING_ROWS,
        packing="documents",
    )
    rows, documents, kinds = list[tuple[int, ...]](), set[str](), list[str]()
    for title, texts in texts_by_kind.items():
        unseen = [str(text) for text in texts if text not in evaluated]
        try:
            judging = held_out(tokenizer, unseen, settings)
        except InputError:  # the texts of this kind do not fill one row
            continue
        rows += judging.rows
        documents.update(judging.documents)
        kinds += [title] * len(judging.rows)
    missing = [title for title in fitted_kinds if title not in kinds]
    if not rows:
        note(
            f"warning: {len(fit_texts)} texts are too few to set some aside that judge between"
            " searches: only the first search of the recipe is made"
        )
    elif missing:
        note(
            f"warning: too few texts of {', '.join(missing)} to set some aside: what they lose is"
            " not judged; give more"
        )
    return CalibrationSet(tuple(rows), kinds=tuple(kinds)), documents


def _last_of_each_kind(
    texts: Sequence[str], evaluated: set[str], seed: int
) -> dict[str, list[str]]:
    """The last texts of each kind, by its title, in the order in which texts are drawn. The draws
    of search and fit begin at the other end, so judging leaves their first texts as they are."""
    order = [text for text in draw(texts, None, "all", seed) if text not in evaluated]
    texts_by_kind: dict[str, list[str]] = {}
    for kind, of_kind in by_kind(order).items():
        start = len(of_kind) - len(of_kind) // JUDGING_SHARE
        texts_by_kind.setdefault(_title(kind), []).extend(of_kind[start:])
    return texts_by_kind


def _title(kind: TextKind | None) -> str:
    return kind.name if kind else "texts"


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
    if device.type == "cpu":
        return
    room = accelerator.total_memory(device)
    for step, size in step_bytes(config, dtype, score, compensate, train, budget).items():
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
        is_fitted = kind_of_method(search.method).of_fit and len(rows.fit.rows) > 1
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
    processes: int = 1,
) -> None:
    """Train the model of a plan from its compensated weights on; weights and facts are at `out`. A
    killed training continues from its `states`. The processes, all on this machine, train
    together."""
    from blockpruner.healing.train import write_trained

    validation = rows.validation if rows.validation.rows else None
    write_trained(
        out, pruning, train, rows.train, validation, states, observer, processes, rows.judge
    )


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
