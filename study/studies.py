"""studies/*.yaml, read and checked: lists of ordinary targets, whose results are tabulated
together.

Decides which targets a study has and what they are called. Everything about a model, its
calibration and its evaluation is decided by the run files that it names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from blockpruner.config.params import load_run, read_file
from blockpruner.config.sections import Run, Target, resolve, score_of
from blockpruner.core.budgets import read_budget
from blockpruner.core.errors import InputError, named
from blockpruner.core.settings import NAME, Frozen, read_settings
from blockpruner.healing.settings import CompensationMethod
from blockpruner.methods.recipes import compensation, recipe, searches
from blockpruner.methods.registry import check_score
from blockpruner.scoring.settings import Score

if TYPE_CHECKING:
    from study.paper.evidence import Row
    from study.points import Points

FOLDER = Path("studies")


class TargetGrid(Frozen):
    """Targets in short: every method at every budget with every compensation, of every run."""

    runs: tuple[str, ...] = ()
    """Some of the study's runs; all by default."""
    methods: tuple[str, ...] = Field(min_length=1)
    """Names of recipes and searches."""
    budgets: tuple[str, ...] = Field(min_length=1)
    """How far to prune, as in a target."""
    compensate: tuple[CompensationMethod, ...] = ("none",)
    """Ways in which the weights that are left are compensated, without training."""
    train: bool = False
    """Whether these models are trained after that, by the run's `train`."""


class Heal(Frozen):
    """What is done to the weights that are left."""

    compensate: CompensationMethod = "none"
    train: dict[str, Any] | None = None
    """Training after that: what differs from the run's `train`; null: none."""


class Experiment(Frozen):
    """Pruned models of one run that differ in their calibration, search, size and healing. They are
    measured on the run's held-out rows in one process, and none is written."""

    run: str
    """Name of runs/<name>.yaml."""
    methods: dict[str, dict[str, Any]] = Field(min_length=1)
    """By a name each: what differs from the run's `score`. Without a method, the name is that of a
    recipe or search."""
    budgets: tuple[str, ...] = Field(min_length=1)
    """How far to prune, as in a target."""
    seeds: tuple[int, ...] = (42,)
    """Draws of calibration and compensation."""
    calibrations: dict[str, dict[str, Any]] = Field(default={"": {}})
    """By a name each: what differs from the run's `calibration`; `kind` is the only kind of text
    that is drawn."""
    heal: dict[str, Heal] = Field(default={"plain": Heal()})
    tasks: bool = False
    """Whether the run's zero-shot tasks are measured, too."""


class Study(Frozen):
    """Models whose results are tabulated together: studies/<name>.yaml."""

    title: str
    """The title of its pages."""
    runs: tuple[str, ...] = Field(min_length=1)
    """Names of runs/<name>.yaml."""
    grids: tuple[TargetGrid, ...] = ()
    """Targets in short."""
    targets: dict[str, Target] = Field(default_factory=dict)
    """More targets, by name, as in params.yaml."""
    experiments: dict[str, Experiment] = Field(default_factory=dict)
    """By name: what is measured without targets."""
    compared: tuple[str, ...] = ()
    """The methods of experiments that are compared at 10, 20 and 30 %, between the sizes measured,
    in the order of the tables; others have a table of their own. Empty: all methods are tabulated
    at the sizes measured."""


def score_of_method(run: Run, name: str, fields: Mapping[str, Any]) -> Score:
    """The `score` section of one of an experiment's methods; raises InputError if it is not
    valid."""
    base = score_of(run, fields.get("method", name))
    defaults = base.model_dump(exclude_defaults=True)
    values = {**defaults, "method": base.method, **fields}
    score = read_settings(Score, values)
    for search in searches(score).values():
        check_score(search)
    return score


def target_name(run: str, method: str, budget: str, compensate: str | None, train: bool) -> str:
    """Name a target, for instance smollm2-floating-b20-refit-train; no dot, which DVC reads as
    nesting."""
    value, unit = read_budget(budget)
    size = f"b{100 * value:g}{unit}" if unit in ("", "kv") else budget
    parts = [run, method, size, compensate, "train" if train else ""]
    name = "-".join(part for part in parts if part)
    return name.replace(".", "-").replace("_", "-")


def targets_of(study: Study) -> dict[str, Target]:
    """List all targets of a study by name; raises InputError for a run, method or budget that is
    none, or two targets of one name that differ."""
    named_targets = [cell for grid in study.grids for cell in _cells(grid, study.runs)]
    targets: dict[str, Target] = {}
    for name, target in (*named_targets, *study.targets.items()):
        if target.run not in study.runs:
            message = f"target {name!r} is of run {target.run!r}, which is not in runs"
            valid = ", ".join(study.runs)
            raise InputError(
                f"{message}; valid: {valid}", rule="unknown-run", key="runs", value=target.run
            )
        if target.method is not None:
            # Raises InputError for a method that there is not.
            recipe(target.method)
        if targets.setdefault(name, target) != target:
            message = f"two targets are called {name!r}; rename one"
            raise InputError(message, rule="same-name", value=name)
    return targets


def _cells(grid: TargetGrid, runs: Sequence[str]) -> Iterator[tuple[str, Target]]:
    """List the targets of a grid with their names."""
    cells = product(grid.runs or runs, grid.methods, grid.budgets, grid.compensate)
    for run, method, budget, compensate in cells:
        suffix = None if compensate == "none" else compensate
        name = target_name(run, method, budget, suffix, grid.train)
        target = Target(
            run=run, budget=budget, method=method, compensate=compensate, train=grid.train
        )
        yield name, target


def study_names(folder: Path = FOLDER) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml"))


def load_study(name: str, folder: Path = FOLDER) -> Study:
    """Read studies/<name>.yaml; its `targets` are all of them, those of its grids included. Raises
    InputError if there is no such file, or a key or value is not valid."""
    path = folder / f"{name}.yaml"
    if not NAME.fullmatch(name) or not path.exists():
        existing = ", ".join(study_names(folder)) or "none"
        message = f"study {name!r} is unknown: {path} does not exist; existing studies: {existing}"
        raise InputError(message, rule="unknown-study", key="studies", value=name)
    study = read_file(path, Study)
    with named(f"{path}: "):
        return study.model_copy(update={"targets": targets_of(study), "grids": ()})


def points_of_study(
    study: Study, name: str, evidence: Path
) -> dict[str, tuple[str, list[str], Points]]:
    """By run: what its model is called, what its results hold for, and the points of its
    experiments so far."""
    from blockpruner.reporting.labels import labels, name_of
    from study.points import Points

    points_by_run: dict[str, list[Points]] = {run: [] for run in study.runs}
    for key, experiment in study.experiments.items():
        folder = evidence / f"{name}-{key}"
        if folder.exists():
            points_by_run[experiment.run].append(Points.read(folder))
    results = {}
    for run, measured in points_by_run.items():
        if measured:
            settings = resolve(load_run(run), [])
            points = replace(Points.joined(measured), compared=study.compared)
            results[run] = name_of(settings.model), [labels(settings).conditions], points
    return results


def rows_of_study(study: Study, evidence: Path) -> list[Row]:
    """Its targets with what was measured of them, as far as it was."""
    from blockpruner.reporting.labels import labels, origin
    from study.paper.evidence import Subject, read_rows  # loads much
    from study.paper.published import MODELS

    subjects = []
    targets = {}
    for run in study.runs:
        targets_of_run = {
            name: target for name, target in study.targets.items() if target.run == run
        }
        settings = resolve(load_run(run), list(targets_of_run.values()))
        calibration = settings.calibration
        subject = Subject(
            run,
            labels(settings),
            paper=MODELS.get(getattr(settings.model, "repo", "")),
            texts=origin(calibration.data),
            samples=None if calibration.num_rows else calibration.num_samples,
        )
        subjects.append(subject)
        for name, target in targets_of_run.items():
            method = target.method or settings.score.score.method
            default = compensation(settings.compensate.method, method)
            changes = {"method": method, "compensate": target.compensate or default}
            targets[name] = target.model_copy(update=changes)
    return read_rows(subjects, targets, evidence)


def write_tables(name: str, data: Path) -> list[str]:
    """Make the tables and figures of a study of what data/evidence holds, at data/tables/<name>;
    the lines name the page, and what was not measured."""
    # matplotlib and pandas load slowly, and most callers only read the file.
    from study.answers.page import write_answers
    from study.paper.page import write_study

    study, out = load_study(name), data / "tables" / name
    lines = []
    if study.experiments:
        write_answers(out, study.title, points_of_study(study, name, data / "evidence"))
    else:
        rows = rows_of_study(study, data / "evidence")
        write_study(out, study.title, rows, data / "paper")
        lines = [f"not measured: {row.target}: {row.reason}" for row in rows if row.reason]
    return [*lines, f"tables: {out / 'index.html'}"]
