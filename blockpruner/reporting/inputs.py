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
import pyarrow.parquet as pq

from blockpruner.blocks import DENSE, Mask, format_mask, parse_mask
from blockpruner.errors import InputError
from blockpruner.plans import Plan
from blockpruner.scoring.metrics import PERPLEXITY, metric_of
from blockpruner.tables import ITERATION, read_json, read_table

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
    """One evaluated model. tasks: score by task; items: 0/1 score by (task, item), of the task's own metric."""

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

    added: the unit it removed; perplexity: on the calibration rows, after it; rise: its NLL minus the NLL before
    it, nats per token; ratio: cumulative share of parameters removed; rises: the same rise for every unit scored
    on all rows, the removed one included; partial: number of units scored on some rows only; candidates: number of
    units that could have been removed; rows_share: (candidate, row) pairs scored, as a share of all of them;
    lazy_choice: what had been removed before an audit let all candidates enter; None without an audit.
    """

    added: Mask
    perplexity: float
    rise: float
    ratio: float
    rises: Mapping[Mask, float]
    partial: int
    candidates: int
    rows_share: float
    lazy_choice: Mask | None


@dataclass(frozen=True)
class Target:
    """A pruned model: its plan, how the search got there, its results and its speed against the dense model."""

    name: str
    plan: Plan
    removals: tuple[Removal, ...]
    result: Result
    speedups: Speedups

    @property
    def dense_perplexity(self) -> float:
        """Of the dense model on the calibration rows."""
        return float(self.plan.calibration["dense_perplexity"])

    @property
    def calibration_rise(self) -> float:
        """ln(PPL / dense PPL) on the calibration rows, nats per token."""
        return math.log(self.plan.calibration["perplexity"] / self.dense_perplexity)


@dataclass(frozen=True)
class Study:
    """One run: its dense model and the targets built from it, least pruned first, as pruned before as recovered.
    counts: of its `score` stage."""

    run: str
    labels: RunLabels
    dense: Result
    targets: tuple[Target, ...]
    counts: Mapping[str, Any]

    @property
    def traces(self) -> tuple[Target, ...]:
        """Targets whose removal sequence is not the beginning of another's: nested searches have one."""
        orders = [target.plan.order for target in self.targets]
        last = {order: i for i, order in enumerate(orders)}
        return tuple(
            target
            for i, target in enumerate(self.targets)
            if last[orders[i]] == i
            and not any(len(o) > len(orders[i]) and o[: len(orders[i])] == orders[i] for o in orders)
        )

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
        studies.append(Study(run, labels[run], dense, tuple(own), read_json(data / "metrics" / run / "score.json")))
    return studies


def paired(dense: Result, pruned: Result, task: str | None = None) -> Estimate:
    """Difference of scores, pruned minus dense, with the standard error of paired items.

    Per task, d_i = pruned_i - dense_i over its n items: mean(d), SE = sd(d) / sqrt(n) with n - 1 degrees of
    freedom (Miller, arXiv 2411.00640, section 4). Without `task`: the mean over tasks, SE = sqrt(sum SE_t^2) / tasks.
    """
    if task is None:
        parts = [paired(dense, pruned, name) for name in dense.tasks]
        return Estimate(mean(p.value for p in parts), math.hypot(*(p.stderr for p in parts)) / len(parts))
    differences = [pruned.items[key] - dense.items[key] for key in dense.items if key[0] == task]
    spread = stdev(differences) if len(differences) > 1 else math.inf
    return Estimate(mean(differences), spread / math.sqrt(len(differences)))


def read_removals(path: Path, plan: Plan) -> tuple[Removal, ...]:
    """Read the iteration tables of a plan, in order.

    Raises:
        InputError: the tables do not lead to the plan's order of removal.
    """
    table, _ = read_table(path, ITERATIONS)
    table = table.drop(["row_loss", "row_nll"])
    complete = table.filter(pa.compute.equal(table["rows_used"], table["rows_total"])).to_pylist()
    known = {parse_mask(",".join(row["removed"])): row["loss"] for row in complete}
    added = [row for row in table.to_pylist() if row["added"] is not None]
    considered = [[row for row in added if row["iteration"] == index] for index in range(len(plan.ratios))]
    perplexities = {  # of what was chosen; of a mask that lost a race they are of its first rows only
        parse_mask(",".join(row["removed"])): row["perplexity"]
        for row in table.to_pylist()
        if row["chosen"] or not row["removed"]
    }
    influence, is_nll = metric_of(plan.metric).influence, metric_of(plan.metric).loss == PERPLEXITY.loss
    removals: list[Removal] = []
    base = DENSE
    for index, ratio in enumerate(plan.ratios):
        chosen = [row for row in considered[index] if row["chosen"] and row["rows_used"] in (0, row["rows_total"])]
        if len(chosen) != 1 or perplexities.get(base) is None or chosen[0]["perplexity"] is None:
            raise InputError(
                f"{path} has {len(chosen)} fully scored choices in iteration {index}, or no perplexity of one or of "
                "what was before it; exactly one is valid: delete the file and run `dvc repro`"
            )
        mask = parse_mask(",".join(chosen[0]["removed"]))
        rises = {
            parse_mask(row["added"]): row["loss"] - (0.0 if influence else known.get(base, math.nan))
            for row in complete
            if row["iteration"] == index
            and row["added"] is not None
            and parse_mask(",".join(row["removed"])) == base | parse_mask(row["added"])
        }
        log_ratio = math.log(chosen[0]["perplexity"] / perplexities[base])
        candidates = max(len(considered[0]) - index, len(considered[index]))  # in the first iteration all enter
        removals.append(
            Removal(
                added=mask - base,
                perplexity=chosen[0]["perplexity"],
                rise=rises[mask - base] if is_nll and mask - base in rises else log_ratio,
                ratio=ratio,
                rises=rises,
                partial=sum(0 < row["rows_used"] < row["rows_total"] for row in considered[index]),
                candidates=candidates,
                rows_share=sum(row["rows_used"] / row["rows_total"] for row in considered[index]) / candidates,
                lazy_choice=next((parse_mask(r["added"]) for r in considered[index] if r["lazy_choice"]), None),
            )
        )
        base = mask
    order = [format_mask(removal.added) for removal in removals]
    if order != list(plan.order):
        raise InputError(
            f"{path} removes {', '.join(order)}; the plan beside it removes {', '.join(plan.order)}: they are of "
            "different searches; delete both and run `dvc repro`"
        )
    return tuple(removals)


def _read_target(name: str, data: Path) -> Target:
    plan = Plan.load(data / "plans" / name / "plan.json")
    removals = read_removals(data / "plans" / name / "iterations.parquet", plan)
    results = data / "results" / name
    fields = read_json(results / "results.json")["speed"]
    pruned, dense = _speed(fields["pruned"]), _speed(fields["dense"])
    speedups = Speedups(
        prefill=fields["speedup_prefill"],
        decode=fields["speedup_decode"],
        generation=fields["speedup_generation"],
        is_noise=pruned.fastest <= dense.slowest and dense.fastest <= pruned.slowest,
    )
    return Target(name, plan, removals, _read_result(results, "pruned"), speedups)


def _read_result(directory: Path, model: str) -> Result:
    """Read results.json and items.parquet; `model` is "dense" or "pruned": whose speed is meant."""
    fields = read_json(directory / "results.json")
    tasks, perplexity = fields["tasks"], fields["perplexity"]
    path = directory / "items.parquet"
    try:
        rows = pq.read_table(path, columns=["task", "item", "acc", "acc_norm"]).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}); delete {directory} and run `dvc repro`") from error
    return Result(
        parameters=fields["parameters"],
        weight_bytes=fields["weight_bytes"],
        perplexity=perplexity["perplexity"],
        heldout_rows=perplexity["rows"],
        heldout_tokens=perplexity["tokens"],
        tasks={name: _estimate(task["value"], task["stderr"]) for name, task in tasks.items()},
        task_items={name: task["items"] for name, task in tasks.items()},
        average=_estimate(fields["average"]["value"], fields["average"]["stderr"]),
        chance=fields["chance"],
        items={(row["task"], str(row["item"])): float(row[tasks[row["task"]]["metric"]]) for row in rows},
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
