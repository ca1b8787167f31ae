"""The plan: all that a search hands on. One frozen value, one JSON file.

Decides how a budget turns what was scored into what is removed. `materialize`, `benchmark` and `report` read
plans and do not know which method made them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from blockpruner.core.blocks import (
    DENSE,
    BlockKind,
    Mask,
    all_blocks,
    format_mask,
    removable_units,
    sorted_blocks,
)
from blockpruner.core.budgets import Resources, choose_prefix, is_settled, parse_budget, resources_of, that_cost
from blockpruner.core.errors import InputError
from blockpruner.core.families import Config
from blockpruner.core.plan import Plan
from blockpruner.methods.laco.walk import Merge, layers_after
from blockpruner.methods.slicegpt.widths import sliced_parameters
from blockpruner.search.iteration import removals
from blockpruner.search.trace import ITERATION, read_current, read_trace, table_path, trace_directory
from blockpruner.store.files import read_json, read_table, write_table


def commit(
    order: Sequence[Mask], perplexities: Sequence[float], resources: Resources, budget: str, facts: Mapping[str, Any]
) -> Plan:
    """Choose the prefix of a removal sequence that meets `budget`.

    Args:
        order: the units removed, in order; of a search that is not nested all at once.
        perplexities: on the calibration set, of the dense model and after each removal (one more than `order`).
        facts: target, run, search, nested, score (its method and metric), and the calibration's rows and tokens.

    Raises:
        InputError: the budget cannot be met; names the largest or nearest that can.
    """
    prefixes = [Mask().union(*order[: k + 1]) for k in range(len(order))]
    counts = resources["parameters"]
    wanted = parse_budget(budget, counts)
    steps = choose_prefix(wanted, prefixes, resources[wanted.resource])
    mask = prefixes[steps - 1]
    return _plan(
        facts,
        budget,
        resources,
        gone=mask,
        removed=tuple(str(block) for block in sorted_blocks(mask)),
        order=tuple(format_mask(unit) for unit in order[:steps]),
        ratios=tuple(counts.ratio(prefix) for prefix in prefixes[:steps]),
        perplexities=(perplexities[0], perplexities[steps]),
    )


def _plan(
    facts: Mapping[str, Any],
    budget: str,
    resources: Resources,
    *,
    perplexities: tuple[float, float | None],
    gone: Mask = DENSE,
    pruned: int | None = None,
    removed: tuple[str, ...] = (),
    order: tuple[str, ...] = (),
    ratios: tuple[float, ...] = (),
    details: Mapping[str, Any] | None = None,
) -> Plan:
    """gone: the blocks that the pruned model does without; pruned: its parameters, where these do not say it."""
    (dense, after), counts = perplexities, resources["parameters"]
    if pruned is None:
        pruned = counts.total - sum(counts.blocks[block] for block in gone)
    ratio = (counts.total - pruned) / counts.total
    return Plan(
        kind=facts["kind"],
        target=facts["target"],
        run=facts["run"],
        budget=budget,
        method=facts["score"]["method"],
        metric=facts["score"]["metric"],
        options=facts["score"].get("options", {}),
        search=facts["search"],
        layers=len(counts.blocks) // 2,
        removed=removed,
        order=order,
        ratio=ratio,
        ratios=ratios,
        removes={name: costs.ratio(gone) for name, costs in resources.items()} | {"parameters": ratio},
        blocks={kind.value: sum(block.kind is kind for block in gone) for kind in BlockKind},
        parameters={"dense": counts.total, "pruned": pruned},
        calibration={**facts["calibration"], "dense_perplexity": dense, "perplexity": after},
        nested=facts["nested"],
        details=details or {},
    )


def _resources(config: Config, budget: str, facts: Mapping[str, Any]) -> Resources:
    """Of the model; raises InputError where the budget is a speed-up and the search has measured none."""
    found = resources_of(config, facts.get("latency"))
    if parse_budget(budget, found["parameters"]).resource not in found:
        raise InputError(
            f"budget {budget!r} is a speed-up, and the run's scores know no times; run its stage score again"
        )
    return found


def _require_scored(order: Sequence[Mask], resources: Resources, budget: str, facts: Mapping[str, Any]) -> None:
    """Refuse a sequence that was not scored as far as the budget: it was searched for others."""
    score, counts = facts["score"], resources["parameters"]
    units = removable_units(len(counts.blocks) // 2, score["unit"], score["candidates"])
    price = resources.get(score["options"].get("per", "none"))
    prefixes = [Mask().union(*order[: k + 1]) for k in range(len(order))]
    remaining = [unit for unit in (units if price is None else that_cost(units, price)) if not unit <= prefixes[-1]]
    wanted = parse_budget(budget, counts)
    if not is_settled(wanted, prefixes, resources[wanted.resource], remaining):
        reached = wanted.amount(prefixes[-1], resources[wanted.resource])
        raise InputError(f"run {facts['run']} is scored up to {reached}, not to budget {budget!r}; run its stage score")


def _commit_mask(scores: Path, config: Config, budget: str, facts: Mapping[str, Any]) -> tuple[Plan, list[Path]]:
    resources, directory = _resources(config, budget, facts), trace_directory(scores, facts, budget)
    trace = read_trace(directory, facts["search"])
    if not trace:
        raise InputError(f"{directory} has no iteration for budget {budget!r}; run its stage score")
    order, perplexities = removals(trace, facts["nested"])
    if facts["nested"]:
        _require_scored(order, resources, budget, facts)
    plan = commit(order, perplexities, resources, budget, facts)
    used = len(plan.order) if plan.nested else len(trace)
    return plan, [table_path(directory, index) for index in range(used)]


def _commit_merges(scores: Path, config: Config, budget: str, facts: Mapping[str, Any]) -> tuple[Plan, list[Path]]:
    details = read_json(trace_directory(scores, facts, budget) / "details.json")
    merges, depth = [Merge(*pair) for pair in details["merges"]], int(config["num_hidden_layers"])
    merged = set(chain.from_iterable(layer[1:] for layer in layers_after(merges, depth)))
    nll = details.pop("nll")
    plan = _plan(
        facts,
        budget,
        _resources(config, budget, facts),
        gone=frozenset(block for block in all_blocks(depth) if block.layer in merged),
        order=tuple(map(str, merges)),
        perplexities=(math.exp(facts["dense_nll"]), math.exp(math.fsum(nll) / len(nll))),
        details=details,
    )
    return plan, []


def _commit_width(scores: Path, config: Config, budget: str, facts: Mapping[str, Any]) -> tuple[Plan, list[Path]]:
    details = read_json(trace_directory(scores, facts, budget) / "details.json")
    _, pruned = sliced_parameters(config, details["width"])
    resources, perplexities = _resources(config, budget, facts), (math.exp(facts["dense_nll"]), None)
    return _plan(facts, budget, resources, pruned=pruned, perplexities=perplexities, details=details), []


def commit_run(scores: Path, config: Config, budget: str, target: Mapping[str, Any]) -> tuple[Plan, list[Path]]:
    """The plan that meets a budget by what a run has scored, and the iteration tables that it used, in order.

    Args:
        scores: the run's folder, as `search.run.score_run` left it.
        target: its name and run.

    Raises:
        InputError: the budget cannot be met, or a file of the search is missing or damaged.
    """
    facts = read_current(scores) | dict(target)
    return KINDS[facts["kind"]](scores, config, budget, facts)


KINDS: dict[str, Callable[[Path, Config, str, Mapping[str, Any]], tuple[Plan, list[Path]]]] = {
    "mask": _commit_mask,
    "laco": _commit_merges,
    "slicegpt": _commit_width,
}


def save_iterations(tables: Sequence[Path], path: Path) -> None:
    """The iteration tables that a plan used, as one table with the iteration's number in front."""
    parts = []
    for index, source in enumerate(tables):
        table, _ = read_table(source, ITERATION)
        number = pa.array([index] * table.num_rows, pa.int32())
        parts.append(table.add_column(0, pa.field("iteration", pa.int32(), nullable=False), number))
    write_table(path, pa.concat_tables(parts))
