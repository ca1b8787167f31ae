"""LaCo as a kind of method: the merges that remove the number of layers nearest to a budget."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, closing
from functools import cache, partial
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any, Literal

from blockpruner.core.blocks import Mask, all_blocks, removable_units
from blockpruner.core.budgets import Budget, choose_prefix, require_reachable, resources_of
from blockpruner.core.errors import InputError, UnreachableError
from blockpruner.core.families import Config, Costs
from blockpruner.core.options import Options
from blockpruner.core.plan import Plan
from blockpruner.methods.kind import Job
from blockpruner.methods.laco.walk import (
    Merge,
    Merges,
    Walk,
    dropped,
    layers_after,
    search_threshold,
)
from blockpruner.methods.weights import Details, Removed, weights_kind
from blockpruner.scoring.work import Rows
from blockpruner.store.journal import Journal
from blockpruner.store.provenance import fingerprint
from blockpruner.versions import PLAN_VERSION, WEIGHTS_VERSION

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LacoOptions(Options):
    count: int = 4
    """C: how many layers become one. The public notebooks have 3 and 7."""
    lowest: int = 0
    """L: the lowest layer that the walk visits, counted from 0."""
    highest: int | None = None
    """H: the highest layer; null is the last."""
    interval: int = 1
    """I: how far the walk goes down after a merge."""
    variant: Literal["repo", "paper"] = "repo"
    """How weights are merged: as the public notebook does it, or by the paper's equation."""


def plan_merges(options: LacoOptions, job: Job, budget: Budget) -> Details:
    """LaCo's merges that remove the number of layers nearest to the budget, as [layer, count] in
    order, with what was measured of them. Raises InputError for a budget or settings that no walk
    meets; it names what is nearest."""
    material, costs = job.material, job.resources[budget.resource]
    assert material.trials is not None  # only searches of masks keep trials in memory
    from blockpruner.methods.laco.merging import Similarity, merged_nll

    walk, wanted = _asked(options, budget, costs)
    of = {
        "calibration": job.calibration.digest,
        "model": material.identity,
        "dtype": material.dtype,
    }
    fields = {**of, "variant": options.variant, "plan_version": PLAN_VERSION}
    of_search, problems = fingerprint(fields), list[str]()
    path = material.trials / f"laco-{of_search}.jsonl"
    with closing(Journal(path, {"fingerprint": of_search, "fields": fields})) as log:
        known: dict[Merges, float] = {
            tuple(_merges(entry)): entry["similarity"] for entry in log.read(problems)
        }
        for problem in problems:
            material.observer.note(f"warning: {problem}")

        @cache
        def measure() -> Similarity:
            """The model is loaded when the first similarity is not known."""
            return Similarity(
                material.dense(), job.calibration.rows, options.variant, material.observer.advance
            )

        def similarity(merges: Merges) -> float:
            if merges not in known:
                known[merges] = measure()(merges)
                log.append(
                    {
                        "merges": [[merge.layer, merge.count] for merge in merges],
                        "similarity": known[merges],
                    }
                )
            return known[merges]

        try:
            threshold, merges = search_threshold(similarity, walk, wanted)
        except InputError as error:
            raise type(error)(f"budget {budget.text!r}: {error}") from error
        reached, nll = (
            similarity(merges),
            merged_nll(material.dense(), job.calibration.rows, merges, options.variant),
        )
    found: Details = {
        "variant": options.variant,
        "merges": [[merge.layer, merge.count] for merge in merges],
    }
    measured = {
        "threshold": threshold,
        "similarity": reached,
        "layers": dropped(merges, walk.depth),
        "nll": nll,
    }
    return found | measured


def _asked(options: LacoOptions, budget: Budget, costs: Costs) -> tuple[Walk, int]:
    """The walk, and the number of layers whose removal is nearest to the budget."""
    depth = len(costs.blocks) // 2
    walk = Walk(depth, options.count, options.lowest, options.highest, options.interval)
    layers = removable_units(depth, "layer", "all")[: depth - 1]  # one layer is left at least
    require_reachable(budget, layers, costs)
    return walk, choose_prefix(budget, list(accumulate(layers, Mask.union)), costs)


def require_merges(budget: Budget, options: LacoOptions, config: Config) -> None:
    """Refuse settings by which no walk, whatever the similarities, removes the layers that a budget
    asks for."""
    costs = resources_of(config).get(budget.resource)
    if costs is None:  # a speed-up, which is measured first
        return
    try:
        walk, wanted = _asked(options, budget, costs)
        walk.require(wanted)
    except UnreachableError as error:
        raise UnreachableError(f"budget {budget.text!r}: {error}") from None


def _removed(details: Details, config: Config) -> Removed:
    depth, merges = int(config["num_hidden_layers"]), _merges(details)
    merged = set(chain.from_iterable(layer[1:] for layer in layers_after(merges, depth)))
    gone = frozenset(block for block in all_blocks(depth) if block.layer in merged)
    return Removed(gone, order=tuple(map(str, merges)))


def _merges(details: Mapping[str, Any]) -> list[Merge]:
    return [Merge(*pair) for pair in details["merges"]]


def _apply(model: PreTrainedModel, plan: Plan, rows: Rows) -> PreTrainedModel:
    from blockpruner.methods.laco.merging import merge_

    return merge_(model, _merges(plan.details), plan.details["variant"])


def _temporarily_pruned(
    model: PreTrainedModel, plan: Plan
) -> AbstractContextManager[PreTrainedModel]:
    from blockpruner.methods.laco.merging import merged

    return merged(model, _merges(plan.details), plan.details["variant"])


LACO = weights_kind(
    "laco",
    "LaCo",
    plan=lambda options, job: partial(plan_merges, options, job),
    removed=_removed,
    apply_=_apply,
    temporarily_pruned=_temporarily_pruned,
    identity=lambda plan, rows: (
        {name: plan.details[name] for name in ("merges", "variant")} | {"weights": WEIGHTS_VERSION}
    ),
    words=lambda plan, unit: (
        f"LaCo ({plan.details['variant']}), layers merged, by cosine similarity"
    ),
    taken_out=lambda plan: f"{plan.blocks['mha']} layers by merging",
    card=lambda plan: (
        f"with {plan.blocks['mha']} of its {plan.layers} layers merged into others by LaCo (arXiv"
        f" 2402.11187, variant `{plan.details['variant']}`, merges {', '.join(plan.order)})"
    ),
    options=LacoOptions,
    require=require_merges,
    steps=lambda plan: (
        f"merges {', '.join(plan.order)}, in order (N+k: the k layers above layer N of that moment"
        f" into it), each above a similarity of {plan.details['threshold']:.4g}"
    ),
    exports=frozenset({"hf", "nas", "mlx", "gguf"}),
    version=PLAN_VERSION,
)
