"""LaCo as a kind of method: the merges that remove the number of layers nearest to a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing
from functools import cache, partial
from itertools import accumulate
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
from blockpruner.methods.weights import Details, Removed, WeightsKind
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


class LaCo(WeightsKind):
    name = "laco"
    title = "LaCo"
    options = LacoOptions
    exports = frozenset({"hf", "nas", "mlx", "gguf"})
    is_reversible = True
    version = PLAN_VERSION

    def planner(self, options: LacoOptions, job: Job) -> Callable[[Budget], Details]:
        return partial(plan_merges, options, job)

    def require(self, budget: Budget, options: LacoOptions, config: Config) -> None:
        """Refuse settings by which no walk, whatever the similarities, removes the layers that a
        budget asks for."""
        costs = resources_of(config).get(budget.resource)
        if costs is None:
            # The budget is a speed-up: how much each block takes is measured first.
            return
        try:
            walk, layers = walk_for(options, budget, costs)
            walk.require(layers)
        except UnreachableError as error:
            raise UnreachableError(f"budget {budget.text!r}: {error}") from None

    def removed(self, details: Details, config: Config) -> Removed:
        depth = int(config["num_hidden_layers"])
        merges = read_merges(details["merges"])
        merged_layers = set[int]()
        for group in layers_after(merges, depth):
            merged_layers.update(group[1:])
        gone = frozenset(block for block in all_blocks(depth) if block.layer in merged_layers)
        return Removed(gone, order=tuple(map(str, merges)))

    def apply_(self, model: PreTrainedModel, plan: Plan, rows: Rows) -> PreTrainedModel:
        from blockpruner.methods.laco.merging import merge_

        return merge_(model, read_merges(plan.details["merges"]), plan.details["variant"])

    def temporarily_pruned(
        self, model: PreTrainedModel, plan: Plan
    ) -> AbstractContextManager[PreTrainedModel]:
        from blockpruner.methods.laco.merging import merged

        return merged(model, read_merges(plan.details["merges"]), plan.details["variant"])

    def facts(self, plan: Plan, rows: str) -> dict[str, Any]:
        return {
            "merges": plan.details["merges"],
            "variant": plan.details["variant"],
            "weights": WEIGHTS_VERSION,
        }

    def method_words(self, plan: Plan, unit: str) -> str:
        return f"LaCo ({plan.details['variant']}), layers merged, by cosine similarity"

    def removed_words(self, plan: Plan) -> str:
        return f"{plan.blocks['mha']} layers by merging"

    def card_words(self, plan: Plan) -> str:
        return (
            f"with {plan.blocks['mha']} of its {plan.layers} layers merged into others by LaCo"
            f" (arXiv 2402.11187, variant `{plan.details['variant']}`, merges"
            f" {', '.join(plan.order)})"
        )

    def step_words(self, plan: Plan) -> str:
        return (
            f"merges {', '.join(plan.order)}, in order (N+k: the k layers above layer N of that"
            " moment into it), each above a similarity of"
            f" {plan.details['threshold']:.4g}"
        )


def plan_merges(options: LacoOptions, job: Job, budget: Budget) -> Details:
    """The merges that remove the number of layers nearest to the budget, as [layer, count] in
    order, with what was measured of them. Raises InputError that names what is nearest, for a
    budget or settings that no walk meets."""
    from blockpruner.methods.laco.merging import Similarity, merged_nll

    material = job.material
    rows = job.calibration.rows
    # Only searches of masks can keep trials in memory.
    assert material.trials is not None
    walk, layers = walk_for(options, budget, job.resources[budget.resource])
    fields = {
        "calibration": job.calibration.digest,
        "model": material.identity,
        "dtype": material.dtype,
        "variant": options.variant,
        "plan_version": PLAN_VERSION,
    }
    search = fingerprint(fields)
    path = material.trials / f"laco-{search}.jsonl"
    with closing(Journal(path, {"fingerprint": search, "fields": fields})) as log:
        problems = list[str]()
        similarity_by_merges = dict[Merges, float]()
        for entry in log.read(problems):
            similarity_by_merges[tuple(read_merges(entry["merges"]))] = entry["similarity"]
        for problem in problems:
            material.observer.note(f"warning: {problem}")

        @cache
        def measure() -> Similarity:
            """Loads the model, when a similarity is needed that is not in the journal."""
            return Similarity(material.dense(), rows, options.variant, material.observer.advance)

        def similarity(merges: Merges) -> float:
            if merges not in similarity_by_merges:
                value = measure()(merges)
                similarity_by_merges[merges] = value
                log.append({"merges": write_merges(merges), "similarity": value})
            return similarity_by_merges[merges]

        try:
            threshold, merges = search_threshold(similarity, walk, layers)
        except InputError as error:
            raise type(error)(f"budget {budget.text!r}: {error}") from error
        merged_similarity = similarity(merges)
        nll = merged_nll(material.dense(), rows, merges, options.variant)
    return {
        "variant": options.variant,
        "merges": write_merges(merges),
        "threshold": threshold,
        "similarity": merged_similarity,
        "layers": dropped(merges, walk.depth),
        "nll": nll,
    }


def walk_for(options: LacoOptions, budget: Budget, costs: Costs) -> tuple[Walk, int]:
    """The walk, and the number of layers whose removal is nearest to the budget."""
    depth = len(costs.blocks) // 2
    walk = Walk(depth, options.count, options.lowest, options.highest, options.interval)
    # One layer is left at least.
    layers = removable_units(depth, "layer", "all")[: depth - 1]
    require_reachable(budget, layers, costs)
    prefixes = list(accumulate(layers, Mask.union))
    return walk, choose_prefix(budget, prefixes, costs)


def read_merges(pairs: Sequence[Sequence[int]]) -> list[Merge]:
    return [Merge(layer, count) for layer, count in pairs]


def write_merges(merges: Merges) -> list[list[int]]:
    return [[merge.layer, merge.count] for merge in merges]


LACO = LaCo()
