"""What the report of targets is made of, read from the files of earlier stages into values.

Decides what the report may use. A candidate that was scored on some of the calibration rows only (it lost a race) is
counted and goes no further: no ranking, minimum or heat map can see it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import pyarrow as pa

from blockpruner.core.blocks import DENSE, BlockId, BlockKind, Mask, format_mask, parse_mask
from blockpruner.core.errors import InputError
from blockpruner.core.plan import Plan
from blockpruner.evaluation.store import ITEMS, read_results
from blockpruner.methods.registry import KINDS
from blockpruner.reporting.results import (
    TIMED,
    Model,
    Option,
    Race,
    RunLabels,
    TaskScore,
    read_items,
)
from blockpruner.scoring.metrics import METRICS
from blockpruner.scoring.stability import Stability, stability
from blockpruner.search.trace import ITERATION
from blockpruner.store.files import read_json, read_table
from blockpruner.store.plans import load_plan

ITERATIONS = pa.schema([pa.field("iteration", pa.int32(), nullable=False), *ITERATION])


@dataclass(frozen=True)
class Removal:
    """One iteration of a search."""

    added: Mask
    """The unit that it removed."""
    before: float
    perplexity: float
    """On the calibration rows, before and after the removal."""
    rise: float
    """ln of the quotient of the two, nats per token."""
    ratio: float
    """Cumulative share of the parameters removed."""
    costs: Mapping[Mask, float]
    """Of every unit scored on all rows, in the unit of the search's metric: its influence, or what its removal adds
    to the loss."""
    partial: int
    """How many units were scored on some rows only."""
    candidates: int
    """How many units could have been removed; 0 where no score was asked for."""
    work: float
    """How many units' worth of rows were scored."""
    lazy_choice: Mask | None
    """What would have been removed before an audit let all candidates enter; None without an audit."""
    stability: Stability | None
    """How firmly the calibration rows decide it; None where they cannot tell, or a price decided too."""


@dataclass(frozen=True)
class Coverage:
    """All that a search looked at, whatever its steps are made of."""

    unit: str
    """What it removed at once, in words."""
    steps: int
    """Iterations in which something was scored."""
    complete: int
    partial: int
    """Masks scored on all rows, and on the first rows only."""


@dataclass(frozen=True, eq=False)
class PrunedOption(Option):
    """A pruned model, and how the search got there."""

    plan: Plan
    removals: tuple[Removal, ...]
    """Empty where the plan has no sequence of removals."""
    considered: Coverage | None
    """None where no masks were compared."""
    compensation: Mapping[str, Any]
    """The report of its compensation; empty where the plan asks for none."""
    checkpoints: tuple[Path, ...]
    """A folder for each format."""

    @property
    def helped(self) -> bool:
        """Tell whether compensation changed weights: the rows that it held out were better by it."""
        return (
            bool(self.compensation)
            and self.compensation["perplexity"]["after"] < self.compensation["perplexity"]["before"]
        )

    @property
    def healing(self) -> tuple[str, ...]:
        asked = super().healing
        return asked[1:] if self.compensation and not self.helped else asked


@dataclass(frozen=True, eq=False)
class ReportedRun:
    """One run: its dense model, and the targets made from it, the least pruned first."""

    run: str
    labels: RunLabels
    dense: Option
    targets: tuple[PrunedOption, ...]
    chance: Mapping[str, float]
    """What guessing scores, by task of the average."""
    counts: Mapping[str, Any]
    """Of the run's `score` stage; empty where its searches compare no masks, or it did not run here."""

    @property
    def options(self) -> tuple[Option, ...]:
        return self.dense, *self.targets

    @property
    def scores(self) -> Mapping[str, TaskScore]:
        """The dense model's scores by task of the average."""
        return {task: self.dense.model.tasks[task] for task in self.chance}

    @property
    def average_chance(self) -> float:
        return mean(self.chance.values())

    @property
    def traces(self) -> tuple[PrunedOption, ...]:
        """Find the targets whose removal sequence is not the beginning of another's; nested searches have one."""
        longest = {target.plan.order: target for target in self.targets if target.removals}
        return tuple(
            target
            for own, target in longest.items()
            if not any(len(order) > len(own) and order[: len(own)] == own for order in longest)
        )


def read_studies(targets: Sequence[str], labels: Mapping[str, RunLabels], data: Path) -> list[ReportedRun]:
    """Read everything about `targets`, grouped by run in order of appearance.

    Raises:
        InputError: a file is missing, damaged, or disagrees with another.
    """
    plans = {name: load_plan(data / "plans" / name / "plan.json") for name in targets}
    runs = dict.fromkeys(plan.run for plan in plans.values())
    return [_read_study(run, labels[run], {n: p for n, p in plans.items() if p.run == run}, data) for run in runs]


def _read_study(run: str, labels: RunLabels, plans: Mapping[str, Plan], data: Path) -> ReportedRun:
    names = sorted(plans, key=lambda name: (plans[name].ratio, plans[name].train, plans[name].compensate, name))
    searches = {name: _read_search(plans[name], data / "plans" / name / "iterations.parquet") for name in names}
    folders = {name: data / "results" / name for name in (f"{run}-dense", *names)}
    facts = {name: read_results(folder, data / "timings") for name, folder in folders.items()}
    models = _read_models(folders, facts)
    timed = all(fields["speed"] for fields in facts.values())
    races = {name: {TIMED: Race.of(fields["speed"])} if timed else {} for name, fields in facts.items()}
    calibrations = [plan.calibration for plan in plans.values()]
    known = [found["dense_perplexity"] for found in calibrations if found["perplexity"] is not None]
    dense = Option(
        name="dense", subject=labels.model, method="", plan=None, model=models[f"{run}-dense"],
        dense=models[f"{run}-dense"], races=races[f"{run}-dense"], order=(), curve=tuple(known[:1]),
    )  # fmt: skip
    found = []
    for name in names:
        plan, (removed, looked) = plans[name], searches[name]
        words = KINDS[plan.kind].words(plan, looked.unit if looked else "")
        report = data / "compensated" / name / "compensate.json"
        curve = (removed[0].before, *(removal.perplexity for removal in removed)) if removed else ()
        found.append(
            PrunedOption(
                name=name, subject=labels.model, method=words, plan=plan, model=models[name], dense=dense.model,
                races=races[name], order=plan.order, curve=curve, removals=removed, considered=looked,
                compensation={} if plan.compensate == "none" else read_json(report),
                checkpoints=tuple(data / "checkpoints" / name / form for form in facts[name].get("formats", ())),
            )
        )  # fmt: skip
    chance = {task: value for task, value in facts[f"{run}-dense"]["chance"].items() if value is not None}
    counted = data / "timings" / f"{run}-search.json"
    counts = read_json(counted) if any(target.considered for target in found) and counted.exists() else {}
    return ReportedRun(run, labels, dense, tuple(found), chance, counts)


def _read_search(plan: Plan, path: Path) -> tuple[tuple[Removal, ...], Coverage | None]:
    """Read how a search came to a plan; there is nothing where it removes no blocks."""
    if not plan.removed:
        return (), None
    rows = read_iterations(path)
    if plan.nested:
        return removals(rows, plan, path), considered(rows)
    last = max((row["iteration"] for row in rows if row["chosen"]), default=None)
    answer = [row["removed"] for row in rows if row["chosen"] and row["iteration"] == last]
    _require_same([format_mask(mask) for mask in answer], plan.order, path)
    return (), considered(rows)


def read_iterations(path: Path) -> list[dict[str, Any]]:
    """Read a plan's iteration tables with their masks parsed, without the NLL of each calibration row."""
    table, _ = read_table(path, ITERATIONS)
    rows: list[dict[str, Any]] = table.drop(["row_nll"]).to_pylist()
    for row in rows:
        row["removed"] = parse_mask(",".join(row["removed"]))
        row["added"] = None if row["added"] is None else parse_mask(row["added"])
    return rows


def removals(rows: Sequence[Mapping[str, Any]], plan: Plan, path: Path) -> tuple[Removal, ...]:
    """List the removals of a plan whose search is nested, in order.

    Raises:
        InputError: the rows of `path` do not lead to the plan's order of removal.
    """
    complete = [row for row in rows if row["rows_used"] == row["rows_total"]]
    losses = {row["removed"]: row["loss"] for row in complete}
    # only of what was chosen: the perplexity of a mask that lost a race is of its first rows
    perplexities = {row["removed"]: row["perplexity"] for row in rows if row["chosen"] or row["removed"] == DENSE}
    metric = METRICS[plan.metric]
    is_priced = plan.options.get("per", "none") != "none"
    found: list[Removal] = []
    row_losses: dict[Mask, Sequence[float]] = {}  # a one-shot search ranks once
    base = DENSE
    first = 0
    for index, ratio in enumerate(plan.ratios):
        own = [row for row in rows if row["added"] is not None and row["iteration"] == index]
        first = first or len(own)
        chosen = [row for row in own if row["chosen"] and row["rows_used"] in (0, row["rows_total"])]
        if len(chosen) != 1 or perplexities.get(base) is None or chosen[0]["perplexity"] is None:
            raise InputError(
                f"{path} has {len(chosen)} fully scored choices in iteration {index}, or no perplexity of one or of "
                "what was before it; exactly one is valid: delete the file and run `dvc repro`"
            )
        mask = chosen[0]["removed"]
        costs = {
            row["added"]: row["loss"] - (0.0 if metric.influence else losses.get(base, math.nan))
            for row in own
            if row["rows_used"] == row["rows_total"] and row["removed"] == base | row["added"]
        }
        before, after = perplexities[base], chosen[0]["perplexity"]
        is_nll = metric.is_nll and mask - base in costs
        row_losses = {row["added"]: row["row_loss"] for row in own if row["row_loss"]} or row_losses
        found.append(
            Removal(
                added=mask - base,
                before=before,
                perplexity=after,
                rise=costs[mask - base] if is_nll else math.log(after / before),
                ratio=ratio,
                costs=costs,
                partial=sum(0 < row["rows_used"] < row["rows_total"] for row in own),
                # all enter the first iteration; later ones may leave some out
                candidates=max(first - index, len(own)) if any(row["rows_used"] for row in own) else 0,
                work=sum(row["rows_used"] / row["rows_total"] for row in own),
                lazy_choice=next((row["added"] for row in own if row["lazy_choice"]), None),
                stability=None if is_priced else stability(row_losses, mask - base),
            )
        )
        row_losses = {unit: losses for unit, losses in row_losses.items() if unit != mask - base}
        base = mask
    _require_same([format_mask(removal.added) for removal in found], plan.order, path)
    return tuple(found)


def considered(rows: Sequence[Mapping[str, Any]]) -> Coverage:
    """Sum up what all iterations of one search looked at. A search without scores hides which kinds of
    block it may remove."""
    masks = [row["removed"] for row in rows if row["removed"]]
    scored = [row for row in rows if row["removed"] and row["rows_used"]]
    complete = {row["removed"] for row in scored if row["rows_used"] == row["rows_total"]}
    kinds = {block.kind for row in scored for block in row["removed"]}
    if all(BlockId(kind, block.layer) in mask for mask in masks for block in mask for kind in BlockKind):
        unit = "whole layers"
    else:
        unit = f"{next(iter(kinds)).upper()} blocks" if len(kinds) == 1 else "blocks"
    return Coverage(
        unit=unit,
        steps=len({row["iteration"] for row in scored}),
        complete=len(complete),
        partial=len({row["removed"] for row in scored} - complete),
    )


def _require_same(removed: Sequence[str], order: Sequence[str], path: Path) -> None:
    if list(removed) != list(order):
        raise InputError(
            f"{path} removes {', '.join(removed)}; the plan beside it removes {', '.join(order)}: they are of "
            "different searches; delete both and run `dvc repro`"
        )


def _read_models(folders: Mapping[str, Path], facts: Mapping[str, Any]) -> dict[str, Model]:
    """Read the dense model of a run, which comes first, and its targets, all evaluated on the same items."""
    dense = next(iter(folders))
    metrics = {
        name: task["metric"]
        for name, task in facts[dense]["tasks"].items()
        if facts[dense]["chance"][name] is not None  # null: a perplexity
    }
    if not metrics:
        raise InputError(
            f"{folders[dense] / 'results.json'} has no task that is scored by accuracy, and a report gives their "
            f"average; name one in evaluate.zero_shot.tasks beside {', '.join(facts[dense]['tasks'])}"
        )
    tables = []
    for name, folder in folders.items():
        table = read_table(folder / "items.parquet", ITEMS)[0].drop(["loglikelihoods"])
        tables.append(table.append_column("model", pa.array([name] * table.num_rows)))
    items = read_items(pa.concat_tables(tables), metrics, folders[dense].parent, "dvc repro")
    return {name: Model.of(fields, {"heldout": fields["perplexity"]}, items[name]) for name, fields in facts.items()}
