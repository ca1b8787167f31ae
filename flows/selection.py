"""What a flow is asked to do: runs and budgets, the change of params.yaml they need, the stages to run.

Decides the form that the UI shows, the names of added targets (`<run>-<budget>`, and how they are healed) and how
params.yaml is edited. What a value may be is decided by blockpruner.params, which checks the new content before it is
written. How far a model can be pruned is decided by blockpruner.core.budgets, which the stage score asks, too.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from blockpruner.core.budgets import read_budget
from blockpruner.core.errors import InputError
from blockpruner.core.families import Config
from blockpruner.core.settings import CompensationMethod, Frozen, Params, Run
from blockpruner.methods.registry import require_budgets
from blockpruner.params import load_params, load_run, run_names
from blockpruner.store.files import read_json, write_text
from blockpruner.store.manifest import SOURCE_FILE
from flows.dvc import require_remote

PARAMS, PIPELINE = Path("params.yaml"), Path("dvc.yaml")
MODELS = Path("data/models")
BUDGET = r"^(0*\.\d+(kv)?|0*[1-9]\d*(blocks|layers)|\d*\.?\d+x)$"
"""What a form takes as a budget. What a model can reach is known when it is fetched."""

BUDGETS = (
    "0.22 (a share of all parameters), 17blocks, 7layers, 0.30kv (a share of the KV cache), 1.25x (a speed-up of "
    "generation)"
)

SWEEP_BUDGETS = ("0.05", "0.1", "0.15", "0.2", "0.25")


def offer_runs(schema: dict[str, Any]) -> None:
    """Name the run files that exist when the form is made; the flow checks which of them are good."""
    schema["items"]["enum"] = run_names()
    schema["uniqueItems"] = True


def check_budgets(schema: dict[str, Any]) -> None:
    schema["items"]["pattern"] = BUDGET
    schema["uniqueItems"] = True


class Selection(Frozen):
    """What to bring up to date; nothing chosen means everything in params.yaml, as it is."""

    runs: tuple[str, ...] = Field(
        default=(),
        description="Names of the files in runs/; added to params.yaml if missing there. None: all its runs.",
        json_schema_extra=offer_runs,
    )
    budgets: tuple[str, ...] = Field(
        default=(),
        description=f"How far to prune: {BUDGETS}. Each is added as a target of each run. None: the runs' targets in "
        "params.yaml.",
        json_schema_extra=check_budgets,
    )
    compensate: CompensationMethod | None = Field(
        default=None,
        description="How the weights of these targets make up for what is gone, without training. None: as their run's "
        "file says.",
    )
    recover: bool = Field(
        default=False, description="Whether these targets are trained, by the recover section of their run's file."
    )
    push: str | None = Field(
        default=None,
        description="A remote of DVC (`dvc remote list`), which gets what was made when all is done. None: no push.",
    )

    @property
    def healing(self) -> dict[str, Any]:
        """What a target of it has in params.yaml beside run and budget."""
        return self.model_dump(include={"compensate", "recover"}, exclude_defaults=True)


class RunGrid(Frozen):
    """Every run with every budget, one run after the other; one that fails does not stop the others."""

    runs: tuple[str, ...] = Field(
        min_length=1,
        description="Names of the files in runs/, in the order in which they are pruned; added to params.yaml if "
        "missing there.",
        json_schema_extra=offer_runs,
    )
    budgets: tuple[str, ...] = Field(
        default=SWEEP_BUDGETS,
        min_length=1,
        description=f"How far to prune each: {BUDGETS}. A greedy search is made once, as far as the largest needs.",
        json_schema_extra=check_budgets,
    )
    stop_on_failure: bool = Field(default=False, description="Leave out what comes after the first failure.")


@dataclass(frozen=True)
class Chosen:
    """A checked selection."""

    runs: tuple[str, ...]
    targets: Mapping[str, str]
    """The targets to build, each with its run."""
    before: str
    """params.yaml as it was."""
    new_runs: tuple[str, ...]
    new_targets: Mapping[str, dict[str, Any]]
    """The targets that params.yaml has not, each as it stands there."""

    @property
    def additions(self) -> tuple[str, ...]:
        """What params.yaml lacks, in words."""
        return (*(f"run {run}" for run in self.new_runs), *(f"target {target}" for target in self.new_targets))

    def write(self) -> None:
        """Add to params.yaml what it lacks: DVC makes its stages out of it, and no stage runs before."""
        if self.additions:
            write_text(PARAMS, self.text())

    def keep(self, built: Collection[str]) -> bool:
        """Leave of the additions only these targets and their runs; False if somebody has changed the file."""
        is_ours = PARAMS.read_text(encoding="utf-8") == self.text()
        if is_ours and self.additions:
            write_text(PARAMS, self.text(built))
        return is_ours

    def text(self, built: Collection[str] | None = None) -> str:
        """params.yaml with all additions, or with these targets and their runs only."""
        targets = {name: new for name, new in self.new_targets.items() if built is None or name in built}
        needed = {target["run"] for target in targets.values()}
        runs = [run for run in self.new_runs if built is None or run in needed]
        if not runs and not targets:
            return self.before
        editor, document = _document(self.before)
        document["runs"].extend(runs)
        for name, target in targets.items():
            value = CommentedMap(target | {"budget": DoubleQuotedScalarString(target["budget"])})
            value.fa.set_flow_style()
            document["targets"][name] = value
        return _dumped(editor, document)

    def stages(self) -> tuple[str, ...]:
        """DVC's names of the stages, in dvc.yaml's order: each stands there behind those that it depends on."""
        names: list[str] = []
        for name, stage in yaml.safe_load(PIPELINE.read_text(encoding="utf-8"))["stages"].items():
            items = self.runs if "matrix" in stage else self.targets if "foreach" in stage else None
            names += [name] if items is None else [f"{name}@{item}" for item in items]
        return tuple(names)

    def targets_of(self, run: str) -> tuple[str, ...]:
        return tuple(target for target, of in self.targets.items() if of == run)

    def stages_of(self, item: str) -> tuple[str, ...]:
        """The stages of one run or one target; of "" those of neither: the report."""
        return tuple(stage for stage in self.stages() if stage.partition("@")[2] == item)


def choose(selection: Selection) -> Chosen:
    """Check a selection against the files of the current folder; changes none of them.

    Raises:
        InputError: an unknown run or remote, a bad budget, one that the run's fetched model cannot reach, or files that
            are wrong already.
    """
    params = load_params(PARAMS)
    runs = {run: load_run(run) for run in selection.runs or params.runs}
    if selection.push is not None:
        require_remote(selection.push)
    healing = selection.healing
    if healing and not selection.budgets:
        raise InputError(f"{' and '.join(healing)}: for targets by budget only; name a budget, or edit {PARAMS}")
    ending = "".join(f"-{'trained' if value is True else value}" for value in healing.values())
    known = {
        (t.run, read_budget(t.budget)): name
        for name, t in params.targets.items()
        if (t.compensate, t.recover) == (selection.compensate, selection.recover)
    }
    targets = {} if selection.budgets else {name: t.run for name, t in params.targets.items() if t.run in runs}
    new_targets: dict[str, dict[str, Any]] = {}
    for run, budget in ((run, budget) for run in runs for budget in selection.budgets):
        name = known.get((run, read_budget(budget)))
        if name is None:
            name = known[run, read_budget(budget)] = f"{run}-{budget}{ending}"
            if name in params.targets:
                raise InputError(
                    f"{PARAMS}: target {name!r} exists with budget {params.targets[name].budget!r} of run "
                    f"{params.targets[name].run!r}; rename it, since budget {budget!r} needs this name"
                )
            new_targets[name] = {"run": run, "budget": budget, **healing}
        targets[name] = run
    new_runs = tuple(run for run in runs if run not in params.runs)
    chosen = Chosen(tuple(runs), targets, PARAMS.read_text(encoding="utf-8"), new_runs, new_targets)
    new = _check(chosen.text())
    for run, settings in runs.items():
        _require_reachable(run, settings, new.budgets_of(run))
    return chosen


def _require_reachable(run: str, settings: Run, budgets: Sequence[str]) -> None:
    """Refuse what the stage score would refuse, where the config of a fetched model is enough to tell.

    A speed-up is not refused: it is measured first.
    """
    config = _fetched_config(run, settings)
    if config is None:
        return
    try:
        require_budgets(settings.score, config, tuple(budgets))
    except InputError as error:
        raise InputError(f"run {run}: {error}; {PARAMS} is unchanged") from None


def _fetched_config(run: str, settings: Run) -> Config | None:
    """The config of the run's model; None if no model is fetched, or another one than the run's file names now."""
    source, wanted = MODELS / run / SOURCE_FILE, settings.model.model_dump(exclude={"dtype"}, exclude_none=True)
    if not source.exists() or not wanted.items() <= read_json(source)["source"].items():
        return None
    config: Config = read_json(source.with_name("config.json"))
    return config


def _document(text: str) -> tuple[YAML, CommentedMap]:
    """YAML that keeps its comments and quotes when it is dumped again."""
    editor = YAML()
    editor.preserve_quotes = True
    editor.width = 4096
    editor.representer.add_representer(type(None), lambda to, _: to.represent_scalar("tag:yaml.org,2002:null", "null"))
    return editor, editor.load(text)


def _dumped(editor: YAML, document: CommentedMap) -> str:
    buffer = io.StringIO()
    editor.dump(document, buffer)
    return buffer.getvalue()


def _check(text: str) -> Params:
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / PARAMS
        draft.write_text(text, encoding="utf-8")
        try:
            return load_params(draft)
        except InputError as error:
            raise InputError(f"{str(error).replace(str(draft), str(PARAMS))}; {PARAMS} is unchanged") from None
