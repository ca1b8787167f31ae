"""The choice among proposals: all are compensated, and the best by rows that nothing else has seen is kept.

Which plan is best before weights are fitted says little about which is best afterwards.

Decides what is kept (one folder: the plan, the facts, and the weights that changed). How weights are fitted is decided
in `compensate`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from blockpruner.core.errors import NonFiniteLossError
from blockpruner.core.plan import Plan
from blockpruner.core.progress import Observer
from blockpruner.core.settings import Texts
from blockpruner.evaluation.kinds import perplexities, uneven
from blockpruner.evaluation.perplexity import HeldOutPerplexity, measure_perplexity
from blockpruner.healing.compensate import compensate
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.methods.apply import Pruning, pruned_copy
from blockpruner.methods.healed import COMPENSATE_FACTS, Healed, save_healed, set_weights_
from blockpruner.store.files import replace_directory, write_sealed_json
from blockpruner.store.plans import save_plan

PLAN = "plan.json"

HEAT, ENOUGH, BEHIND = 4, 64, 1.1
"""Several proposals are first fitted to one of four rows, where there are at least 64. Those whose perplexity is then
more than 1.1 times the best one's are out: with all rows, proposals came back by 0.05 (three models, not kept)."""


@dataclass(frozen=True)
class Healing:
    """The proposal that is kept, and its compensated weights."""

    name: str
    """The name of the search that proposed it."""
    plan: Plan
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    """The changed weights by their names in the pruned model; empty where nothing helped, or nothing was asked for."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What was done, as JSON: the compensation's facts; by proposal, under "judged" the perplexity on the rows that
    judge, under "heat" that on half of them after a fit to a quarter of the rows."""

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
    """Compensate proposals, all of one target, as their plans say, and keep the one with the lowest perplexity on the
    rows that judge; one alone is not judged. Raises what `compensate` raises.

    Args:
        dense: loads the dense model, which is as before at the end; called if something must be computed.
        tuning, search: the rows that choose the strength of the fit; and those of which some kinds make weights.
    """
    dense = cache(dense)
    fits = next(iter(plans.values())).compensate != "none"

    def tried(plans: Mapping[str, Plan], every: int = 1) -> list[Healing]:
        """The proposals, fitted to every n-th row."""
        if not fits:
            return [Healing(name, plan) for name, plan in plans.items()]
        some, others = (CalibrationSet(part.rows[::every]) for part in (fit, tuning))
        found = compensate(dense(), plans, some, others, observer, is_last=every == 1)
        return [Healing(name, plans[name], *each) for name, each in found.items()]

    def judged(healings: Sequence[Healing], every: int = 1) -> dict[str, HeldOutPerplexity]:
        """By rows that judge, every n-th; without the models that overflow, as long as one does not."""
        found = {}
        for one in healings:
            try:
                found[one.name] = measure_perplexity(model_of(dense(), one, search), judge.rows[::every])
            except NonFiniteLossError:
                if not found and one is healings[-1]:
                    raise
        return found

    def numbers(found: Mapping[str, HeldOutPerplexity]) -> dict[str, float]:
        return {name: own.perplexity for name, own in found.items()}

    def words(found: Mapping[str, HeldOutPerplexity]) -> str:
        return ", ".join(f"{name} {value:.2f}" for name, value in numbers(found).items())

    heat, left = dict[str, HeldOutPerplexity](), dict(plans)
    if fits and len(plans) > 1 and len(fit.rows) >= ENOUGH:
        heat = judged(tried(plans, HEAT), 2)
        left = {name: plans[name] for name, n in numbers(heat).items() if n <= BEHIND * min(numbers(heat).values())}
        told = f"after a refit to every {HEAT}th row, perplexity of texts that judge: {words(heat)}"
        observer.note(f"{told}; next, a refit to all rows: {', '.join(left)}")
    finalists = tried(left)
    if len(plans) == 1:
        return finalists[0]
    known = judged(finalists)
    best = min(finalists, key=lambda one: known[one.name].perplexity if one.name in known else math.inf)
    observer.note(f"perplexity of texts that judge: {words(known)}; {best.name} is kept")
    plan = best.plan
    if after := perplexities(known[best.name].row_nll, judge.kinds):
        before = perplexities(measure_perplexity(dense(), judge.rows).row_nll, judge.kinds)
        plan = replace(plan, kinds={kind: {"dense": before[kind], "after": after[kind]} for kind in after})
        if warning := uneven({kind: after[kind] / before[kind] for kind in after}):
            observer.note(f"warning: {warning}")
    return replace(best, plan=plan, facts={**best.facts, "heat": numbers(heat), "judged": numbers(known)})


def model_of(dense: PreTrainedModel, found: Healing, search: CalibrationSet) -> PreTrainedModel:
    """The healed model, beside the dense one, whose tensors it shares where it can."""
    model = pruned_copy(dense, found.plan, search.rows)
    set_weights_(model, found.weights, shared=True)
    return model


def keep(folder: Path, found: Healing, pruning: Pruning, data: Texts) -> None:
    """Write what was chosen, as a whole or not at all. `pruning` is the model of the plan, and `data` the source of the
    rows of the fit."""

    def build(directory: Path) -> None:
        save_plan(found.plan, directory / PLAN)
        write_sealed_json(directory / COMPENSATE_FACTS, {"search": found.name, **found.facts})
        if (told := found.healed(data)) is not None:
            save_healed(directory, found.weights, pruning.identity, told.words, data, perplexity=told.perplexity)

    replace_directory(folder, build)
