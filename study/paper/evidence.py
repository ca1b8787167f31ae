"""What the targets of a study measured, read from data/evidence into values.

Decides what the tables may use. A target without evidence, or with evidence that cannot be compared
with its dense model, has a reason in its place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from blockpruner.config.sections import Target
from blockpruner.core.errors import InputError
from blockpruner.core.plan import Plan
from blockpruner.methods.recipes import recipe
from blockpruner.reporting.results import Model, Race, RunLabels, read_items, read_results
from blockpruner.store.plans import load_plan
from study.paper.published import DENSE

FIVE = ("piqa", "winogrande", "hellaswag", "arc_easy", "arc_challenge")
"""The tasks of the paper's average. Where all were measured, the average is theirs, whatever else
was measured."""


@dataclass(frozen=True)
class Subject:
    """A run of a study."""

    run: str
    labels: RunLabels
    paper: str | None = None
    """Its model's name in the paper."""
    texts: str = ""
    """Where its calibration is from."""
    samples: int | None = None
    """How many samples that has; None where it has so many rows."""

    @property
    def model(self) -> str:
        """Its model's name for people."""
        return self.paper or self.labels.name


@dataclass(frozen=True, eq=False)
class Measured:
    """What was measured of a model."""

    result: Model
    plan: Plan | None
    """None for a dense model."""
    race: Race | None
    """None where it was not timed."""
    search: Mapping[str, float]
    """What its search took: seconds, trials_asked, trials_computed; empty where it is not known."""


@dataclass(frozen=True, eq=False)
class Row:
    """A target of a study, or the dense model of a run."""

    target: str
    subject: Subject
    method: str
    """The name of a recipe, or DENSE."""
    healing: str
    """What was done to the weights that are left; "" for nothing."""
    budget: str
    measured: Measured | None
    reason: str = ""
    """Why it was not measured."""

    @property
    def steps(self) -> list[str]:
        """What was done to the weights, in order."""
        return self.healing.split(" + ")

    @property
    def title(self) -> str:
        """Its method, and what was done after it."""
        title = DENSE if self.method == DENSE else recipe(self.method).title
        return f"{title} + {self.healing}" if self.healing else title


def read_rows(
    subjects: Sequence[Subject], targets: Mapping[str, Target], evidence: Path
) -> list[Row]:
    """Read the dense model and all targets of each run; `targets` have all filled in that their run
    decides."""
    rows: list[Row] = []
    for subject in subjects:
        name = f"{subject.run}-dense"
        dense, dense_reason = _measured(evidence / name, None)
        rows.append(Row(name, subject, DENSE, "", "", dense, dense_reason))
        for target, settings in targets.items():
            if settings.run != subject.run:
                continue
            measured, reason = None, f"its dense model has no results: {dense_reason}"
            if dense is not None:
                measured, reason = _measured(evidence / target, evidence / name)
            assert settings.method, target
            healing, budget = _healing(settings), settings.budget
            rows.append(Row(target, subject, settings.method, healing, budget, measured, reason))
    return rows


def _healing(target: Target) -> str:
    assert target.compensate, target
    steps: list[str] = []
    if target.compensate != "none":
        steps.append(target.compensate)
    if target.train:
        steps.append("training")
    return " + ".join(steps)


def _measured(folder: Path, dense: Path | None) -> tuple[Measured | None, str]:
    try:
        return _read(folder, dense), ""
    except InputError as error:
        return None, str(error)


def _read(folder: Path, dense: Path | None) -> Measured:
    """Read one model; `dense` is the folder of the model that it is compared with. Raises
    InputError if it has no results, a file is damaged, or its items are other ones than those of
    the dense model."""
    if not (folder / "results.json").exists():
        raise InputError("not measured yet")
    facts = read_results(folder)
    tasks = facts["tasks"]
    # The paper's average is of five tasks, also where more were measured.
    in_average = FIVE if tasks.keys() >= set(FIVE) else tuple(tasks)
    metrics = {task: tasks[task]["metric"] for task in in_average}
    # Read together, so that other items than those of the dense model are refused.
    folders = [folder] if dense is None else [folder, dense]
    model = Model.of(facts, read_items(folders, metrics)[folder.name])
    plan = None if dense is None else load_plan(folder / "plan.json")
    race = Race.of(facts["speed"]) if facts["speed"] else None
    return Measured(model, plan, race, facts["search"])
