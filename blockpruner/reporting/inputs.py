"""What a report is made of, read from the files of earlier stages into values.

Decides what the report may use: a candidate scored on fewer rows than the calibration set has (a racing loser)
is counted and goes no further, so that no ranking, argmin or heat map can see it. What is said about the numbers
is decided in `findings`, how they look in `tables`, `plots` and `html`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pyarrow as pa

from blockpruner.core.blocks import DENSE, BlockId, BlockKind, Mask, format_mask, parse_mask
from blockpruner.core.errors import InputError
from blockpruner.core.plan import Plan
from blockpruner.evaluation.store import ITEMS
from blockpruner.scoring.metrics import METRICS
from blockpruner.search.trace import ITERATION
from blockpruner.store.files import read_json, read_table
from blockpruner.store.plans import load_plan

ITERATIONS = pa.schema([pa.field("iteration", pa.int32(), nullable=False), *ITERATION])


@dataclass(frozen=True)
class RunLabels:
    """One line each for people: which model, and which data it was calibrated and evaluated on; recovery: the texts
    and settings that recovered targets were trained with."""

    model: str
    calibration: str
    heldout: str
    tasks: str
    recovery: str = ""


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error, both in [0, 1] for scores; a difference of two is in [-1, 1]."""

    value: float
    stderr: float

    def differs_from(self, value: float) -> bool:
        """Whether `value` is more than 2 standard errors away (about 95 % for a normal error)."""
        return abs(self.value - value) > 2 * self.stderr


@dataclass(frozen=True)
class Speed:
    """prefill, decode: tokens per second; generation: seconds of one generation, the median over repeats;
    fastest, slowest: of the repeats, seconds; setting: what was timed, and on what; peak_memory_bytes: while
    generating (on a CPU the sum of weights and KV cache)."""

    prefill: float
    decode: float
    generation: float
    fastest: float
    slowest: float
    kv_cache_bytes: int
    peak_memory_bytes: int
    setting: str


@dataclass(frozen=True)
class Result:
    """One evaluated model. tasks: score by task, where the task's metric is an accuracy; items: 0/1 score by (task,
    item), of that metric; perplexities: of the other tasks, by "task, metric"."""

    parameters: int
    weight_bytes: int
    perplexity: float
    heldout_rows: int
    heldout_tokens: int
    tasks: Mapping[str, Estimate]
    task_items: Mapping[str, int]
    average: Estimate
    chance: Mapping[str, float]
    items: Mapping[tuple[str, str], float]
    perplexities: Mapping[str, float]
    speed: Speed


@dataclass(frozen=True)
class Speedups:
    """Pruned over dense, both measured in turns in one process; above 1 is faster.

    is_noise: the two models' ranges of generation time over the repeats overlap.
    """

    prefill: float
    decode: float
    generation: float
    is_noise: bool


@dataclass(frozen=True)
class Removal:
    """One iteration of a search.

    added: the unit it removed; before, perplexity: on the calibration rows, before and after it; rise: ln of their
    quotient, nats per token; ratio: cumulative share of parameters removed; costs: in the unit of the search's metric,
    of every unit scored on all rows, the removed one included: its influence, or how much its removal adds to the loss;
    partial: number of units scored on some rows only; candidates: number of units that could have been removed, 0 where
    no score was asked for; work: how many units' worth of rows were scored; lazy_choice: what had been removed before
    an audit let all candidates enter; None without an audit.
    """

    added: Mask
    before: float
    perplexity: float
    rise: float
    ratio: float
    costs: Mapping[Mask, float]
    partial: int
    candidates: int
    work: float
    lazy_choice: Mask | None


@dataclass(frozen=True)
class Considered:
    """All that a search looked at, whatever its steps are made of.

    unit: what it removed at once, in words; steps: iterations in which something was scored; complete, partial: masks
    scored on all rows, and on the first rows only.
    """

    unit: str
    steps: int
    complete: int
    partial: int


@dataclass(frozen=True)
class Target:
    """A pruned model: its plan, how the search got there, its results and its speed against the dense model.

    removals: empty where the plan has no sequence of removals; considered: None where no masks were compared.
    """

    name: str
    plan: Plan
    removals: tuple[Removal, ...]
    considered: Considered | None
    result: Result
    speedups: Speedups

    @property
    def calibration_perplexity(self) -> float | None:
        """Of the pruned model on the calibration rows; None where nobody knew it when the plan was made."""
        value = self.plan.calibration["perplexity"]
        return None if value is None else float(value)

    @property
    def calibration_rise(self) -> float | None:
        """ln(PPL / dense PPL) on the calibration rows, nats per token."""
        value = self.calibration_perplexity
        return None if value is None else math.log(value / self.plan.calibration["dense_perplexity"])


@dataclass(frozen=True)
class Study:
    """One run: its dense model and the targets built from it, least pruned first, as pruned before as recovered.
    counts: of its `score` stage, of which it has one if its plans are masks."""

    run: str
    labels: RunLabels
    dense: Result
    targets: tuple[Target, ...]
    counts: Mapping[str, Any]

    @property
    def traces(self) -> tuple[Target, ...]:
        """Targets whose removal sequence is not the beginning of another's: nested searches have one."""
        targets = [target for target in self.targets if target.removals]
        orders = [target.plan.order for target in targets]
        last = {order: i for i, order in enumerate(orders)}
        return tuple(
            target
            for i, target in enumerate(targets)
            if last[orders[i]] == i
            and not any(len(o) > len(orders[i]) and o[: len(orders[i])] == orders[i] for o in orders)
        )

    @property
    def dense_calibration(self) -> float | None:
        """Perplexity of the dense model on the calibration rows, if a search measured it."""
        known = [t.plan.calibration["dense_perplexity"] for t in self.targets if t.calibration_perplexity is not None]
        return float(known[0]) if known else None

    def heldout_rise(self, target: Target) -> float:
        """ln(PPL / dense PPL) on the held-out text, nats per token."""
        return math.log(target.result.perplexity / self.dense.perplexity)


def read_studies(targets: Sequence[str], labels: Mapping[str, RunLabels], data: Path) -> list[Study]:
    """Read everything about `targets`, grouped by run in order of appearance.

    Raises:
        InputError: a file is missing, damaged, or disagrees with another.
    """
    found = [_read_target(name, data) for name in targets]
    studies = []
    for run in dict.fromkeys(target.plan.run for target in found):
        dense = _read_result(data / "results" / f"{run}-dense", "dense")
        own = sorted((t for t in found if t.plan.run == run), key=lambda t: (t.plan.ratio, t.plan.recover, t.name))
        for target in own:
            if target.result.items.keys() != dense.items.keys():
                raise InputError(
                    f"{data / 'results' / target.name} and {data / 'results' / f'{run}-dense'} were evaluated on "
                    "different items, so they cannot be compared; run `dvc repro` to evaluate both alike"
                )
        searched = any(target.plan.kind == "mask" for target in own)
        counts = read_json(data / "metrics" / run / "score.json") if searched else {}
        studies.append(Study(run, labels[run], dense, tuple(own), counts))
    return studies


def paired(base: Result, other: Result, task: str | None = None) -> Estimate:
    """Difference of scores, other minus base, with the standard error of paired items.

    Per task, d_i = other_i - base_i over its n items: mean(d), SE = sd(d) / sqrt(n) with n - 1 degrees of
    freedom (Miller, arXiv 2411.00640, section 4). Without `task`: the mean over tasks, SE = sqrt(sum SE_t^2) / tasks.
    """
    if task is None:
        parts = [paired(base, other, name) for name in base.tasks]
        return Estimate(mean(p.value for p in parts), math.hypot(*(p.stderr for p in parts)) / len(parts))
    differences = [other.items[key] - base.items[key] for key in base.items if key[0] == task]
    spread = stdev(differences) if len(differences) > 1 else math.inf
    return Estimate(mean(differences), spread / math.sqrt(len(differences)))


def read_iterations(path: Path) -> list[dict[str, Any]]:
    """The rows of a plan's iteration tables, the masks parsed, without the scores of each calibration row."""
    table, _ = read_table(path, ITERATIONS)
    rows: list[dict[str, Any]] = table.drop(["row_loss", "row_nll"]).to_pylist()
    for row in rows:
        row["removed"] = parse_mask(",".join(row["removed"]))
        row["added"] = None if row["added"] is None else parse_mask(row["added"])
    return rows


def removals(rows: Sequence[Mapping[str, Any]], plan: Plan, path: Path) -> tuple[Removal, ...]:
    """The removals of a plan whose search is nested, in order.

    Raises:
        InputError: the rows, which are of `path`, do not lead to the plan's order of removal.
    """
    added = [row for row in rows if row["added"] is not None]
    considered = [[row for row in added if row["iteration"] == index] for index in range(len(plan.ratios))]
    complete = [row for row in rows if row["rows_used"] == row["rows_total"]]
    losses = {row["removed"]: row["loss"] for row in complete}
    perplexities = {  # of what was chosen; of a mask that lost a race they are of its first rows only
        row["removed"]: row["perplexity"] for row in rows if row["chosen"] or row["removed"] == DENSE
    }
    influence, is_nll = METRICS[plan.metric].influence, METRICS[plan.metric].is_nll
    found: list[Removal] = []
    base = DENSE
    for index, ratio in enumerate(plan.ratios):
        chosen = [row for row in considered[index] if row["chosen"] and row["rows_used"] in (0, row["rows_total"])]
        if len(chosen) != 1 or perplexities.get(base) is None or chosen[0]["perplexity"] is None:
            raise InputError(
                f"{path} has {len(chosen)} fully scored choices in iteration {index}, or no perplexity of one or of "
                "what was before it; exactly one is valid: delete the file and run `dvc repro`"
            )
        mask = chosen[0]["removed"]
        costs = {
            row["added"]: row["loss"] - (0.0 if influence else losses.get(base, math.nan))
            for row in considered[index]
            if row["rows_used"] == row["rows_total"] and row["removed"] == base | row["added"]
        }
        asked = any(row["rows_used"] for row in considered[index])
        units = max(len(considered[0]) - index, len(considered[index]))  # in the first iteration all enter
        before, after = perplexities[base], chosen[0]["perplexity"]
        found.append(
            Removal(
                added=mask - base,
                before=before,
                perplexity=after,
                rise=costs[mask - base] if is_nll and mask - base in costs else math.log(after / before),
                ratio=ratio,
                costs=costs,
                partial=sum(0 < row["rows_used"] < row["rows_total"] for row in considered[index]),
                candidates=units if asked else 0,
                work=sum(row["rows_used"] / row["rows_total"] for row in considered[index]),
                lazy_choice=next((row["added"] for row in considered[index] if row["lazy_choice"]), None),
            )
        )
        base = mask
    _require_same([format_mask(removal.added) for removal in found], plan.order, path)
    return tuple(found)


def considered(rows: Sequence[Mapping[str, Any]]) -> Considered:
    """What all iterations of one search looked at. Of a search that scores nothing it is not known which kinds of block
    it may remove."""
    masks = [row["removed"] for row in rows if row["removed"]]
    scored = [row for row in rows if row["removed"] and row["rows_used"]]
    complete = {row["removed"] for row in scored if row["rows_used"] == row["rows_total"]}
    kinds = {block.kind for row in scored for block in row["removed"]}
    if all(BlockId(kind, block.layer) in mask for mask in masks for block in mask for kind in BlockKind):
        unit = "whole layers"
    else:
        unit = {(BlockKind.MHA,): "MHA blocks", (BlockKind.MLP,): "MLP blocks"}.get(tuple(kinds), "blocks")
    return Considered(
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


def _read_target(name: str, data: Path) -> Target:
    plan = load_plan(data / "plans" / name / "plan.json")
    sequence: tuple[Removal, ...] = ()
    search = None
    if plan.kind == "mask":
        path = data / "plans" / name / "iterations.parquet"
        rows = read_iterations(path)
        search = considered(rows)
        if plan.nested:
            sequence = removals(rows, plan, path)
        else:
            last = max((row["iteration"] for row in rows if row["chosen"]), default=None)
            answer = [row["removed"] for row in rows if row["chosen"] and row["iteration"] == last]
            _require_same([format_mask(mask) for mask in answer], plan.order, path)
    results = data / "results" / name
    fields = read_json(results / "results.json")["speed"]
    pruned, dense = _speed(fields["pruned"]), _speed(fields["dense"])
    speedups = Speedups(
        prefill=fields["speedup_prefill"],
        decode=fields["speedup_decode"],
        generation=fields["speedup_generation"],
        is_noise=pruned.fastest <= dense.slowest and dense.fastest <= pruned.slowest,
    )
    return Target(name, plan, sequence, search, _read_result(results, "pruned"), speedups)


def _read_result(directory: Path, model: str) -> Result:
    """Read results.json and items.parquet; `model` is "dense" or "pruned": whose speed is meant."""
    fields = read_json(directory / "results.json")
    chance = {name: value for name, value in fields["chance"].items() if value is not None}  # null: no accuracy
    tasks = {name: fields["tasks"][name] for name in chance}
    others = {name: task for name, task in fields["tasks"].items() if name not in chance}
    if not tasks:
        raise InputError(
            f"{directory / 'results.json'} has no task that is scored by accuracy, and a report gives their average; "
            f"name one in evaluate.zero_shot.tasks beside {', '.join(others)}"
        )
    perplexity = fields["perplexity"]
    path = directory / "items.parquet"
    rows = read_table(path, ITEMS)[0].drop(["loglikelihoods", "prompt_hash"]).to_pylist()
    return Result(
        parameters=fields["parameters"],
        weight_bytes=fields["weight_bytes"],
        perplexity=perplexity["perplexity"],
        heldout_rows=perplexity["rows"],
        heldout_tokens=perplexity["tokens"],
        tasks={name: _estimate(task["value"], task["stderr"]) for name, task in tasks.items()},
        task_items={name: task["items"] for name, task in tasks.items()},
        average=_estimate(fields["average"]["value"], fields["average"]["stderr"]),
        chance=chance,
        items={
            (row["task"], str(row["item"])): float(row[tasks[row["task"]]["metric"]])
            for row in rows
            if row["task"] in tasks
        },
        perplexities={f"{name}, {task['metric'].replace('_', ' ')}": task["value"] for name, task in others.items()},
        speed=_speed(fields["speed"][model]),
    )


def _speed(fields: Mapping[str, Any]) -> Speed:
    seconds = fields["generation_seconds"]
    return Speed(
        prefill=fields["prefill_tokens_per_second"],
        decode=fields["decode_tokens_per_second"],
        generation=seconds["median"],
        fastest=seconds["min"],
        slowest=seconds["max"],
        kv_cache_bytes=fields["kv_cache_bytes"],
        peak_memory_bytes=fields["peak_memory_bytes"],
        setting=(
            f"{fields['prompt_tokens']} prompt + {fields['new_tokens']} new tokens, batch {fields['batch']}, "
            f"{fields['repeats']} repeats, {fields['device']}, {fields['dtype']}, {fields['threads']} threads"
        ),
    )


def _estimate(value: float, stderr: float | None) -> Estimate:
    """A single item has no standard error (null): it is infinite, so that nothing differs from anything."""
    return Estimate(value, math.inf if stderr is None else stderr)
