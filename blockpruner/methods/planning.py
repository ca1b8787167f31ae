"""What a transformation will do for a budget, its details: merges found by a search, or a width that is only counted.

PLANNERS has one function for each of TRANSFORMS. Details are what a plan carries; how they are applied to weights is
decided in `merging` and `slicegpt`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from blockpruner.core.blocks import Mask, removable_units
from blockpruner.core.budgets import Budget, Resources, choose_prefix, require_reachable
from blockpruner.core.errors import InputError
from blockpruner.core.families import Config
from blockpruner.core.options import require_one_of
from blockpruner.core.progress import Observer
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.methods.laco.walk import Measure, Merges, SimilarityLog, dropped, search_threshold, similarity_fields
from blockpruner.methods.slicegpt.widths import width_for_ratio
from blockpruner.scoring.work import Scorer
from blockpruner.store.provenance import fingerprint


class Bench(Protocol):
    """The dense model, and what is measured with it; `merging.ModelBench` is one."""

    def scorer(self) -> Scorer:
        """Of the dense model."""

    def similarity(self, variant: str, known: Mapping[Merges, float], record: Record) -> Measure:
        """Measures what is not known."""

    def merged_nll(self, merges: Merges, variant: str) -> list[float]:
        """Of the merged model, each row's mean NLL, nats per token."""


@dataclass(frozen=True)
class Material:
    """What a planner may use. make_bench: loads the dense model, only if something must be measured."""

    calibration: CalibrationSet
    model_identity: str
    dtype: str
    config: Config
    resources: Resources
    trials: Path
    make_bench: Callable[[], Bench]
    observer: Observer

    @cached_property
    def bench(self) -> Bench:
        return self.make_bench()


Record = Callable[[Merges, float], object]
Planner = Callable[[Budget, Mapping[str, Any], Material], dict[str, Any]]


def plan_merges(budget: Budget, options: Mapping[str, Any], material: Material) -> dict[str, Any]:
    """LaCo's merges that remove the number of layers nearest to the budget.

    Returns:
        variant; merges, as [layer, count] in order; threshold; similarity of the merged model to the dense one;
        layers: how many are removed; nll: the merged model's, each calibration row's mean.

    Raises:
        InputError: a budget or settings that no walk meets; names what is nearest.
    """
    variant, costs = str(options["variant"]), material.resources[budget.resource]
    require_one_of("variant", variant, ("repo", "paper"))
    depth = len(costs.blocks) // 2
    layers = removable_units(depth, "layer", "all")[: depth - 1]  # one layer is left at least
    require_reachable(budget, layers, costs)
    wanted = choose_prefix(budget, [Mask().union(*layers[: k + 1]) for k in range(depth - 1)], costs)
    fields = similarity_fields(material.calibration.digest, material.model_identity, material.dtype, variant)
    with closing(SimilarityLog(material.trials / f"laco-{fingerprint(fields)}.jsonl", fields)) as log:
        for problem in log.problems:
            material.observer.note(f"warning: {problem}")
        measure = _Measure(material, variant, log)
        walk = {key: options[key] for key in ("count", "lowest", "highest", "interval")}
        try:
            threshold, merges = search_threshold(measure, depth, wanted, **walk)
        except InputError as error:
            raise InputError(f"budget {budget.text!r}: {error}") from error
        similarity = measure(merges)
    return {
        "variant": variant,
        "merges": [[merge.layer, merge.count] for merge in merges],
        "threshold": threshold,
        "similarity": similarity,
        "layers": dropped(merges, depth),
        "nll": material.bench.merged_nll(merges, variant),
    }


@dataclass
class _Measure:
    """Similarities, known or measured; the model is loaded when the first is not known."""

    material: Material
    variant: str
    log: SimilarityLog

    @cached_property
    def _similarity(self) -> Measure:
        return self.material.bench.similarity(self.variant, self.log.known, self.log.record)

    def __call__(self, merges: Merges) -> float:
        return self.log.known[merges] if merges in self.log.known else self._similarity(merges)


def plan_width(budget: Budget, options: Mapping[str, Any], material: Material) -> dict[str, Any]:
    """SliceGPT's width whose ratio is nearest to the budget; nothing is searched.

    Returns:
        width; hidden: the dense model's.

    Raises:
        InputError: a budget that is no share of parameters, a ratio out of reach, or a family that cannot be sliced.
    """
    if budget.ratio is None or budget.resource != "parameters":
        raise InputError(
            f"budget {budget.text!r} is met by removing blocks, and slicegpt removes none; give a share of all "
            'parameters ("0.22")'
        )
    return {"width": width_for_ratio(material.config, budget.ratio), "hidden": int(material.config["hidden_size"])}


PLANNERS: dict[str, Planner] = {"laco": plan_merges, "slicegpt": plan_width}
