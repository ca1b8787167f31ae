"""Settings: params.yaml and runs/<name>.yaml as frozen values.

Decides how the sections of a run fit together. What a section holds is decided in its room; files
are read by `params`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from pydantic import Field, field_validator, model_validator

from blockpruner.core.budgets import read_budget
from blockpruner.core.errors import InputError
from blockpruner.core.settings import NAME, Frozen, Model, Runtime, Texts, read_settings
from blockpruner.evaluation.settings import Evaluate, Perplexity, Speed, ZeroShot
from blockpruner.healing.settings import Compensate, CompensationMethod, Train
from blockpruner.inputs.settings import Calibration
from blockpruner.inputs.sources import shipped_texts
from blockpruner.methods.recipes import RECIPES, compensation, is_judged, recipe, searches
from blockpruner.methods.registry import kind_of_method, options_of
from blockpruner.scoring.metrics import METRICS
from blockpruner.scoring.settings import Score
from blockpruner.search.registry import SEARCHES


class Run(Frozen):
    """One model, calibration set, search and evaluation: runs/<name>.yaml. All but the model has
    defaults."""

    model: Model
    calibration: Calibration = Calibration()
    score: Score = Score()
    evaluate: Evaluate = Evaluate()
    compensate: Compensate = Compensate()
    train: Train | None = None
    """The training of targets with `train: true`; `{}` is the paper's recipe."""
    export: tuple[str, ...] = ("hf",)
    """Formats of the checkpoint: hf (transformers, vLLM), and nas or mlx (mlx-lm), gguf
    (llama.cpp). []: the model is measured in memory and not written."""

    @field_validator("export")
    @classmethod
    def _exports(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if value and "hf" not in value:
            message = (
                f"export: {list(value)} lacks hf, the format that is benchmarked; add it, or export"
                " nothing"
            )
            raise ValueError(message)
        if len(set(value)) != len(value):
            raise ValueError(f"export: {list(value)} names the same format twice; keep one")
        return value


class Target(Frozen):
    """A pruned model to build."""

    run: str
    """Name of runs/<name>.yaml."""
    budget: str
    """How far to prune: a share of all parameters, "17blocks", "7layers", "0.3kv", "1.25x"."""
    method: str | None = None
    """A recipe or a method, in place of the run's `score.method`; of the run's `score` it keeps
    what is measured."""
    compensate: CompensationMethod | None = None
    """The compensation, in place of the run's `compensate.method`."""
    train: bool = False
    """Whether the pruned model is trained, by the run's `train`."""

    @field_validator("budget", mode="before")
    @classmethod
    def _budget(cls, value: object) -> str:
        text = str(value)
        read_budget(text)
        return text


class Report(Frozen):
    """The page over all targets."""

    title: str = "Block pruning"
    plots: bool = True


class StudyExperiment(Frozen):
    """An experiment of a study."""

    study: str
    """Name of studies/<name>.yaml."""
    name: str
    run: str
    """Its run."""


class Params(Frozen):
    """params.yaml: what is run and built."""

    runs: tuple[str, ...] = Field(min_length=1)
    """Names of runs/<name>.yaml, which are fetched, calibrated and scored."""
    targets: dict[str, Target]
    """Pruned models to build, by name."""
    report: Report = Report()
    studies: tuple[str, ...] = ()
    """Names of studies/<name>.yaml, whose tables are made."""
    experiments: dict[str, StudyExperiment] = Field(default={})
    """The experiments of studies, by <study>-<name>."""
    runtime: Runtime = Runtime()

    @model_validator(mode="after")
    def _names(self) -> Params:
        for name in (*self.runs, *self.targets, *self.experiments):
            if not NAME.fullmatch(name):
                hint = "a run name is the file runs/<name>.yaml, a target name a folder under data/"
                raise ValueError(
                    f"name {name!r} is not valid: at most 100 letters, digits, '_' and '-' ({hint})"
                )
        if len(set(self.runs)) != len(self.runs):
            raise ValueError(f"runs {list(self.runs)} name the same run twice; keep one")
        meanings: dict[tuple[object, ...], str] = {}
        for name, target in self.targets.items():
            if target.run not in self.runs:
                valid = ", ".join(self.runs)
                raise ValueError(
                    f"target {name!r} is of run {target.run!r}, which is not in runs; valid:"
                    f" {valid}"
                )
            if name in {
                *self.experiments,
                *(f"{run}{of}" for run in self.runs for of in ("", "-dense", "-search")),
            }:
                message = (
                    f"target name {name!r} is taken by a run, its baseline or an experiment; choose"
                    " another"
                )
                raise ValueError(message)
            meaning = (
                target.run,
                read_budget(target.budget),
                target.method,
                target.compensate,
                target.train,
            )
            if meaning in meanings:
                same = f"run {target.run}, budget {target.budget}"
                raise ValueError(
                    f"targets {meanings[meaning]!r} and {name!r} mean the same ({same}); remove one"
                )
            meanings[meaning] = name
        return self

    def target(self, name: str) -> Target:
        if name not in self.targets:
            message = (
                f"target {name!r} is not in params.yaml; valid: {', '.join(self.targets) or 'none'}"
            )
            raise InputError(message, rule="unknown-target", value=name)
        return self.targets[name]

    def targets_of(self, run: str) -> list[Target]:
        return [target for target in self.targets.values() if target.run == run]


class Sources(Frozen):
    """All that is fetched for a run."""

    model: Model
    texts: dict[str, Texts]
    """The texts, by their use: perplexity, calibration, compensate, train, judge."""
    zero_shot: ZeroShot


class Scored(Frozen):
    """The searches of a method, and how far they go."""

    score: Score
    metrics: dict[str, int]
    """The versions of their metrics."""
    budgets: tuple[str, ...]


class Sections(Frozen):
    """The settings of a run as the stages read them, each section from a file of its own."""

    model: Model
    sources: Sources
    calibration: Calibration
    score: Scored
    """The run's own method, for no budget: a new target leaves it as it is."""
    searches: dict[str, Scored]
    """Each method, the run's own first, with the budgets of its targets."""
    judged: bool
    """Whether models are judged on rows of their own, as `recipes.is_judged`."""
    compensate: Compensate
    train: Train | None
    heldout: Perplexity
    zero_shot: ZeroShot
    speed: Speed | None
    export: tuple[str, ...]

    def texts(self) -> dict[str, str]:
        """The content of each section's file by its name. Each method of `searches` has a file of
        its own."""
        values = self.model_dump(mode="json")
        searches = {
            f"searches/{method}": search for method, search in values.pop("searches").items()
        }
        return {
            name: json.dumps(value, indent=1) + "\n"
            for name, value in {**values, **searches}.items()
        }


def score_of(run: Run, method: str | None) -> Score:
    """The `score` section of a target that names a method, or none; raises InputError for an
    unknown one.

    It keeps the metric and the lengths of timings of the run's own section, and the acceleration
    where it takes one.
    """
    # The run's own method has all that its section sets.
    if method is None or method == run.score.method:
        return run.score
    row = {"metric": run.score.metric, **next(iter(recipe(method).searches.values()))}
    name = str(row["method"])
    shared_keys = {"latency"}
    if kind_of_method(name).removes_blocks:
        shared_keys.add("metric")
        # A metric that one pass computes for all blocks has nothing to accelerate.
        if SEARCHES[name].accelerated and not METRICS[str(row["metric"])].influence:
            shared_keys.add("acceleration")
    values = run.score.model_dump(include=shared_keys, exclude_none=True)
    return read_settings(Score, {**values, "method": method})


def resolve(run: Run, targets: Sequence[Target]) -> Sections:
    """The sections of a run with every default filled in; `targets` are the run's."""
    texts = {
        "perplexity": run.evaluate.perplexity.data,
        "calibration": run.calibration.data,
        "compensate": run.compensate.data,
        "train": run.train.data if run.train else None,
    }
    budgets: dict[str, list[str]] = {run.score.method: []}
    for target in targets:
        budgets.setdefault(target.method or run.score.method, []).append(target.budget)
    scored = {}
    for method, target_budgets in budgets.items():
        score = score_of(run, method)
        # The options of a recipe are those of its searches, which set them themselves.
        if method not in RECIPES:
            score = score.model_copy(update={"options": options_of(score).model_dump()})
        metrics = {
            search.metric: METRICS[search.metric].version for search in searches(score).values()
        }
        distinct_budgets = tuple(dict.fromkeys(target_budgets))
        scored[method] = Scored(score=score, metrics=metrics, budgets=distinct_budgets)
    pairs = {(run.score.method, run.compensate.method)}
    for target in targets:
        method = target.method or run.score.method
        pairs.add((method, target.compensate or run.compensate.method))
    judged = any(is_judged(method, compensation(healing, method)) for method, healing in pairs)
    if judged:
        texts["judge"] = shipped_texts()
    fetched, items = {role: data for role, data in texts.items() if data}, run.evaluate.zero_shot
    return Sections(
        model=run.model,
        sources=Sources(
            model=run.model, texts=fetched, zero_shot=ZeroShot(data=items.data, tasks=items.tasks)
        ),
        calibration=run.calibration,
        score=scored[run.score.method].model_copy(update={"budgets": ()}),
        searches=scored,
        judged=judged,
        compensate=run.compensate,
        train=run.train,
        heldout=run.evaluate.perplexity,
        zero_shot=run.evaluate.zero_shot,
        speed=run.evaluate.speed,
        export=run.export,
    )
