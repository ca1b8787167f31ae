"""What a study measured, read from the files of its stages into values.

Decides what the tables may use: every model once, whichever search led to it, with the scores of the same items in one
order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from blockpruner.core.budgets import read_budget
from blockpruner.core.errors import InputError
from blockpruner.core.plan import Plan
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.paper.experiments import BLOCKPRUNER, METHODS, Variant, cures, study_of, variants
from blockpruner.paper.healing import healed_of
from blockpruner.paper.published import MODELS
from blockpruner.paper.studies import DENSE, SearchRecord, load_plans, model_name
from blockpruner.reporting.findings import Finding, is_broken, recommended, stop, warnings
from blockpruner.reporting.formats import percent
from blockpruner.reporting.results import TIMED, Model, Option, Race, RunLabels, read_items
from blockpruner.settings import Run
from blockpruner.store.files import read_json
from blockpruner.study import Study

MAIN = "main"
"""The setting in which all methods are timed at the budget of Table 1."""


@dataclass(frozen=True, eq=False)
class Entry(Option):
    """A search's answer to a budget, and the model that it leads to."""

    plan: Plan
    variant: Variant
    budget: str
    search: SearchRecord
    making: float = 0.0
    """Seconds that it took to change the weights, where the method changes any."""

    @property
    def title(self) -> str:
        """Its search, and what was done after it."""
        return " + ".join((self.variant.name, *self.healing))

    @property
    def share(self) -> float:
        """The share of the parameters that was asked for; 0 where the budget is of another kind."""
        value, unit = read_budget(self.budget)
        return 0.0 if unit else value


Pairs = Sequence[tuple[Entry, Entry]]
"""(base, other) to be compared."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """All that one study found. Searches go by `Variant.slug`, methods by their keys in METHODS."""

    dense: Option
    entries: tuple[Entry, ...]
    tasks: tuple[str, ...]
    """Those of the average."""
    study: Study
    refused: Mapping[str, str]
    """Why a method has no model here, by its key in METHODS."""
    healed: tuple[Entry, ...] = ()
    """Of searches that are among `entries`, models whose weights are healed."""

    def of(self, method: str) -> tuple[Entry, ...]:
        """List the budgets of a method with nothing else varied, the least pruned first."""
        found = (entry for entry in self.entries if entry.variant.slug == method)
        return tuple(sorted(found, key=lambda entry: entry.ratio))

    def at(self, variant: str, budget: str | None) -> Entry | None:
        return next((e for e in self.entries if e.variant.slug == variant and e.budget == budget), None)

    def main(self, *methods: str) -> tuple[Entry, ...]:
        """List the entries of Table 1 of the methods that have one."""
        return tuple(e for method in methods for e in self.of(method) if e.budget == e.variant.main)

    def against(self, *others: str) -> Pairs:
        """Pair BlockPruner with each other method at the budget of Table 1."""
        return [(base, e) for base in self.main(BLOCKPRUNER) for e in self.main(*others) if e is not base]

    def shared(self, base: str, *others: str) -> Pairs:
        """Pair a method with each other one at every budget that both have."""
        return [(b, e) for other in others for e in self.of(other) if (b := self.at(base, e.budget))]

    def varied(self, method: str, factor: str) -> tuple[Entry, ...]:
        return tuple(e for e in self.entries if e.variant.factor == factor and e.variant.method == method)

    @cached_property
    def methods(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(entry.variant.method for entry in self.entries))

    @cached_property
    def searches(self) -> Mapping[str, SearchRecord]:
        return {entry.variant.slug: entry.search for entry in self.entries}

    def timed(self, setting: str) -> tuple[Entry, ...]:
        """List those with nothing else varied that were timed in a setting, by method and ratio."""
        return tuple(e for method in self.methods for e in self.of(method) if setting in e.races)

    def models(self, setting: str) -> tuple[Entry, ...]:
        """List by ratio those that were timed in a setting, plain and healed, which have the plain one's shape and so
        its times."""
        healed = (entry for entry in self.healed if setting in entry.races)
        return tuple(sorted((*self.timed(setting), *healed), key=lambda entry: entry.ratio))

    @property
    def candidates(self) -> tuple[Entry, ...]:
        """List by ratio all that were timed at all budgets, plain and healed."""
        return self.models(TIMED)

    @property
    def best(self) -> Option | None:
        """The model to stop at, if there is one."""
        return recommended(self.candidates)

    @cached_property
    def findings(self) -> list[Finding]:
        """Where to stop, and the signs of failed pruning of every method timed at all budgets."""
        timed, healed = self.timed(TIMED), (one for one in self.candidates if one.healing and is_broken(one))
        traces = {entry.method: entry for entry in timed}.values()
        return [stop(self.candidates), *warnings((*timed, *healed), list(traces))]

    def prefix(self, variant: str, budget: float) -> tuple[str, ...] | None:
        """Find the units that a search had removed when it came nearest to a share of the parameters; of two equally
        near, the more. None: it did not go so far, or removes no units."""
        own = [entry for entry in self.entries if entry.variant.slug == variant]
        longest = max(own, key=lambda entry: entry.ratio)
        if not longest.order or max(entry.share for entry in own) < budget:
            return None
        ratios = longest.plan.ratios
        steps = min(range(len(ratios)), key=lambda k: (abs(ratios[k] - budget), -ratios[k])) + 1
        return longest.plan.order[:steps]


@dataclass(frozen=True, eq=False)
class Subject:
    """A run of a set."""

    run: str
    model: str
    """Its model's name for people."""
    paper: str | None
    """Its model's name in the paper."""
    labels: RunLabels
    evidence: Evidence | None
    """None if nothing of it is computed here."""


def read_subject(name: str, run: Run, labels: RunLabels, folder: Path) -> Subject:
    """Read a run's study at `folder`.

    Raises:
        InputError: a part of it is missing or disagrees with another part; names the command that makes it.
    """
    paper = MODELS.get(getattr(run.model, "repo", ""))
    title = paper or labels.name
    evidence = _read_evidence(name, title, run, folder) if (folder / "plans").exists() else None
    return Subject(name, title, paper, labels, evidence)


def _read_evidence(name: str, subject: str, run: Run, folder: Path) -> Evidence:
    study, found, plans = study_of(run), variants(run), folder / "plans"
    _require_files(folder, found, name)
    facts, speeds = read_json(folder / "results" / "models.json"), read_json(folder / "speed" / "speed.json")
    models = _read_models(folder / "results" / "items.parquet", facts, tuple(run.evaluate.zero_shot.tasks), name)
    races = {model: {key: Race.of(v) for key, v in settings.items()} for model, settings in speeds.items()}
    dense = Option(DENSE, subject, DENSE, None, models[DENSE], models[DENSE], races[DENSE], (), ())
    entries, refused, healed = [], dict[str, str](), list[Entry]()
    for variant in found:
        digest = CalibrationSet.load(plans / variant.slug / "rows.parquet").digest
        search = SearchRecord.load(plans / variant.slug)
        if search.refused and not variant.factor:
            refused[variant.method] = search.refused
        for budget, plan in load_plans(plans, variant).items():
            key = model_name(plan, digest)
            if key not in models:
                raise InputError(
                    f"{folder / 'results'} has no model {key} ({variant.name}, {budget}), so it is of other plans; "
                    f"run `dvc repro runs/dvc.yaml:evaluate@{name}`"
                )
            entries.append(
                Entry(
                    name=f"{variant.name} at {percent(plan.ratio)}", subject=subject,
                    method=METHODS[variant.method].title, plan=plan, model=models[key], dense=dense.model,
                    races=races.get(key, {}), order=search.order,
                    curve=search.perplexities, variant=variant, budget=budget, search=search,
                    making=facts[key].get("making_seconds", 0.0),
                )
            )  # fmt: skip
    plain = {(entry.variant.slug, entry.budget): entry for entry in entries}
    for cure in cures(run):
        base, done = plain.get((cure.variant.slug, cure.budget)), healed_of(folder / "healed", cure)
        if base is None:
            continue
        if done is None:
            raise InputError(f"{folder / 'healed'} has no {cure.slug}; run `dvc repro runs/dvc.yaml:heal@{name}`")
        digest = CalibrationSet.load(plans / cure.variant.slug / "rows.parquet").digest
        key = model_name(base.plan, digest, done["digest"])
        if key not in models:
            raise InputError(
                f"{folder / 'results'} has no model {key} ({cure.slug}); run `dvc repro runs/dvc.yaml:evaluate@{name}`"
            )
        made = replace(base, plan=cure.of(base.plan), model=models[key])
        healed.append(replace(made, name=" + ".join((base.name, *made.healing))))
    return Evidence(dense, tuple(entries), tuple(run.evaluate.zero_shot.tasks), study, refused, tuple(healed))


def _require_files(folder: Path, found: tuple[Variant, ...], name: str) -> None:
    needed = {folder / "results" / "models.json": "evaluate", folder / "results" / "items.parquet": "evaluate",
              folder / "speed" / "speed.json": "speed"}  # fmt: skip
    for variant in found:
        own = folder / "plans" / variant.slug
        is_refused = (own / "search.json").exists() and SearchRecord.load(own).refused
        budgets = () if is_refused else variant.budgets
        needed |= {own / file: "search" for file in ("search.json", "rows.parquet", *(f"{b}.json" for b in budgets))}
    for path, stage in needed.items():
        if not path.exists():
            raise InputError(
                f"{path} does not exist; `python -m flows.paper` with a set that holds {name} makes it, or "
                f"`dvc repro runs/dvc.yaml:{stage}@{name}`"
            )


def _read_models(path: Path, facts: Mapping[str, Any], tasks: tuple[str, ...], name: str) -> dict[str, Model]:
    metrics = {task: facts[DENSE]["tasks"][task]["metric"] for task in tasks}
    remedy = f"dvc repro runs/dvc.yaml:evaluate@{name}"
    try:
        table = pq.read_table(path, columns=["model", "task", "item", "p_gold", *sorted(set(metrics.values()))])
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}); run `{remedy}`") from error
    items = read_items(table, metrics, path, remedy)
    return {model: Model.of(fields, fields["perplexity"], items[model]) for model, fields in facts.items()}
