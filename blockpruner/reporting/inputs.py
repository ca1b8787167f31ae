"""What the report of targets is made of, read from the files of earlier stages into values.

Decides what the report may use.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa

from blockpruner.core.blocks import (
    BlockId,
    BlockKind,
    Mask,
    format_mask,
    parse_mask,
    removable_units,
)
from blockpruner.core.errors import InputError
from blockpruner.core.plan import Plan
from blockpruner.methods.registry import KINDS
from blockpruner.reporting.results import Model, Option, Race, RunLabels, read_items, read_results
from blockpruner.search.registry import SEARCHES
from blockpruner.search.trace import ITERATION
from blockpruner.store.files import read_json, read_table
from blockpruner.store.plans import load_plan

ITERATIONS = pa.schema([pa.field("iteration", pa.int32(), nullable=False), *ITERATION])


@dataclass(frozen=True)
class SearchStep:
    """What a search had removed at one time, and the calibration perplexity without it."""

    mask: Mask
    perplexity: float


@dataclass(frozen=True, eq=False, kw_only=True)
class PrunedOption(Option):
    """A pruned model, and how the search got there."""

    plan: Plan
    steps: tuple[SearchStep, ...]
    """From the dense model on; empty where no blocks are removed."""
    compensation: Mapping[str, Any]
    """The report of its compensation; empty where the plan asks for none."""
    checkpoints: tuple[Path, ...]
    """A folder for each format."""

    @property
    def helped(self) -> bool:
        """Whether compensation changed weights: the rows that it held out were better by it."""
        found = self.compensation.get("perplexity")
        return found is not None and found["after"] < found["before"]

    @property
    def own_rise(self) -> float | None:
        """ln(PPL / dense PPL), nats per token, on the calibration rows or, where it is compensated,
        on those that the fit held out; None where the search asked for no scores."""
        if self.helped:
            return math.log(
                self.compensation["perplexity"]["after"] / self.compensation["perplexity"]["dense"]
            )
        asked = self.plan.method in SEARCHES and SEARCHES[self.plan.method].asks != "nothing"
        found = self.plan.calibration if asked else {}
        return (
            math.log(found["perplexity"] / found["dense_perplexity"])
            if found.get("perplexity")
            else None
        )

    @property
    def healing(self) -> tuple[str, ...]:
        compensated = self.plan.compensate != "none" and (self.helped or not self.compensation)
        return (*[self.plan.compensate] * compensated, *["training"] * self.plan.train)


@dataclass(frozen=True, eq=False)
class ReportedRun:
    """One run: its dense model, and the targets made from it, the least pruned first."""

    run: str
    labels: RunLabels
    dense: Option
    targets: tuple[PrunedOption, ...]
    chance: Mapping[str, float]
    """What guessing scores, by task."""

    @property
    def options(self) -> tuple[Option, ...]:
        return self.dense, *self.targets

    @property
    def traces(self) -> tuple[PrunedOption, ...]:
        """Find the targets whose removal sequence is not the beginning of another's; nested
        searches have one."""
        longest = {target.plan.order: target for target in self.targets if target.curve}
        return tuple(
            target
            for own, target in longest.items()
            if not any(len(order) > len(own) and order[: len(own)] == own for order in longest)
        )

    @property
    def searches(self) -> tuple[PrunedOption, ...]:
        """Find one target for each search: the traces, and every search that is not nested."""
        others = {
            target.steps: target for target in self.targets if target.steps and not target.curve
        }
        return (*self.traces, *others.values())


def read_runs(
    targets: Sequence[str], labels: Mapping[str, RunLabels], data: Path
) -> list[ReportedRun]:
    """Read everything about `targets`, grouped by run in order of appearance. `data` is the folder
    of evidence/, plans/ (for the iteration tables), compensated/ and checkpoints/. Raises
    InputError if a file is missing, damaged, or disagrees with another."""
    plans = {name: load_plan(data / "evidence" / name / "plan.json") for name in targets}
    runs = dict.fromkeys(plan.run for plan in plans.values())
    return [
        _read_run(run, labels[run], {n: p for n, p in plans.items() if p.run == run}, data)
        for run in runs
    ]


def _read_run(run: str, labels: RunLabels, plans: Mapping[str, Plan], data: Path) -> ReportedRun:
    names = sorted(
        plans, key=lambda name: (plans[name].ratio, plans[name].train, plans[name].compensate, name)
    )
    folders = {name: data / "evidence" / name for name in (f"{run}-dense", *names)}
    facts = {name: read_results(folder) for name, folder in folders.items()}
    dense_tasks = facts[f"{run}-dense"]["tasks"]
    items = read_items(
        [*folders.values()], {task: found["metric"] for task, found in dense_tasks.items()}
    )
    models = {name: Model.of(fields, items[folders[name].name]) for name, fields in facts.items()}
    timed = all(fields["speed"] for fields in facts.values())
    races = {name: Race.of(fields["speed"]) if timed else None for name, fields in facts.items()}
    calibrations = [plan.calibration for plan in plans.values()]
    known = (found["dense_perplexity"] for found in calibrations if found["perplexity"] is not None)
    dense = Option(
        name="dense",
        method="",
        plan=None,
        model=models[f"{run}-dense"],
        dense=models[f"{run}-dense"],
        timed=races[f"{run}-dense"],
        calibration_perplexity=next(known, None),
    )
    found = []
    for name in names:
        plan = plans[name]
        healing = read_json(data / "compensated" / name / "compensate.json")
        steps, unit = tuple[SearchStep, ...](), ""
        if plan.removed:
            path = data / "plans" / name / f"{healing['search']}.parquet"
            rows = read_iterations(path)
            steps, unit = steps_of(rows, plan, path), unit_of(rows)
        found.append(
            PrunedOption(
                name=name,
                method=KINDS[plan.kind].words(plan, unit),
                plan=plan,
                model=models[name],
                dense=dense.model,
                timed=races[name],
                steps=steps,
                calibration_perplexity=plan.calibration["perplexity"],
                curve=tuple(step.perplexity for step in steps) if plan.nested else (),
                compensation=healing if "perplexity" in healing else {},
                checkpoints=tuple(
                    data / "checkpoints" / name / form for form in facts[name]["formats"]
                ),
            )
        )
    return ReportedRun(run, labels, dense, tuple(found), facts[f"{run}-dense"]["chance"])


def read_iterations(path: Path) -> list[dict[str, Any]]:
    """Read a plan's iteration tables with their masks parsed, without the NLL of each calibration
    row."""
    table, _ = read_table(path, ITERATIONS)
    rows: list[dict[str, Any]] = table.drop(["row_nll"]).to_pylist()
    for row in rows:
        row["removed"] = parse_mask(",".join(row["removed"]))
        row["added"] = None if row["added"] is None else parse_mask(row["added"])
    return rows


def steps_of(rows: Sequence[Mapping[str, Any]], plan: Plan, path: Path) -> tuple[SearchStep, ...]:
    """List the steps of a plan's search, from the dense model on; one that changed nothing is left
    out. Raises InputError if the rows of `path` do not lead to the plan's removals."""
    dense = [row for row in rows if not row["removed"]][:1]
    chosen = [row for row in rows if row["chosen"] and row["rows_used"] in (0, row["rows_total"])]
    found: list[Mapping[str, Any]] = []
    for row in (*dense, *sorted(chosen, key=lambda row: row["iteration"])):
        if not found or found[-1]["removed"] != row["removed"]:
            found.append(row)
    masks = [row["removed"] for row in found]
    order = [format_mask(mask - before) for before, mask in pairwise(masks)]
    leads = order == list(plan.order) if plan.nested else masks[-1:] == [plan.mask]
    if not leads or not dense or None in [row["perplexity"] for row in found]:
        lacks = (
            "does not have one fully scored choice, with its perplexity, for each of the plan's"
            " removals"
        )
        message = f"{path} {lacks} {', '.join(plan.order)}: they are of different searches"
        raise InputError(f"{message}; delete both and run `dvc repro`", rule="different-searches")
    return tuple(SearchStep(row["removed"], row["perplexity"]) for row in found)


def unit_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Find what a search removed at once, in words. One without scores hides which kinds of block
    it may remove."""
    masks = [row["removed"] for row in rows if row["removed"]]
    kinds = {block.kind for row in rows if row["rows_used"] for block in row["removed"]}
    if all(
        BlockId(kind, block.layer) in mask for mask in masks for block in mask for kind in BlockKind
    ):
        return "whole layers"
    shifted = removable_units(
        max((b.layer for mask in masks for b in mask), default=0) + 1, "shifted", "all"
    )
    if all(row["added"] is None or row["added"] in shifted for row in rows):
        return "shifted layers"
    return f"{next(iter(kinds)).upper()} blocks" if len(kinds) == 1 else "blocks"
