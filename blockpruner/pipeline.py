"""The way through the house: one function a step, called by every door.

    calibrate -> score -> commit -> heal -> train -> export -> measure -> report

Decides what a step is made of, and what is kept apart: texts on which models are evaluated or judged are seen by no
search, no fit and no training. Where files are kept and what is shown is decided by the doors: stages, command, API,
form. Torch is loaded by the steps that compute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockpruner.core.errors import InputError
from blockpruner.core.families import Config
from blockpruner.core.plan import Plan
from blockpruner.core.progress import Observer
from blockpruner.core.settings import Compensate, Perplexity, Run, Score, TaskAnswers, Train
from blockpruner.inputs.calibration import (
    Answer,
    CalibrationSet,
    draw,
    draw_in_turn,
    draw_rows,
    pack_answers,
    sharing,
)
from blockpruner.methods.commit import commit_run
from blockpruner.methods.kind import Material
from blockpruner.methods.recipes import proposals, searches
from blockpruner.methods.score import score_run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from blockpruner.healing.choice import Healing
    from blockpruner.methods.apply import Pruning

NONE = CalibrationSet(())

JUDGING = 8
"""At most one text of so many is set aside to judge between proposals."""


@dataclass(frozen=True)
class Pool:
    """The texts that a run draws from, by what they are for."""

    search: Sequence[str] | Mapping[str, Sequence[Answer]]
    """Calibration texts; or the right answers to items of some tasks, by task."""
    fit: Sequence[str] | None = None
    """Texts of the compensation; None: those of the search."""
    train: Sequence[str] | None = None
    evaluated: Sequence[str] = ()
    """Texts on which models are evaluated."""


@dataclass(frozen=True)
class Rows:
    """Every token row that decides something about a pruned model."""

    search: CalibrationSet
    """The rows on which masks are scored."""
    fit: CalibrationSet = NONE
    """The rows to which weights are fitted; the last ones are held out to choose the strength."""
    judge: CalibrationSet = NONE
    """The rows that choose between proposals. Neither search nor fit nor training has seen their texts."""
    train: CalibrationSet = NONE
    validation: CalibrationSet = NONE
    """The rows that choose the best state of training."""


def calibrate(
    run: Run,
    pool: Pool,
    tokenizer: Any,
    config: Config,
    note: Callable[[str], object],
    *,
    judged: bool | None = None,
    at_most: bool = False,
) -> Rows:
    """Draw every row of a run.

    Args:
        config: of the dense model; rows of compensation are no longer than its context.
        note: receives what was left out.
        judged: whether rows are set aside to judge between proposals; None: where the run's recipe has several.
        at_most: fewer rows than are asked for will do.

    Raises:
        InputError: too few texts; names how many there are.
    """
    from blockpruner.healing.rows import compensation_rows, training_rows

    wanted, answers = run.calibration, isinstance(run.calibration.data, TaskAnswers)
    context = config.get("max_position_embeddings") or run.compensate.seq_len
    fit_texts = pool.fit if pool.fit is not None else (() if answers else pool.search)
    assert not isinstance(fit_texts, Mapping)
    judge, reserved = NONE, set[str]()
    if len(searches(run.score)) > 1 if judged is None else judged:
        judge, reserved = _set_aside(run, fit_texts, tokenizer, context, pool.evaluated, note)
    if isinstance(pool.search, Mapping):
        found = pack_answers(draw_in_turn(pool.search, wanted.num_samples, wanted.seed), tokenizer, wanted.seq_len)
        fit = CalibrationSet(tuple(tuple(max(t, ~t) for t in row) for row in found.rows[: run.compensate.num_rows]))
    else:
        found = draw_rows(pool.search, tokenizer, wanted, pool.evaluated, note, at_most=at_most, reserved=reserved)
        fit = NONE
    if fit_texts:
        fit = compensation_rows(fit_texts, tokenizer, run.compensate, pool.evaluated, context, reserved)
    rows = Rows(found, fit, judge)
    if run.train is None or pool.train is None:
        return rows
    train, validation = training_rows(
        pool.train, tokenizer, run.train, pool.evaluated, note, at_most=at_most, reserved=reserved
    )
    return replace(rows, train=train, validation=validation or NONE)


def _set_aside(
    run: Run,
    texts: Sequence[str],
    tokenizer: Any,
    context: int,
    evaluated: Sequence[str],
    note: Callable[[str], object],
) -> tuple[CalibrationSet, set[str]]:
    """The rows that judge, and the texts that nothing else may see: those in the rows, and others that share a
    paragraph with one. They are the last ones of the order in which texts are drawn, so that first draws stay."""
    from blockpruner.evaluation.perplexity import held_out

    wanted = run.compensate
    known = sharing(texts, evaluated)
    order = [text for text in draw(texts, None, "all", wanted.seed) if text not in known]
    last = order[len(order) - len(order) // JUDGING :]
    asked = Perplexity(
        seq_len=min(wanted.seq_len, context), max_rows=wanted.held_out(wanted.num_rows), packing="documents"
    )
    try:
        found = held_out(tokenizer, last, asked)
    except InputError:
        note(
            f"warning: {len(texts)} texts are too few to set some aside that judge between searches: only the first "
            "search of the recipe is made"
        )
        return NONE, set()
    return CalibrationSet(found.rows), sharing(texts, found.documents) | set(found.documents)


def score(
    material: Material,
    rows: Rows,
    wanted: Score,
    budgets: Sequence[str],
    folder: Path,
    latency: Callable[[], Mapping[str, Any]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Search far enough for the budgets, by every search of the recipe; each leaves its tables at `folder`/<its name>.

    Args:
        latency: measures what generation and each block takes, where a budget or a price needs it.

    Returns:
        What was computed and reused, as from `methods.score.score_run`, by search.

    Raises:
        InputError: settings or budgets that cannot be met, before anything is computed.
    """
    far: dict[str, list[str]] = {}
    for budget in budgets:
        for name in _competing(wanted, material.config, budget, rows):
            far.setdefault(name, []).append(budget)
    found = {}
    for number, (name, own) in enumerate(far.items(), 1):
        if len(far) > 1:
            material.observer.note(f"search {number} of {len(far)}: {name}")
        section = searches(wanted)[name]
        found[name] = score_run(material, rows.search, section, own, folder / name, latency)
    return found


def _competing(wanted: Score, config: Config, budget: str, rows: Rows) -> list[str]:
    found = list(proposals(wanted, config, budget))
    return found if rows.judge.rows else found[:1]


@dataclass(frozen=True)
class Proposal:
    """A plan that a search proposes for a budget."""

    search: str
    """The name of the search in its recipe."""
    plan: Plan
    tables: Sequence[Path] = field(default=(), compare=False)
    """The iteration tables that it used, in order."""


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
) -> list[Proposal]:
    """What each search of the recipe removes for a budget; one proposal, or several that `heal` judges.

    Args:
        folder: as `score` left it.

    Raises:
        InputError: the budget cannot be met, or a file of a search is missing or damaged.
    """
    found = []
    for name in _competing(wanted, config, budget, rows):
        plan, tables = commit_run(folder / name, config, budget, target, run)
        found.append(Proposal(name, replace(plan, compensate=compensate, train=train), tables))
    return found


def heal(
    dense: Callable[[], PreTrainedModel], found: Sequence[Proposal], rows: Rows, wanted: Compensate, observer: Observer
) -> Healing:
    """Compensate each proposal as its plan says, and keep the best by the rows that judge.

    Args:
        dense: loads the dense model, which is as before at the end; called if something must be computed.

    Raises:
        InputError: too few rows to fit to; or see `healing.compensate.compensate`.
    """
    from blockpruner.healing.choice import choose

    plans, held_out = {each.search: each.plan for each in found}, wanted.held_out(len(rows.fit.rows))
    return choose(dense, plans, rows.fit, held_out, rows.judge, rows.search, observer)


def train(
    pruning: Pruning, wanted: Train, rows: Rows, states: Path, out: Path, observer: Observer
) -> None:
    """Train the model of a plan, from its compensated weights on: its weights and facts at `out`.

    Args:
        states: a folder for the states of training, from which a killed one continues.
    """
    from blockpruner.healing.train import write_trained

    write_trained(out, pruning, wanted, rows.train, rows.validation if rows.validation.rows else None, states, observer)


def export(
    pruning: Pruning, places: Mapping[str, Path], quantizations: Mapping[str, Sequence[str]] | None = None
) -> None:
    """Write verified checkpoints of a plan's model, a folder for each format.

    Args:
        quantizations: by format, what more files of it are quantized to.
    """
    from blockpruner.checkpoints.registry import EXPORTS

    for form, place in places.items():
        write: Any = EXPORTS[form].write
        more = (quantizations or {}).get(form, ())
        write(pruning, place, **({"quantizations": tuple(more)} if more else {}))


def exported(form: str, place: Path) -> dict[str, Any]:
    """Facts on a checkpoint: format, path, `for` (the engines that load it), verified, verified_by."""
    from blockpruner.checkpoints.registry import EXPORTS
    from blockpruner.store.files import read_json
    from blockpruner.store.manifest import REPORT_FILE

    report, engines = place / REPORT_FILE, EXPORTS[form].engines
    seen = read_json(report) if report.exists() else {}  # a format of another package may have none
    facts = {"format": form, "path": str(place), "for": engines}
    return facts | {"verified": bool(seen.get("ok")), "verified_by": seen.get("engine", ", ".join(engines))}
