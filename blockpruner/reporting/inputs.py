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
        perplexity = self.compensation.get("perplexity")
        return perplexity is not None and perplexity["after"] < perplexity["before"]

    @property
    def own_rise(self) -> float | None:
        """ln(PPL / dense PPL), nats per token, on the calibration rows or, where it is compensated,
        on those that the fit held out; None where the search asked for no scores."""
        if self.helped:
            perplexity = self.compensation["perplexity"]
            return math.log(perplexity["after"] / perplexity["dense"])
        method = self.plan.method
        if method not in SEARCHES or SEARCHES[method].asks == "nothing":
            return None
        calibration = self.plan.calibration
        if not calibration.get("perplexity"):
            return None
        return math.log(calibration["perplexity"] / calibration["dense_perplexity"])

    @property
    def healing(self) -> tuple[str, ...]:
        steps: list[str] = []
        if self.plan.compensate != "none" and (self.helped or not self.compensation):
            steps.append(self.plan.compensate)
        if self.plan.train:
            steps.append("training")
        return tuple(steps)


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
        by_order = {target.plan.order: target for target in self.targets if target.curve}
        traces = []
        for order, target in by_order.items():
            continued = [other for other in by_order if other[: len(order)] == order != other]
            if not continued:
                traces.append(target)
        return tuple(traces)

    @property
    def searches(self) -> tuple[PrunedOption, ...]:
        """Find one target for each search: the traces, and every search that is not nested."""
        by_steps = {}
        for target in self.targets:
            if target.steps and not target.curve:
                by_steps[target.steps] = target
        return (*self.traces, *by_steps.values())


def read_runs(
    targets: Sequence[str], labels: Mapping[str, RunLabels], data: Path
) -> list[ReportedRun]:
    """Read everything about `targets`, grouped by run in order of appearance. `data` is the folder
    of evidence/, plans/ (for the iteration tables), compensated/ and checkpoints/. Raises
    InputError if a file is missing, damaged, or disagrees with another."""
    plans_by_run: dict[str, dict[str, Plan]] = {}
    for name in targets:
        plan = load_plan(data / "evidence" / name / "plan.json")
        plans_by_run.setdefault(plan.run, {})[name] = plan
    return [_read_run(run, labels[run], plans, data) for run, plans in plans_by_run.items()]


def _read_run(run: str, labels: RunLabels, plans: Mapping[str, Plan], data: Path) -> ReportedRun:
    def size(name: str) -> tuple[float, bool, str, str]:
        plan = plans[name]
        return plan.ratio, plan.train, plan.compensate, name

    names = sorted(plans, key=size)
    dense_name = f"{run}-dense"
    folders = {name: data / "evidence" / name for name in (dense_name, *names)}
    facts = {name: read_results(folder) for name, folder in folders.items()}
    metrics = {task: values["metric"] for task, values in facts[dense_name]["tasks"].items()}
    items = read_items(list(folders.values()), metrics)
    # The folder of a model has its name.
    models = {name: Model.of(fields, items[name]) for name, fields in facts.items()}
    # Speeds are compared where all are known.
    races: dict[str, Race] = {}
    if all(fields["speed"] for fields in facts.values()):
        races = {name: Race.of(fields["speed"]) for name, fields in facts.items()}
    calibrations = [plans[name].calibration for name in plans]
    dense_perplexities = [
        calibration["dense_perplexity"]
        for calibration in calibrations
        if calibration["perplexity"] is not None
    ]
    dense = Option(
        name="dense",
        method="",
        plan=None,
        model=models[dense_name],
        dense=models[dense_name],
        timed=races.get(dense_name),
        calibration_perplexity=dense_perplexities[0] if dense_perplexities else None,
    )
    options = []
    for name in names:
        plan = plans[name]
        # It also names the search of the recipe that was chosen.
        compensation = read_json(data / "compensated" / name / "compensate.json")
        steps, unit = _read_search(
            data / "plans" / name / f"{compensation['search']}.parquet", plan
        )
        checkpoints = [data / "checkpoints" / name / form for form in facts[name]["formats"]]
        option = PrunedOption(
            name=name,
            method=KINDS[plan.kind].method_words(plan, unit),
            plan=plan,
            model=models[name],
            dense=dense.model,
            timed=races.get(name),
            steps=steps,
            calibration_perplexity=plan.calibration["perplexity"],
            curve=tuple(step.perplexity for step in steps) if plan.nested else (),
            compensation=compensation if "perplexity" in compensation else {},
            checkpoints=tuple(checkpoints),
        )
        options.append(option)
    return ReportedRun(run, labels, dense, tuple(options), facts[dense_name]["chance"])


def _read_search(path: Path, plan: Plan) -> tuple[tuple[SearchStep, ...], str]:
    """The steps of a search and what it removed at once; nothing of a method that removes no
    blocks."""
    if not plan.removed:
        return (), ""
    rows = read_iterations(path)
    return steps_of(rows, plan, path), unit_of(rows)


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
    # A candidate that lost a race has losses of a part of the rows alone.
    scored = [row for row in rows if row["rows_used"] in (0, row["rows_total"])]
    chosen = [row for row in scored if row["chosen"]]
    steps: list[SearchStep] = []
    for row in (*dense, *sorted(chosen, key=lambda row: row["iteration"])):
        if not steps or steps[-1].mask != row["removed"]:
            steps.append(SearchStep(row["removed"], row["perplexity"]))
    masks = [step.mask for step in steps]
    if plan.nested:
        order = [format_mask(mask - smaller) for smaller, mask in pairwise(masks)]
        leads_to_plan = order == list(plan.order)
    else:
        leads_to_plan = masks[-1:] == [plan.mask]
    is_scored = all(step.perplexity is not None for step in steps)
    if not leads_to_plan or not dense or not is_scored:
        raise InputError(
            f"{path} does not have one fully scored choice, with its perplexity, for each of the"
            f" plan's removals {', '.join(plan.order)}: they are of different searches; delete both"
            " and run `dvc repro`",
            rule="different-searches",
        )
    return tuple(steps)


def unit_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Find what a search removed at once, in words. One without scores hides which kinds of block
    it may remove."""
    masks = [row["removed"] for row in rows if row["removed"]]
    # The unit is read from the masks, since plans and tables do not record it.
    if all(_has_whole_layers(mask) for mask in masks):
        return "whole layers"
    layers = max((block.layer for mask in masks for block in mask), default=0) + 1
    shifted = removable_units(layers, "shifted", "all")
    if all(row["added"] is None or row["added"] in shifted for row in rows):
        return "shifted layers"
    scored_masks = [row["removed"] for row in rows if row["rows_used"]]
    kinds = {block.kind for mask in scored_masks for block in mask}
    return f"{kinds.pop().upper()} blocks" if len(kinds) == 1 else "blocks"


def _has_whole_layers(mask: Mask) -> bool:
    layers = {block.layer for block in mask}
    return len(mask) == len(layers) * len(BlockKind)
