"""The choice among proposals: all are compensated, and the best by rows that nothing else has seen is kept.

Which plan is best before weights are fitted says little about which is best afterwards.

Decides what is kept (one folder: the plan, the facts, and the weights that changed). How weights are fitted is decided
in `compensate`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from blockpruner.core.plan import Plan
from blockpruner.core.progress import Observer
from blockpruner.core.settings import Texts
from blockpruner.evaluation.kinds import perplexities, uneven
from blockpruner.evaluation.perplexity import measure_perplexity
from blockpruner.healing.compensate import compensate
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.methods.apply import Pruning, pruned_copy
from blockpruner.methods.healed import COMPENSATE_FACTS, Healed, save_healed, set_weights_
from blockpruner.store.files import replace_directory, write_sealed_json
from blockpruner.store.plans import save_plan

PLAN = "plan.json"


@dataclass(frozen=True)
class Healing:
    """The proposal that is kept, and its compensated weights."""

    name: str
    """The name of the search that proposed it."""
    plan: Plan
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    """The changed weights by their names in the pruned model; empty where nothing helped, or nothing was asked for."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What was done, as JSON: the compensation's facts; under "judged" the perplexity of each proposal on the rows that
    judge."""

    def healed(self, data: Texts) -> Healed | None:
        """What was done, to texts of `data`; None where no weight changed."""
        if not self.weights:
            return None
        method, tokens = self.facts["method"], self.facts["tokens"]
        words = f"compensated without training ({method}, {tokens:,} tokens of `{data.title}`)"
        return Healed(Path(), "", words, (), "", {method: self.facts["perplexity"]})


def choose(
    dense: Callable[[], PreTrainedModel],
    plans: Mapping[str, Plan],
    fit: CalibrationSet,
    tuning: CalibrationSet,
    judge: CalibrationSet,
    search: CalibrationSet,
    observer: Observer,
) -> Healing:
    """Compensate proposals as their plans say, and keep the one with the lowest perplexity on the rows that judge.

    Args:
        dense: loads the dense model, which is as before at the end; called if something must be computed.
        plans: by the proposals' names, all of one target; one alone is not judged.
        tuning: the rows that choose the strength of the fit.
        search: the calibration rows, of which some kinds of plans make weights.

    Raises:
        InputError: too few rows to fit to; or see `compensate`.
    """
    dense = cache(dense)
    if next(iter(plans.values())).compensate == "none":
        tried = [Healing(name, plan) for name, plan in plans.items()]
    else:
        found = compensate(dense(), plans, fit, tuning, observer)
        tried = [Healing(name, plans[name], weights, told) for name, (weights, told) in found.items()]
    if len(tried) == 1:
        return tried[0]
    judged, kinds = {}, {}
    for one in tried:
        model = pruned_copy(dense(), one.plan, search.rows)
        set_weights_(model, one.weights, shared=True)
        own = measure_perplexity(model, judge.rows)
        judged[one.name], kinds[one.name] = own.perplexity, perplexities(own.row_nll, judge.kinds)
    best = min(tried, key=lambda one: judged[one.name])
    words = ", ".join(f"{name} {value:.2f}" for name, value in judged.items())
    observer.note(f"perplexity of the rows that judge: {words}; {best.name} is kept")
    plan = best.plan
    if after := kinds[best.name]:
        before = perplexities(measure_perplexity(dense(), judge.rows).row_nll, judge.kinds)
        plan = replace(plan, kinds={kind: {"dense": before[kind], "after": after[kind]} for kind in after})
        if warning := uneven({kind: after[kind] / before[kind] for kind in after}):
            observer.note(f"warning: {warning}")
    return replace(best, plan=plan, facts={**best.facts, "judged": judged})


def keep(folder: Path, found: Healing, pruning: Pruning, data: Texts) -> None:
    """Write what was chosen, as a whole or not at all.

    Args:
        pruning: the model of the plan.
        data: the source of the rows of the fit.
    """

    def build(directory: Path) -> None:
        save_plan(found.plan, directory / PLAN)
        write_sealed_json(directory / COMPENSATE_FACTS, {"search": found.name, **found.facts})
        if (told := found.healed(data)) is not None:
            save_healed(directory, found.weights, pruning.identity, told.words, data, perplexity=told.perplexity)

    replace_directory(folder, build)
