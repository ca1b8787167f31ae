"""What a flow is asked to do: runs, budgets or a study, the change of params.yaml they need, the
stages to run.

Decides the form that the UI shows, the names of added targets and how params.yaml is edited. What a
value may be is decided by blockpruner.params, which checks the new content before it is written.
How far a model can be pruned is decided by the stage score.
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

from blockpruner import dag
from blockpruner.core.budgets import read_budget
from blockpruner.core.errors import InputError, named
from blockpruner.core.settings import Frozen
from blockpruner.healing.settings import CompensationMethod
from blockpruner.params import load_params, load_run
from blockpruner.settings import Params, Target
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
        healing = [str(self.compensate)] * (self.compensate is not None) + ["train"] * self.train
        return " ".join([*(self.runs or ["all runs"]), *self.budgets, *healing])

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
        own = [
            name
            for item in (*items, *self.experiments)
            for name in pipeline
            if name.partition("@")[2] == item
        ]
        found = dict[str, None]()

        def add(name: str) -> None:
            for needed in pipeline.get(name, ()):
                add(needed)
            found.setdefault(name)

        for name in own:
            if not name.startswith(f"{TABLES}@"):
                add(name)
        return list(found)

    def summaries(self, names: Iterable[str]) -> list[str]:
        """Those over all models: the study's tables, or the report."""
        return [
            name
            for name in names
            if (name == f"{TABLES}@{self.study}" if self.study else "@" not in name)
        ]


def choose(selection: Selection) -> Chosen:
    """Check a selection against the files of the current folder; changes none of them."""
    params = load_params(PARAMS)
    runs = selection.runs or params.runs
    for run in runs:
        load_run(run)
    if selection.healing and not selection.budgets:
        words = " and ".join(selection.healing)
        message = f"{words}: for targets by budget only; name a budget, or edit {PARAMS}"
        raise InputError(message, rule="healing-without-budget")
    known = {
        (t.run, read_budget(t.budget)): name
        for name, t in params.targets.items()
        if (t.method, t.compensate, t.train) == (None, selection.compensate, selection.train)
    }
    targets = {run: [] if selection.budgets else _targets_of(run, params.targets) for run in runs}
    wanted: dict[str, dict[str, Any]] = {}
    for run, budget in product(runs, selection.budgets):
        meaning = run, read_budget(budget)
        if meaning not in known:
            known[meaning] = target_name(run, "", budget, selection.compensate, selection.train)
            wanted[known[meaning]] = {"run": run, "budget": budget, **selection.healing}
        if known[meaning] not in targets[run]:
            targets[run].append(known[meaning])
    return _chosen(params, targets, wanted, "", {})


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
        shown = {target for item in only if item in items for target in items[item][1]["target"]}
        targets = {key: target for key, target in targets.items() if key in shown}
        experiments = {key: one for key, one in experiments.items() if key in only}
    wanted = {
        key: target.model_dump(mode="json", exclude_defaults=True)
        for key, target in targets.items()
    }
    of_runs = {run: _targets_of(run, targets) for run in study.runs}
    if only or experiments:
        of_runs = {run: own for run, own in of_runs.items() if own}
    return _chosen(
        params, of_runs, wanted, name, {key: one.run for key, one in experiments.items()}
    )


def study_items(name: str) -> dict[str, tuple[str, "DataFrame"]]:
    """The tables and figures of a study, each with its title and the models that it shows."""
    from study.paper.needs import items_of  # loads much

    return items_of(
        study_frame(name), {run: load_run(run) for run in load_study(name).runs}, PUBLISHED
    )


def study_frame(name: str) -> "DataFrame":
    from study.paper.tables import models_frame

    return models_frame(rows_of_study(load_study(name), EVIDENCE))


def _targets_of(run: str, targets: Mapping[str, Target]) -> list[str]:
    return [name for name, target in targets.items() if target.run == run]


def _chosen(
    params: Params,
    targets: Mapping[str, Sequence[str]],
    wanted: Mapping[str, dict[str, Any]],
    study: str,
    experiments: Mapping[str, str],
) -> Chosen:
    """Add to params.yaml what it lacks of runs, targets, a study and its experiments; comments and
    quotes stay."""
    text, buffer = PARAMS.read_text(encoding="utf-8"), io.StringIO()
    editor = YAML()
    editor.preserve_quotes = True
    editor.width = 4096
    editor.representer.add_representer(
        type(None), lambda to, _: to.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    document = editor.load(text)
    new = {
        "run": [
            run
            for run in dict.fromkeys([*targets, *experiments.values()])
            if run not in params.runs
        ],
        "target": [name for name in wanted if name not in params.targets],
        "study": [study] if study and study not in params.studies else [],
        "experiment": [name for name in experiments if f"{study}-{name}" not in params.experiments],
    }
    document["runs"].extend(new["run"])
    if new["study"]:
        document.setdefault("studies", []).extend(new["study"])
    for name in new["experiment"]:
        own = {"study": study, "name": name, "run": experiments[name]}
        document.setdefault("experiments", {})[f"{study}-{name}"] = own
    for name, target in wanted.items():
        there = params.targets.get(name, Target(**target))
        if there != Target(**target):
            own = there.model_dump(mode="json", exclude_defaults=True)
            message = (
                f"{PARAMS}: target {name!r} exists as {own}; rename it, since {target} needs this"
                " name"
            )
            raise InputError(message, rule="target-taken", key=f"targets.{name}")
        if name in new["target"]:
            value = CommentedMap(target | {"budget": DoubleQuotedScalarString(target["budget"])})
            value.fa.set_flow_style()
            document["targets"][name] = value
    additions = tuple(f"{what} {name}" for what, names in new.items() for name in names)
    if additions:
        editor.dump(document, buffer)
        text = buffer.getvalue()
    with named(f"{PARAMS} is unchanged: "):
        load_params(PARAMS, text)
    return Chosen(
        targets,
        text,
        additions,
        study,
        {f"{study}-{name}": run for name, run in experiments.items()},
    )
