"""What the targets of a study measured, read from data/evidence into values.

Decides what the tables may use. A target without evidence, or with evidence that cannot be compared
with its dense model, has a reason in its place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from blockpruner.core.errors import InputError
from blockpruner.core.plan import Plan
from blockpruner.methods.recipes import recipe
from blockpruner.reporting.paper.published import DENSE
from blockpruner.reporting.results import Model, Race, RunLabels, read_items, read_results
from blockpruner.settings import Target
from blockpruner.store.plans import load_plan

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
    found: Measured | None
    reason: str = ""
    """Why it was not measured."""

    @property
    def title(self) -> str:
        """Its method, and what was done after it."""
        title = DENSE if self.method == DENSE else recipe(self.method).title
        return " + ".join(filter(None, (title, self.healing)))


def read_rows(
    subjects: Sequence[Subject], asked: Mapping[str, Target], evidence: Path
) -> list[Row]:
    """Read the dense model and all targets of each run; `asked` has all filled in that their run
    decides."""
    rows: list[Row] = []
    for subject in subjects:
        name = f"{subject.run}-dense"
        dense, reason = _measured(evidence / name, None)
        rows.append(Row(name, subject, DENSE, "", "", dense, reason))
        for target, one in ((t, a) for t, a in asked.items() if a.run == subject.run):
            found, why = None, f"its dense model has no results: {reason}"
            if dense is not None:
                found, why = _measured(evidence / target, evidence / name)
            assert one.method and one.compensate, target
            healing = [
                *(() if one.compensate == "none" else (one.compensate,)),
                *(("training",) if one.train else ()),
            ]
            rows.append(
                Row(target, subject, one.method, " + ".join(healing), one.budget, found, why)
            )
    return rows


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
    metrics = {
        task: tasks[task]["metric"] for task in (FIVE if tasks.keys() >= set(FIVE) else tasks)
    }
    items = read_items([folder] if dense is None else [folder, dense], metrics)
    plan = None if dense is None else load_plan(folder / "plan.json")
    race = Race.of(facts["speed"]) if facts["speed"] else None
    return Measured(Model.of(facts, items[folder.name]), plan, race, facts["search"])
