"""The way through the house: one function a step, called by every door.

    calibrate -> score -> commit -> heal -> train -> export

Decides what a step is made of, and what is kept apart: texts on which models are evaluated or
judged are seen by no search, no fit and no training. Where files are kept and what is shown is
decided by the doors: stages, command, API, form. Torch is loaded by the steps that compute. What
stages alone do is elsewhere: `evaluation.suite` measures, and `reporting.report` writes the page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockpruner.core.errors import InputError
from blockpruner.core.families import Config
from blockpruner.core.plan import Plan
from blockpruner.core.progress import Observer
from blockpruner.core.settings import Model, Runtime
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
from blockpruner.inputs.texts import TextKind, by_kind
from blockpruner.methods.kind import Material
from blockpruner.methods.recipes import proposals, require_reached, searches
from blockpruner.methods.registry import KINDS, kind_of_method
from blockpruner.methods.score import score_run
from blockpruner.scoring.settings import Score
from blockpruner.search.trace import Current, search_cost, trace_directory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from blockpruner.healing.choice import Healing
    from blockpruner.methods.apply import Pruning

NONE = CalibrationSet(())

JUDGING = 8
"""At most one text of so many is set aside to judge."""

JUDGING_ROWS, JUDGING_TOKENS = 12, 128
"""Rows of each kind of text that judge, and their tokens."""


@dataclass(frozen=True)
class Pool:
    """The texts that a run draws from, by what they are for."""

    search: Sequence[str]
    """Calibration texts."""
    fit: Sequence[str] | None = None
    """Texts of the compensation; None: those of the search."""
    train: Sequence[str] | None = None
    judge: Sequence[str] = ()
    """Texts of kinds that judge beside those of the fit. A kind that the fit has, too, is judged by
    its own texts."""
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
        for part in fields(self):
            getattr(self, part.name).save(folder / f"{part.name}.parquet", source)

    @classmethod
    def load(cls, folder: Path, *parts: str) -> Rows:
        """Read some parts, or all."""
        names = parts or [part.name for part in fields(cls)]
        return cls(**{name: CalibrationSet.load(folder / f"{name}.parquet") for name in names})


def calibrate(
    wanted: Calibration,
    compensate: Compensate,
    train: Train | None,
    pool: Pool,
    tokenizer: Any,
    config: Config,
    note: Callable[[str], object],
    *,
    judged: bool,
    at_most: bool = False,
) -> Rows:
    """Draw every row of a run, if it is `judged` also those that judge; `note` receives what was
    left out. Raises InputError that names how many texts there are, where these are too few; with
    `at_most` fewer rows than are asked for will do."""
    from blockpruner.healing.rows import compensation_rows, training_rows

    context = config.get("max_position_embeddings") or compensate.seq_len
    texts = pool.fit if pool.fit is not None else pool.search
    judge, reserved = NONE, set[str]()
    if judged:
        judge, documents = _set_aside(compensate, texts, pool, tokenizer, context, note)
        reserved = documents | sharing({*texts, *pool.search, *(pool.train or ())}, documents)
    search = draw_rows(
        pool.search, tokenizer, wanted, pool.evaluated, note, at_most=at_most, reserved=reserved
    )
    try:
        fit, tuning = compensation_rows(
            texts, tokenizer, compensate, pool.evaluated, context, reserved, note
        )
    except InputError:  # no row comes out, which `heal` refuses where something is compensated
        fit = tuning = NONE
    rows = Rows(search, fit, tuning, judge)
    if train is not None and pool.train is not None:
        trained, validation = training_rows(
            pool.train, tokenizer, train, pool.evaluated, note, at_most=at_most, reserved=reserved
        )
        rows = replace(rows, train=trained, validation=validation or NONE)
    require_embedded((row for part in vars(rows).values() for row in part.rows), tokenizer, config)
    return rows


def require_room(
    config: Config,
    dtype: str,
    runtime: Runtime,
    wanted: Score,
    compensate: str,
    train: Train | None,
    budget: str,
) -> None:
    """Refuse, before a search, a run that a GPU has not the memory for. Devices of workers, and a
    model that is split over several, are not counted."""
    from blockpruner.healing.memory import step_bytes
    from blockpruner.model import accelerator
    from blockpruner.model.models import resolve_device

    if runtime.device == "split" or runtime.executor != "local":
        return
    place, needs = (
        resolve_device(runtime.device),
        step_bytes(config, dtype, wanted, compensate, train, budget),
    )
    if runtime.streaming:
        del needs["search"]
    room = math.inf if place.type == "cpu" else accelerator.total_memory(place)
    for step in (step for step, size in needs.items() if size > room):
        fix = {"search": "score with streaming", "refit": "leave it out (compensate none)"}
        raise InputError(
            f"{step} takes {needs[step] / 2**30:.1f} GiB of memory at least, and {place} has"
            f" {room / 2**30:.1f}; {fix.get(step, 'train adapters (lora)')}, or choose a larger"
            " device or the CPU",
            rule="too-large",
            key="device",
            value=str(place),
        )


def require_fit(rows: Rows, wanted: Compensate, method: str) -> None:
    """Refuse, before a search, a compensation with too few rows to fit to some and to check on
    others."""
    if method != "none" and not rows.fit.rows:
        how = f"is fitted to rows of {wanted.seq_len} tokens and checked on others"
        message = f"compensate {method} {how}, and the texts fill {len(rows.tuning.rows)}"
        raise InputError(
            f"{message}; give more texts, or compensate: none",
            rule="too-few-rows",
            key="compensate",
        )


def require_kept(plan: Plan, max_loss: float | None) -> None:
    """Refuse a model of which a kind of text has lost more than `max_loss`, before it is
    written."""
    if max_loss is None or not plan.kinds or (loss := Loss.of(plan.kinds)).worst <= max_loss:
        return
    message = f"{loss}: more than --max-loss {max_loss:g}, so nothing is written; all work is kept"
    fix = f"run again with --max-loss {math.ceil(100 * loss.worst) / 100:.2f}, or a smaller budget"
    raise InputError(f"{message}: {fix}", rule="too-much-lost", key="max_loss", value=max_loss)


def _set_aside(
    wanted: Compensate,
    texts: Sequence[str],
    pool: Pool,
    tokenizer: Any,
    context: int,
    note: Callable[[str], object],
) -> tuple[CalibrationSet, set[str]]:
    """The rows that judge, so many of each kind, and the texts in them, which nothing else may see.
    Of a kind that is fitted they are the last texts of the order in which texts are drawn, so that
    first draws stay."""
    from blockpruner.evaluation.perplexity import held_out

    known = sharing({*texts, *pool.judge}, pool.evaluated)
    order = by_kind(text for text in draw(texts, None, "all", wanted.seed) if text not in known)
    given, others = dict[str, list[str]](), dict[str, list[str]]()
    for kind, own in order.items():
        given.setdefault(_name(kind), []).extend(own[len(own) - len(own) // JUDGING :])
    for kind, own in by_kind(pool.judge).items():
        if _name(kind) not in given:
            others[_name(kind)] = own
    asked = Perplexity(
        seq_len=min(JUDGING_TOKENS, wanted.seq_len, context),
        max_rows=JUDGING_ROWS,
        packing="documents",
    )
    rows, documents, kinds = list[tuple[int, ...]](), set[str](), list[str]()
    for name, own in {**given, **others}.items():
        try:
            found = held_out(tokenizer, [str(text) for text in own if text not in known], asked)
        except InputError:
            continue
        rows += found.rows
        documents.update(found.documents)
        kinds += [name] * len(found.rows)
    if not rows:
        few = f"{len(texts)} texts are too few to set some aside that judge between searches"
        note(f"warning: {few}: only the first search of the recipe is made")
    elif lacking := [name for name in given if name not in kinds]:
        few = ", ".join(lacking)
        note(
            f"warning: too few texts of {few} to set some aside: what they lose is not judged; give"
            " more"
        )
    return CalibrationSet(tuple(rows), kinds=tuple(kinds)), documents


def _name(kind: TextKind | None) -> str:
    return kind.name if kind else "texts"


def score(
    material: Material,
    rows: Rows,
    wanted: Score,
    budgets: Sequence[str],
    folder: Path,
    latency: Callable[[], Mapping[str, Any]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Search far enough for the budgets, by every search of the recipe; each leaves its tables at
    `folder`/<its name>. Takes `latency` and returns by search what `methods.score.score_run` takes
    and returns. Raises InputError for settings or budgets that cannot be met, before anything is
    computed."""
    far: dict[str, list[str]] = {}
    for budget in budgets:
        require_reached(wanted, material.config, budget)
        for name in _competing(wanted, material.config, budget, rows):
            far.setdefault(name, []).append(budget)
    found = {}
    for number, (name, own) in enumerate(far.items(), 1):
        if len(far) > 1:
            material.observer.note(f"search {number} of {len(far)}: {name}")
        section = searches(wanted)[name]
        seen = (
            rows.fit
            if kind_of_method(section.method).of_fit and len(rows.fit.rows) > 1
            else rows.search
        )
        found[name] = score_run(material, seen, section, own, folder / name, latency)
    return found


def latency(
    material: Material, folder: Path, dense: Path, model: Model, wanted: Score, runtime: Runtime
) -> Mapping[str, Any]:
    """What generation and each block takes, as `score` asks for it: kept at `folder`, and for all
    runs beside the trials."""
    from blockpruner.evaluation.latency import kept_latency

    assert material.trials is not None
    return kept_latency(
        folder, material.trials, dense, model, wanted.latency, runtime, material.observer
    )


def _competing(wanted: Score, config: Config, budget: str, rows: Rows) -> list[str]:
    found = list(proposals(wanted, config, budget))
    return found if rows.judge.rows else found[:1]


@dataclass(frozen=True)
class Proposal:
    """A plan that a search proposes for a budget."""

    name: str
    """The name of the search in its recipe."""
    plan: Plan
    tables: Sequence[Path] = field(default=(), compare=False)
    """The iteration tables that it used, in order."""
    cost: Mapping[str, float] = field(default_factory=dict, compare=False)
    """What its search took, as far as it is known."""


def commit(
    folder: Path,
    wanted: Score,
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
    """What each search of the recipe removes for a budget, from the folder as `score` left it; one
    proposal, or several that `heal` judges. The plans name the dense model by its content, where it
    is kept at `dense`. Raises InputError if the budget cannot be met, or a file of a search is
    missing or damaged."""
    own: dict[str, Any] = {"target": target, "run": run, "compensate": compensate, "train": train}
    if dense is not None:
        own |= {"base": checkpoint_identity(dense), "weights": checkpoint_weights(dense)}
    found = list[Proposal]()
    for name in _competing(wanted, config, budget, rows):
        current = Current.load(folder / name)
        plan, tables = KINDS[current.kind].commit(folder / name, config, budget, current)
        cost = search_cost(tables, trace_directory(folder / name, current, budget))
        found.append(Proposal(name, replace(plan, **own), tables, cost))
    return found


def heal(
    dense: Callable[[], PreTrainedModel], found: Sequence[Proposal], rows: Rows, observer: Observer
) -> Healing:
    """Compensate each proposal as its plan says, and keep the best by the rows that judge; see
    `choice.choose`."""
    from blockpruner.healing.choice import choose

    plans = {each.name: each.plan for each in found}
    return choose(dense, plans, rows.fit, rows.tuning, rows.judge, rows.search, observer)


def train(
    pruning: Pruning,
    wanted: Train,
    rows: Rows,
    states: Path,
    out: Path,
    observer: Observer,
    processes: int = 1,
) -> None:
    """Train the model of a plan, from its compensated weights on: its weights and facts at `out`. A
    killed training continues from its `states`; so many processes of this machine train
    together."""
    from blockpruner.healing.train import write_trained

    validation = rows.validation if rows.validation.rows else None
    write_trained(
        out, pruning, wanted, rows.train, validation, states, observer, processes, rows.judge
    )


def export(
    pruning: Pruning,
    places: Mapping[str, Path],
    quantizations: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Write verified checkpoints of a plan's model, a new folder for each format; `quantizations`
    has by format to what more files of it are quantized. Raises InputError if something is at one
    of the places, before anything is written; or if a format cannot hold the model, and nothing is
    left at that place."""
    from blockpruner.checkpoints.registry import EXPORTS
    from blockpruner.store.files import require_free

    for place in places.values():
        require_free(place)
    for form, place in places.items():
        write: Any = EXPORTS[form].write
        more = (quantizations or {}).get(form, ())
        write(pruning, place, **({"quantizations": tuple(more)} if more else {}))


def exported(form: str, place: Path) -> dict[str, Any]:
    """Facts on a checkpoint: format, path, `for` (the engines that load it), verified,
    verified_by."""
    from blockpruner.checkpoints.registry import engines_of
    from blockpruner.store.files import read_json
    from blockpruner.store.manifest import REPORT_FILE

    report, engines = place / REPORT_FILE, engines_of(form, place)
    seen = read_json(report) if report.exists() else {}  # a format of another package may have none
    facts = {"format": form, "path": str(place), "for": engines}
    return facts | {
        "verified": bool(seen.get("ok")),
        "verified_by": seen.get("engine", ", ".join(engines)),
    }
