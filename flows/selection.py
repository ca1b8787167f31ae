"""What a flow is asked to do: runs and budgets, the change of params.yaml they need, the stages to run.

Decides the names of added targets (`<run>-<budget>`) and how params.yaml is edited. What a value may be is
decided by blockpruner.params, which checks the new content before it is written.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import Field
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from blockpruner.errors import InputError
from blockpruner.notation import read_budget
from blockpruner.params import Frozen, Run, load_params, load_run, load_set
from blockpruner.tables import write_text

PARAMS, PIPELINE, STUDIES = Path("params.yaml"), Path("dvc.yaml"), Path("runs/dvc.yaml")


class Selection(Frozen):
    """The parameters of the flow; empty means: everything in params.yaml, as it is."""

    runs: tuple[str, ...] = Field(
        default=(), description="Names of runs/<name>.yaml; added to params.yaml if missing there. None: all its runs."
    )
    budgets: tuple[str, ...] = Field(
        default=(),
        description='Added as targets of each run, not recovered: "0.22" (share of parameters), "17blocks", "7layers", '
        '"0.30kv" (share of the KV cache), "1.25x" (speed-up). '
        "None: the runs' targets in params.yaml.",
    )


@dataclass(frozen=True)
class Plan:
    """A checked selection.

    targets: their runs by name; text: params.yaml as it has to be; additions: what is new in it, in words.
    """

    runs: tuple[str, ...]
    targets: Mapping[str, str]
    text: str
    additions: tuple[str, ...]

    def write(self) -> None:
        if self.additions:
            write_text(PARAMS, self.text)

    def stages(self) -> tuple[str, ...]:
        """DVC's names of the stages, in dvc.yaml's order: a stage there stands behind those it depends on."""
        names: list[str] = []
        for name, stage in yaml.safe_load(PIPELINE.read_text(encoding="utf-8"))["stages"].items():
            items = self.runs if "matrix" in stage else self.targets if "foreach" in stage else None
            names += [name] if items is None else [f"{name}@{item}" for item in items]
        return tuple(names)


def plan(selection: Selection) -> Plan:
    """Check a selection against the files of the current folder; changes none of them.

    Raises:
        InputError: an unknown run, a bad budget, or files that are wrong already.
    """
    params = load_params(PARAMS)
    runs = tuple(dict.fromkeys(selection.runs)) or params.runs
    for run in runs:
        load_run(run)
    editor = _editor()
    document = editor.load(PARAMS.read_text(encoding="utf-8"))
    additions = []
    for run in runs:
        if run not in params.runs:
            document["runs"].append(run)
            additions.append(f"run {run}")
    known = {(t.run, read_budget(t.budget)): name for name, t in params.targets.items() if not t.recover}
    targets = {} if selection.budgets else {name: t.run for name, t in params.targets.items() if t.run in runs}
    for run, budget in ((run, budget) for run in runs for budget in selection.budgets):
        name = known.get((run, read_budget(budget)))
        if name is None:
            name = known[run, read_budget(budget)] = f"{run}-{budget}"
            if name in params.targets:
                raise InputError(
                    f"{PARAMS}: target {name!r} exists with budget {params.targets[name].budget!r} of run "
                    f"{params.targets[name].run!r}; rename it, since budget {budget!r} needs this name"
                )
            value = CommentedMap(run=run, budget=DoubleQuotedScalarString(budget))
            value.fa.set_flow_style()
            document["targets"][name] = value
            additions.append(f"target {name}")
        targets[name] = run
    text = _dumped(editor, document)
    _check(text)
    return Plan(runs, targets, text, tuple(additions))


@dataclass(frozen=True)
class PaperPlan:
    """What has to be there for the tables of a set. text, additions: as of `Plan`."""

    name: str
    runs: Mapping[str, Run]
    text: str
    additions: tuple[str, ...]

    def write(self) -> None:
        if self.additions:
            write_text(PARAMS, self.text)

    def stages(self) -> tuple[tuple[str, ...], ...]:
        """DVC's names of the stages: of each run, and of the set, each behind those that it depends on."""
        pipeline = yaml.safe_load(STUDIES.read_text(encoding="utf-8"))["stages"]
        of_runs = [name for name, stage in pipeline.items() if "run" in stage["matrix"]]
        of_sets = [name for name in pipeline if name not in of_runs]
        chains = [tuple(f"{STUDIES}:{name}@{run}" for name in of_runs) for run in self.runs]
        return (*chains, tuple(f"{STUDIES}:{name}@{self.name}" for name in of_sets))


def paper_plan(name: str) -> PaperPlan:
    """Check a set against the files of the current folder; changes none of them.

    Raises:
        InputError: an unknown set, or files that are wrong already.
    """
    params, runs = load_params(PARAMS), load_set(name)
    wanted = {"studies": tuple(runs), "sets": (name,)}
    editor = _editor()
    document = editor.load(PARAMS.read_text(encoding="utf-8"))
    additions = []
    for key, names in wanted.items():
        listed = document.setdefault("paper", CommentedMap()).setdefault(key, [])
        for missing in (one for one in names if one not in getattr(params.paper, key)):
            listed.append(missing)
            additions.append(f"{'set' if key == 'sets' else 'study'} {missing}")
    text = _dumped(editor, document)
    _check(text)
    return PaperPlan(name, runs, text, tuple(additions))


def _editor() -> YAML:
    editor = YAML()
    editor.preserve_quotes = True
    editor.width = 4096
    return editor


def _dumped(editor: YAML, document: CommentedMap) -> str:
    buffer = io.StringIO()
    editor.dump(document, buffer)
    return buffer.getvalue()


def _check(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / PARAMS
        draft.write_text(text, encoding="utf-8")
        try:
            load_params(draft)
        except InputError as error:
            raise InputError(f"{str(error).replace(str(draft), str(PARAMS))}; {PARAMS} is unchanged") from None
