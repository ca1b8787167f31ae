"""What a flow is asked to do: runs, budgets or a study, the change of params.yaml they need, the
stages to run.

Decides the form that the UI shows, the names of added targets and how params.yaml is edited. What a
value may be is decided by blockpruner.config.params, which checks the new content before it is
written. How far a model can be pruned is decided by the stage score.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from blockpruner.config import dag
from blockpruner.config.params import load_params, load_run
from blockpruner.config.sections import Params, Target
from blockpruner.core.budgets import read_budget
from blockpruner.core.errors import InputError, named
from blockpruner.core.settings import Frozen
from blockpruner.healing.settings import CompensationMethod
from blockpruner.store.files import write_text
from study.studies import load_study, rows_of_study, target_name

if TYPE_CHECKING:
    from pandas import DataFrame

PARAMS = Path("params.yaml")
EVIDENCE, PUBLISHED = Path("data/evidence"), Path("data/paper")
TABLES = "tables"
"""The stage of a study. Its items are studies, which may have the names of runs."""

BUDGETS = "0.22 (a share of all parameters), 17blocks, 7layers, 0.30kv (a share of the KV cache)"


class Selection(Frozen):
    """What to bring up to date; nothing chosen means everything in params.yaml, as it is."""

    runs: tuple[str, ...] = ()
    """Names of the files in runs/; added to params.yaml if missing there. None: all its runs."""
    budgets: tuple[str, ...] = Field(
        default=(),
        description=(
            f"How far to prune: {BUDGETS}. Each is added as a target of each run. None: the runs'"
            " targets in params.yaml."
        ),
    )
    compensate: CompensationMethod | None = None
    """How the weights of these targets make up for what is gone, without training. None: as their
    run's file says."""
    train: bool = False
    """Whether these targets are trained, by the train section of their run's file."""
    keep_going: bool = False
    """Go on with other runs and targets after a failure. What needs the failed is left."""
    push: str | None = None
    """A remote of DVC (`dvc remote list`), which gets what was made when all is done. None: no
    push."""
    share: str | None = Field(
        default=None,
        description=(
            "A remote of Git, which gets settings and results as an experiment when all is done"
            " (`dvc exp pull`); the remote of `push`, or DVC's default one, gets the files."
        ),
    )

    @property
    def words(self) -> str:
        """The name of its flow run."""
        labels = [*(self.runs or ["all runs"]), *self.budgets]
        if self.compensate is not None:
            labels.append(self.compensate)
        if self.train:
            labels.append("train")
        return " ".join(labels)

    @property
    def healing(self) -> dict[str, Any]:
        """What a target of it has in params.yaml beyond run and budget."""
        return self.model_dump(include={"compensate", "train"}, exclude_defaults=True)


@dataclass(frozen=True)
class Chosen:
    targets: Mapping[str, Sequence[str]]
    """The targets to build, by run."""
    text: str
    """params.yaml as it has to be."""
    additions: tuple[str, ...]
    """What params.yaml lacks, in words."""
    study: str = ""
    """The study whose tables are made; "" for the report."""
    experiments: Mapping[str, str] = field(default_factory=dict)
    """The runs of the study's experiments, by their names in params.yaml."""

    def write(self) -> None:
        """Add to params.yaml what it lacks, and derive dag.yaml. DVC makes its stages out of them;
        none runs before."""
        if self.additions:
            write_text(PARAMS, self.text)
        dag.write()

    def stages(self, pipeline: Mapping[str, Sequence[str]]) -> list[str]:
        """The stages of the chosen runs, then of their targets, then experiments, each behind those
        that it needs."""
        items = [item for run, targets in self.targets.items() for item in (run, *targets)]
        ordered = dict[str, None]()

        def add(stage: str) -> None:
            for needed in pipeline.get(stage, ()):
                add(needed)
            ordered.setdefault(stage)

        for item in (*items, *self.experiments):
            for stage in pipeline:
                kind, _, stage_item = stage.partition("@")
                if stage_item == item and kind != TABLES:
                    add(stage)
        return list(ordered)

    def summaries(self, names: Iterable[str]) -> list[str]:
        """Those over all models: the study's tables, or the report."""
        if self.study:
            return [name for name in names if name == f"{TABLES}@{self.study}"]
        return [name for name in names if "@" not in name]


def choose(selection: Selection) -> Chosen:
    """Check a selection against the files of the current folder; changes none of them."""
    params = load_params(PARAMS)
    runs = selection.runs or params.runs
    for run in runs:
        load_run(run)
    if selection.healing and not selection.budgets:
        keys = " and ".join(selection.healing)
        message = f"{keys}: for targets by budget only; name a budget, or edit {PARAMS}"
        raise InputError(message, rule="healing-without-budget")
    if not selection.budgets:
        targets_by_run = {run: _targets_of(run, params.targets) for run in runs}
        return _chosen(params, targets_by_run, {}, "", {})
    # A target of params.yaml serves a budget that it writes in another way, 0.3 or 0.30.
    name_by_meaning = {}
    for name, target in params.targets.items():
        healing = (target.method, target.compensate, target.train)
        if healing == (None, selection.compensate, selection.train):
            name_by_meaning[target.run, read_budget(target.budget)] = name
    targets_by_run = {run: [] for run in runs}
    settings_by_target: dict[str, dict[str, Any]] = {}
    for run, budget in product(runs, selection.budgets):
        meaning = run, read_budget(budget)
        if meaning not in name_by_meaning:
            name = target_name(run, "", budget, selection.compensate, selection.train)
            name_by_meaning[meaning] = name
            settings_by_target[name] = {"run": run, "budget": budget, **selection.healing}
        if name_by_meaning[meaning] not in targets_by_run[run]:
            targets_by_run[run].append(name_by_meaning[meaning])
    return _chosen(params, targets_by_run, settings_by_target, "", {})


def choose_study(name: str, only: Sequence[str] = ()) -> Chosen:
    """Check the targets of studies/<name>.yaml as `choose` does; a target's name has one meaning.
    `only` names tables and figures, such as table2, for which alone targets are built, and
    experiments."""
    study, params = load_study(name), load_params(PARAMS)
    targets, experiments = dict(study.targets), dict(study.experiments)
    if only:
        items = study_items(name) if targets else {}
        for item in only:
            if item not in (*items, *experiments):
                valid = ", ".join([*items, *experiments])
                raise InputError(
                    f"study {name} has no {item}; valid: {valid}", rule="unknown-item", value=item
                )
        shown = set[str]()
        for item in only:
            if item in items:
                _title, models = items[item]
                shown |= set(models["target"])
        targets = {key: target for key, target in targets.items() if key in shown}
        experiments = {key: value for key, value in experiments.items() if key in only}
    settings_by_target = {
        key: target.model_dump(mode="json", exclude_defaults=True)
        for key, target in targets.items()
    }
    targets_by_run = {run: _targets_of(run, targets) for run in study.runs}
    # A run of experiments alone needs no stage of its own.
    if only or experiments:
        targets_by_run = {run: names for run, names in targets_by_run.items() if names}
    run_by_experiment = {key: experiment.run for key, experiment in experiments.items()}
    return _chosen(params, targets_by_run, settings_by_target, name, run_by_experiment)


def study_items(name: str) -> dict[str, tuple[str, "DataFrame"]]:
    """The tables and figures of a study, each with its title and the models that it shows."""
    from study.paper.needs import items_of  # loads much

    runs = {run: load_run(run) for run in load_study(name).runs}
    return items_of(study_frame(name), runs, PUBLISHED)


def study_frame(name: str) -> "DataFrame":
    from study.paper.tables import models_frame

    return models_frame(rows_of_study(load_study(name), EVIDENCE))


def _targets_of(run: str, targets: Mapping[str, Target]) -> list[str]:
    return [name for name, target in targets.items() if target.run == run]


def _chosen(
    params: Params,
    targets_by_run: Mapping[str, Sequence[str]],
    settings_by_target: Mapping[str, dict[str, Any]],
    study: str,
    run_by_experiment: Mapping[str, str],
) -> Chosen:
    """Add to params.yaml what it lacks of runs, targets, a study and its experiments; comments and
    quotes stay."""
    text = PARAMS.read_text(encoding="utf-8")
    editor = _yaml_editor()
    document = editor.load(text)
    additions = []
    for run in dict.fromkeys([*targets_by_run, *run_by_experiment.values()]):
        if run not in params.runs:
            document["runs"].append(run)
            additions.append(f"run {run}")
    for name, settings in settings_by_target.items():
        if name not in params.targets:
            document["targets"][name] = _in_one_line(settings)
            additions.append(f"target {name}")
        elif params.targets[name] != Target(**settings):
            existing = params.targets[name].model_dump(mode="json", exclude_defaults=True)
            raise InputError(
                f"{PARAMS}: target {name!r} exists as {existing}; rename it, since {settings} needs"
                " this name",
                rule="target-taken",
                key=f"targets.{name}",
            )
    if study and study not in params.studies:
        document.setdefault("studies", []).append(study)
        additions.append(f"study {study}")
    experiments = {}
    for name, run in run_by_experiment.items():
        item = f"{study}-{name}"
        experiments[item] = run
        if item not in params.experiments:
            settings = {"study": study, "name": name, "run": run}
            document.setdefault("experiments", {})[item] = settings
            additions.append(f"experiment {name}")
    if additions:
        buffer = io.StringIO()
        editor.dump(document, buffer)
        text = buffer.getvalue()
    with named(f"{PARAMS} is unchanged: "):
        load_params(PARAMS, text)
    return Chosen(targets_by_run, text, tuple(additions), study, experiments)


def _yaml_editor() -> YAML:
    """Reads and writes YAML with its comments and quotes."""
    editor = YAML()
    editor.preserve_quotes = True
    editor.width = 4096
    # A null is written as a word, not as nothing.
    editor.representer.add_representer(
        type(None), lambda to, _: to.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    return editor


def _in_one_line(settings: Mapping[str, Any]) -> CommentedMap:
    """A target as params.yaml has it: {run: tiny, budget: "0.3"}."""
    target = CommentedMap(settings)
    target["budget"] = DoubleQuotedScalarString(settings["budget"])
    target.fa.set_flow_style()
    return target
