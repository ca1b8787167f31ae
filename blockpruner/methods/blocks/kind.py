"""The kind of plan that removes blocks: a mask, found by any search of `search.registry`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import accumulate
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockpruner.core.blocks import DENSE, BlockKind, Mask, format_mask, parse_mask, sorted_blocks
from blockpruner.core.budgets import choose_prefix, is_settled, parse_budget, resources_of
from blockpruner.core.errors import InputError
from blockpruner.core.families import Config, Costs
from blockpruner.core.markdown import code
from blockpruner.core.plan import Plan
from blockpruner.methods.kind import Job, Kind, known_resources, make_plan, sizes
from blockpruner.scoring.metrics import METRICS, NLL
from blockpruner.scoring.objectives import Counts
from blockpruner.scoring.work import Rows
from blockpruner.search.iteration import Iteration, removals
from blockpruner.search.registry import SEARCHES, request
from blockpruner.search.run import search, units_of
from blockpruner.search.trace import (
    Current,
    Took,
    drop_strays,
    read_trace,
    search_fingerprint,
    seed_stores,
    table_path,
    trace_directory,
    write_iteration,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PER_WORDS = {
    "parameters": " per parameter saved",
    "kv": " per KV cache saved",
    "latency": " per time saved",
}


def score(job: Job) -> tuple[Current, Counts]:
    asked, observer = request(job.score), job.material.observer
    rows = job.calibration
    special: dict[str, Any] = {"latency": job.latency} if asked.options.price == "latency" else {}
    loss = asked.metric.name
    fingerprint = search_fingerprint(job.store_fields(loss), {**asked.fields, **special})
    current = job.current("mask", fingerprint, asked.search.nested, asked.options, loss)

    def keep(budget: str, iteration: Iteration, took: Took) -> None:
        write_iteration(trace_directory(job.folder, current, budget), iteration, fingerprint, took)

    with job.stores(asked.losses) as stores:
        own, influence = (stores[loss], stores[NLL.name]), asked.metric.influence
        for problem in seed_stores(job.folder / fingerprint, fingerprint, *own, influence):
            observer.note(f"warning: {problem}")
        observer.note(
            f"calibration: {len(rows.rows)} rows, in all {rows.tokens:,} tokens; search"
            f" {fingerprint}"
        )
        scorer = job.material.scorer
        traces, counts = search(
            asked, rows, stores, scorer, job.resources, job.budgets, observer, keep
        )
    for budget, trace in traces.items():
        drop_strays(
            trace_directory(job.folder, current, budget), trace, current.nested, fingerprint
        )
    return current, counts


def choose(
    order: Sequence[Mask],
    perplexities: Sequence[float],
    config: Config,
    budget: str,
    current: Current,
) -> Plan:
    """Choose the prefix of a removal sequence that meets a budget; raises InputError that names the
    largest or nearest budget that can be met. Order and perplexities are as from `removals`."""
    resources = known_resources(config, budget, current)
    prefixes, counts = list(accumulate(order, or_)), resources["parameters"]
    wanted = parse_budget(budget, counts)
    steps = choose_prefix(wanted, prefixes, resources[wanted.resource])
    known, own = (perplexities[0], perplexities[steps]), listed(order[:steps], counts)
    return make_plan(current, budget, config, gone=prefixes[steps - 1], perplexities=known, **own)


def listed(order: Sequence[Mask], counts: Costs) -> dict[str, Any]:
    """The fields of a plan that follow from the units that are removed, in order."""
    return {
        "removed": tuple(str(block) for block in sorted_blocks(DENSE.union(*order))),
        "order": tuple(format_mask(unit) for unit in order),
        "ratios": tuple(counts.ratio(prefix) for prefix in accumulate(order, or_)),
    }


def require_of(plan: Plan, config: Config, model: str, pruned: int | None) -> None:
    """Refuse a plan of another shape than the model of this name has, or that does not follow from
    what it removes; `pruned` is as `Kind.pruned` says."""
    resources = resources_of(config)
    counts = resources["parameters"]
    # a deeper model has others
    order = [parse_mask(unit) & counts.blocks.keys() for unit in plan.order]
    own = sizes(resources, DENSE.union(*order), pruned) | listed(order, counts)
    # there may also be a time that was measured
    own["removes"] = {
        **plan.removes,
        **own["removes"],
    }
    for name, value in own.items():
        if getattr(plan, name) != value:
            raise InputError(
                f"the plan is of another model: its base is {plan.base}, and its {name} is"
                f" {getattr(plan, name)!r}, which for {model} is {value!r}; give the model that the"
                " plan was made for, and an unchanged plan",
                rule="plan-differs",
                key=name,
                value=getattr(plan, name),
            )


def commit(
    scores: Path, config: Config, budget: str, current: Current
) -> tuple[Plan, Sequence[Path]]:
    resources, directory = (
        known_resources(config, budget, current),
        trace_directory(scores, current, budget),
    )
    trace = read_trace(directory, current.search)
    if not trace:
        raise InputError(f"{directory} has no iteration for budget {budget!r}; run its stage score")
    order, perplexities = removals(trace, current.nested)
    if current.nested:  # it may have been scored for other budgets
        prefixes, wanted = (
            list(accumulate(order, or_)),
            parse_budget(budget, resources["parameters"]),
        )
        costs = resources[wanted.resource]
        remaining = [
            unit for unit in units_of(request(current.score), resources) if not unit <= prefixes[-1]
        ]
        if not is_settled(wanted, prefixes, costs, remaining):
            reached = wanted.amount(prefixes[-1], costs)
            raise InputError(
                f"the run is scored up to {reached}, not to budget {budget!r}; run its stage score"
            )
    plan = choose(order, perplexities, config, budget, current)
    used = len(plan.order) if plan.nested else len(trace)
    return plan, [table_path(directory, index) for index in range(used)]


def words(plan: Plan, unit: str) -> str:
    search, metric = SEARCHES[plan.method], METRICS[plan.metric]
    # then neither metric nor calibration text has a part in what is removed
    if search.asks == "nothing":
        return f"{search.title}, {unit}"
    return (
        f"{search.title}, {unit}, by"
        f" {metric.title}{PER_WORDS.get(str(plan.options.get('per')), '')}"
    )


def card(plan: Plan) -> str:
    by = "" if SEARCHES[plan.method].asks == "nothing" else f" by {code(plan.metric)}"
    options = ", ".join(
        code(f"{key}: {value}") for key, value in plan.options.items() if key != "order"
    )
    return (
        f"without {plan.blocks['mha']} of its {plan.layers} MHA and {plan.blocks['mlp']} of its"
        f" {plan.layers} MLP blocks, chosen by `{plan.method}`"
        f" search{by}{f' ({options})' if options else ''}"
    )


def _apply(model: PreTrainedModel, plan: Plan, rows: Rows) -> PreTrainedModel:
    from blockpruner.model.models import prune_

    return prune_(model, plan.mask)


def _temporarily_pruned(
    model: PreTrainedModel, plan: Plan
) -> AbstractContextManager[PreTrainedModel]:
    from blockpruner.model.models import masked

    return masked(model, plan.mask)


BLOCKS = Kind(
    "mask",
    "blocks removed",
    score=score,
    commit=commit,
    is_part=True,
    apply_=_apply,
    temporarily_pruned=_temporarily_pruned,
    identity=lambda plan, rows: {"removed": list(plan.removed)},
    words=words,
    taken_out=lambda plan: " + ".join(f"{plan.blocks[kind]} {kind.upper()}" for kind in BlockKind),
    card=card,
)
