"""studies/*.yaml, read and checked: lists of ordinary targets, whose results are tabulated
together.

Decides which targets a study has and what they are called. Everything about a model, its
calibration and its evaluation is decided by the run files that it names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from blockpruner.core.budgets import read_budget
from blockpruner.core.errors import InputError, named
from blockpruner.core.settings import NAME, Frozen, read_settings
from blockpruner.healing.settings import CompensationMethod
from blockpruner.methods.recipes import compensation, recipe, searches
from blockpruner.methods.registry import check_score
from blockpruner.params import load_run, read_file
from blockpruner.scoring.settings import Score
from blockpruner.settings import Run, Target, resolve, score_of

if TYPE_CHECKING:
    from blockpruner.reporting.paper.evidence import Row
    from blockpruner.reporting.points import Points

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
    score = read_settings(
        Score, {**base.model_dump(exclude_defaults=True), "method": base.method, **fields}
    )
    for one in searches(score).values():
        check_score(one)
    return score


def target_name(run: str, method: str, budget: str, compensate: str | None, train: bool) -> str:
    """Name a target, for instance smollm2-floating-b20-refit-train; no dot, which DVC reads as
    nesting."""
    value, unit = read_budget(budget)
    size = f"b{100 * value:g}{unit}" if unit in ("", "kv") else budget
    parts = [run, method, size, compensate, "train" if train else ""]
    return "-".join(part for part in parts if part).replace(".", "-").replace("_", "-")


def targets_of(study: Study) -> dict[str, Target]:
    """List all targets of a study by name; raises InputError for a run, method or budget that is
    none, or two targets of one name that differ."""
    found: dict[str, Target] = {}
    cells = [
        (
            target_name(
                run, method, budget, compensate if compensate != "none" else None, grid.train
            ),
            Target(run=run, budget=budget, method=method, compensate=compensate, train=grid.train),
        )
        for grid in study.grids
        for run, method, budget, compensate in product(
            grid.runs or study.runs, grid.methods, grid.budgets, grid.compensate
        )
    ]
    for name, target in (*cells, *study.targets.items()):
        if target.run not in study.runs:
            raise InputError(
                f"target {name!r} is of run {target.run!r}, which is not in runs; valid:"
                f" {', '.join(study.runs)}",
                rule="unknown-run",
                key="runs",
                value=target.run,
            )
        if target.method is not None:
            recipe(target.method)
        if found.setdefault(name, target) != target:
            raise InputError(
                f"two targets are called {name!r}; rename one", rule="same-name", value=name
            )
    return found


def study_names(folder: Path = FOLDER) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml"))


def load_study(name: str, folder: Path = FOLDER) -> Study:
    """Read studies/<name>.yaml; its `targets` are all of them, those of its grids included. Raises
    InputError if there is no such file, or a key or value is not valid."""
    path = folder / f"{name}.yaml"
    if not NAME.fullmatch(name) or not path.exists():
        known = ", ".join(study_names(folder)) or "none"
        raise InputError(
            f"study {name!r} is unknown: {path} does not exist; existing studies: {known}",
            rule="unknown-study",
            key="studies",
            value=name,
        )
    study = read_file(path, Study)
    with named(f"{path}: "):
        return study.model_copy(update={"targets": targets_of(study), "grids": ()})


def points_of_study(
    study: Study, name: str, evidence: Path
) -> dict[str, tuple[str, list[str], Points]]:
    """By run: what its model is called, what its results hold for, and the points of its
    experiments so far."""
    from blockpruner.reporting.labels import labels, name_of
    from blockpruner.reporting.points import Points

    found = {}
    for run in study.runs:
        folders = [
            evidence / f"{name}-{key}" for key, one in study.experiments.items() if one.run == run
        ]
        if known := [Points.read(folder) for folder in folders if folder.exists()]:
            settings = resolve(load_run(run), [])
            points = replace(Points.joined(known), compared=study.compared)
            found[run] = name_of(settings.model), [labels(settings).conditions], points
    return found


def rows_of_study(study: Study, evidence: Path) -> list[Row]:
    """Its targets with what was measured of them, as far as it was."""
    from blockpruner.reporting.labels import labels, origin
    from blockpruner.reporting.paper.evidence import Subject, read_rows  # loads much
    from blockpruner.reporting.paper.published import MODELS

    runs, subjects = {}, []
    for run in study.runs:
        own = [one for one in study.targets.values() if one.run == run]
        runs[run] = settings = resolve(load_run(run), own)
        name, drawn = MODELS.get(getattr(settings.model, "repo", "")), settings.calibration
        samples = None if drawn.num_rows else drawn.num_samples
        subjects.append(Subject(run, labels(settings), name, origin(drawn.data), samples))
    asked = {}
    for target, wanted in study.targets.items():
        settings = runs[wanted.run]
        method = wanted.method or settings.score.score.method
        chosen = wanted.compensate or compensation(settings.compensate.method, method)
        asked[target] = wanted.model_copy(update={"method": method, "compensate": chosen})
    return read_rows(subjects, asked, evidence)


def write_tables(name: str, data: Path) -> list[str]:
    """Make the tables and figures of a study of what data/evidence holds, at data/tables/<name>;
    the lines say where they are, and what was not measured."""
    from blockpruner.reporting.answers.page import write_answers
    from blockpruner.reporting.paper.page import write_study

    study, out = load_study(name), data / "tables" / name
    missing = list[str]()
    if study.experiments:
        write_answers(out, study.title, points_of_study(study, name, data / "evidence"))
    else:
        rows = rows_of_study(study, data / "evidence")
        write_study(out, study.title, rows, data / "paper")
        missing = [f"not measured: {row.target}: {row.reason}" for row in rows if row.reason]
    return [*missing, f"tables: {out / 'index.html'}"]
