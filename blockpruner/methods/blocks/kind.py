"""The kind of plan that removes blocks: a mask, found by any search of `search.registry`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import accumulate
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockpruner.core.blocks import DENSE, BlockKind, Mask, format_mask, parse_mask, sorted_blocks
from blockpruner.core.budgets import (
    Resources,
    choose_prefix,
    is_settled,
    parse_budget,
    resources_of,
)
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
    counts = resources["parameters"]
    goal = parse_budget(budget, counts)
    prefixes = list(accumulate(order, or_))
    steps = choose_prefix(goal, prefixes, resources[goal.resource])
    return make_plan(
        current,
        budget,
        config,
        gone=prefixes[steps - 1],
        perplexities=(perplexities[0], perplexities[steps]),
        **order_fields(order[:steps], counts),
    )


def order_fields(order: Sequence[Mask], counts: Costs) -> dict[str, Any]:
    """The fields of a plan that follow from the units that are removed, in order."""
    prefixes = list(accumulate(order, or_))
    return {
        "removed": tuple(str(block) for block in sorted_blocks(DENSE.union(*order))),
        "order": tuple(format_mask(unit) for unit in order),
        "ratios": tuple(counts.ratio(prefix) for prefix in prefixes),
    }


def require_of(plan: Plan, config: Config, model: str, pruned: int | None) -> None:
    """Refuse a plan of another shape than the model of this name has, or that does not follow from
    what it removes; `pruned` is as from `Kind.pruned_parameters`."""
    resources = resources_of(config)
    counts = resources["parameters"]
    # The plan of a deeper model names blocks that this one lacks.
    order = [parse_mask(unit) & counts.blocks.keys() for unit in plan.order]
    fields = sizes(resources, DENSE.union(*order), pruned) | order_fields(order, counts)
    # The plan may also hold a measured time, which does not follow from the config.
    fields["removes"] = {**plan.removes, **fields["removes"]}
    for name, value in fields.items():
        plan_value = getattr(plan, name)
        if plan_value != value:
            raise InputError(
                f"the plan is of another model: its base is {plan.base}, and its {name} is"
                f" {plan_value!r}, which for {model} is {value!r}; give the model that the plan was"
                " made for, and an unchanged plan",
                rule="plan-differs",
                key=name,
                value=plan_value,
            )


def require_scored(
    budget: str, order: Sequence[Mask], resources: Resources, current: Current
) -> None:
    """Refuse a budget that a nested search was not run far enough for: it may have been scored for
    other budgets."""
    goal = parse_budget(budget, resources["parameters"])
    costs = resources[goal.resource]
    prefixes = list(accumulate(order, or_))
    remaining = []
    for unit in units_of(request(current.score), resources):
        if not unit <= prefixes[-1]:
            remaining.append(unit)
    if not is_settled(goal, prefixes, costs, remaining):
        reached = goal.amount(prefixes[-1], costs)
        raise InputError(
            f"the run is scored up to {reached}, not to budget {budget!r}; run its stage score"
        )


class Blocks(Kind):
    name = "mask"
    title = "blocks removed"
    removes_blocks = True
    is_reversible = True
    keeps_weights = True

    def score(self, job: Job) -> tuple[Current, Counts]:
        search_request = request(job.score)
        observer = job.material.observer
        rows = job.calibration
        loss = search_request.metric.name
        fields = dict(search_request.fields)
        if search_request.options.price == "latency":
            fields["latency"] = job.latency
        fingerprint = search_fingerprint(job.store_fields(loss), fields)
        current = job.current(
            self.name, fingerprint, search_request.search.nested, search_request.options, loss
        )

        def keep(budget: str, iteration: Iteration, took: Took) -> None:
            directory = trace_directory(job.folder, current, budget)
            write_iteration(directory, iteration, fingerprint, took)

        with job.stores(search_request.losses) as stores:
            problems = seed_stores(
                job.folder / fingerprint,
                fingerprint,
                stores[loss],
                stores[NLL.name],
                search_request.metric.influence,
            )
            for problem in problems:
                observer.note(f"warning: {problem}")
            observer.note(
                f"calibration: {len(rows.rows)} rows, in all {rows.tokens:,} tokens; search"
                f" {fingerprint}"
            )
            traces, counts = search(
                search_request,
                rows,
                stores,
                job.material.scorer,
                job.resources,
                job.budgets,
                observer,
                keep,
            )
        for budget, trace in traces.items():
            directory = trace_directory(job.folder, current, budget)
            drop_strays(directory, trace, current.nested, fingerprint)
        return current, counts

    def commit(
        self, scores: Path, config: Config, budget: str, current: Current
    ) -> tuple[Plan, Sequence[Path]]:
        resources = known_resources(config, budget, current)
        directory = trace_directory(scores, current, budget)
        trace = read_trace(directory, current.search)
        if not trace:
            raise InputError(
                f"{directory} has no iteration for budget {budget!r}; run its stage score"
            )
        order, perplexities = removals(trace, current.nested)
        if current.nested:
            require_scored(budget, order, resources, current)
        plan = choose(order, perplexities, config, budget, current)
        used = len(plan.order) if plan.nested else len(trace)
        return plan, [table_path(directory, index) for index in range(used)]

    def apply_(self, model: PreTrainedModel, plan: Plan, rows: Rows) -> PreTrainedModel:
        from blockpruner.model.models import prune_

        return prune_(model, plan.mask)

    def temporarily_pruned(
        self, model: PreTrainedModel, plan: Plan
    ) -> AbstractContextManager[PreTrainedModel]:
        from blockpruner.model.models import masked

        return masked(model, plan.mask)

    def identity(self, plan: Plan, rows: str) -> dict[str, Any]:
        return {"removed": list(plan.removed)}

    def method_words(self, plan: Plan, unit: str) -> str:
        search = SEARCHES[plan.method]
        # Neither a metric nor calibration text decides what such a search removes.
        if search.asks == "nothing":
            return f"{search.title}, {unit}"
        price = PER_WORDS.get(str(plan.options.get("per")), "")
        return f"{search.title}, {unit}, by {METRICS[plan.metric].title}{price}"

    def removed_words(self, plan: Plan) -> str:
        return " + ".join(f"{plan.blocks[kind]} {kind.upper()}" for kind in BlockKind)

    def card_words(self, plan: Plan) -> str:
        by = "" if SEARCHES[plan.method].asks == "nothing" else f" by {code(plan.metric)}"
        options = []
        for key, value in plan.options.items():
            if key != "order":
                options.append(code(f"{key}: {value}"))
        option_words = f" ({', '.join(options)})" if options else ""
        return (
            f"without {plan.blocks['mha']} of its {plan.layers} MHA and {plan.blocks['mlp']} of its"
            f" {plan.layers} MLP blocks, chosen by `{plan.method}` search{by}{option_words}"
        )


BLOCKS = Blocks()
