"""The choice among proposals: all are compensated, and the best by rows that nothing else has seen
is kept.

Which plan is best before weights are fitted says little about which is best afterwards.

Decides what is kept (one folder: the plan, the facts, and the weights that changed). How weights
are fitted is decided in `compensate`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blockpruner.core.errors import NonFiniteLossError
from blockpruner.core.plan import Plan
from blockpruner.core.progress import Observer
from blockpruner.core.settings import Texts
from blockpruner.evaluation.kinds import Loss, best_loss, perplexities, uneven
from blockpruner.evaluation.perplexity import measure_perplexity
from blockpruner.healing.compensate import compensate
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.methods.apply import Pruning, pruned_copy
from blockpruner.methods.healed import COMPENSATE_FACTS, Healed, save_healed, set_weights_
from blockpruner.store.files import replace_directory, write_sealed_json
from blockpruner.store.plans import save_plan

PLAN = "plan.json"

HEAT, ENOUGH, BEHIND = 4, 64, 1.1
"""Several proposals are first fitted to one of four rows, where there are at least 64. Those whose
worst kind has then lost more than 1.1 times as much as the best one's are out."""

SHARES = (0.75, 0.5, 0.25)
"""How much of a change of weights is tried where a kind of text lost by all of it."""

BATCH = 8
"""Rows that judge which are computed at once."""


@dataclass(frozen=True)
class Healing:
    """The proposal that is kept, and its compensated weights."""

    name: str
    """The name of the search that proposed it."""
    plan: Plan
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    """The changed weights by their names in the pruned model; empty where nothing helped, or
    nothing was asked for."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What was done, as JSON: the compensation's facts; by proposal, under "judged" what it lost by
    the rows that judge (the mean of all kinds, and the worst kind), under "heat" the same by half
    of them after a fit to a quarter of the rows."""

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
    """Compensate proposals, all of one target, as their plans say, and keep the one that lost least
    on the rows that judge (`kinds.best_loss`). Where there are none, the first is kept. Raises what
    `compensate` raises.

    Args:
        dense: loads the dense model, which is as before at the end; called if something must be
            computed.
        tuning, search: the rows that choose the strength of the fit; and those of which some kinds
            make weights.
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

    if not judge.rows:
        return tried(dict([next(iter(plans.items()))]))[0]
    judging = Judging(dense, judge, search)
    heat, left = dict[str, Loss](), dict(plans)
    if fits and len(plans) > 1 and len(fit.rows) >= ENOUGH:
        heat = judging.losses(judging.measured(tried(plans, HEAT), 2))
        least = min(loss.worst for loss in heat.values())
        left = {name: plans[name] for name, loss in heat.items() if loss.worst <= BEHIND * least}
        told = f"after a refit to every {HEAT}th row: {_words(heat)}"
        observer.note(f"{told}; next, a refit to all rows: {', '.join(left)}")
    finalists = tried(left)
    rows = judging.measured(finalists)
    losses = judging.losses(rows)
    best = next(one for one in finalists if one.name == best_loss(losses))
    if len(losses) > 1:
        observer.note(f"{_words(losses)}; {best.name} is kept")
    best, row_nll = accepted(best, rows[best.name], judging, observer)
    after, before = (perplexities(each, judging.kinds) for each in (row_nll, judging.before))
    plan = replace(
        best.plan, kinds={kind: {"dense": before[kind], "after": after[kind]} for kind in after}
    )
    loss = Loss.of(plan.kinds or {})
    if warning := uneven(loss.kinds):
        observer.note(f"warning: {warning}")
    facts = {"heat": _facts(heat), "judged": _facts({**losses, best.name: loss})}
    return replace(best, plan=plan, facts={**best.facts, **facts})


def accepted(
    found: Healing, row_nll: Sequence[float], judging: "Judging", observer: Observer
) -> tuple[Healing, Sequence[float]]:
    """The model with the share of its change of weights that is best by every second row that
    judges, and the NLL of all these rows. All of the change is kept unless a kind of text lost by
    it."""
    if not found.weights:
        return found, row_nll
    plain = replace(found, weights={})
    tried = {"1.0": row_nll[::2], "0.0": judging.measured([plain], 2)[found.name]}
    losses = judging.losses(tried)
    harmed = [
        kind for kind, loss in losses["1.0"].kinds.items() if loss > losses["0.0"].kinds[kind]
    ]
    if not harmed:
        return found, row_nll
    models = {
        "1.0": found,
        "0.0": plain,
        **{str(share): judging.with_share(found, share) for share in SHARES},
    }
    tried |= {share: judging.measured([models[share]], 2)[found.name] for share in map(str, SHARES)}
    share = best_loss(judging.losses(tried))
    observer.note(
        f"{', '.join(harmed)} lost by the refit: {float(share):.0%} of its change is kept"
    )
    facts = {**found.facts, "share": float(share) * found.facts.get("share", 1.0)}
    best = replace(models[share], facts=facts)
    return best, judging.measured([best])[best.name]


@dataclass
class Judging:
    """The rows that judge, and what models say of them. Rows are of one length, and kind after
    kind."""

    dense: Callable[[], PreTrainedModel]
    rows: CalibrationSet
    search: CalibrationSet
    """The rows of which some kinds of methods make weights."""

    @cached_property
    def kinds(self) -> Sequence[str]:
        return self.rows.kinds or ("texts",) * len(self.rows.rows)

    @cached_property
    def before(self) -> Sequence[float]:
        """The dense model's mean NLL of each row."""
        return measure_perplexity(self.dense(), self.rows.rows, batch=BATCH).row_nll

    def measured(self, models: Sequence[Healing], every: int = 1) -> dict[str, Sequence[float]]:
        """The mean NLL of every n-th row by models, without those that overflow as long as one does
        not."""
        found = dict[str, Sequence[float]]()
        for one in models:
            try:
                model = model_of(self.dense(), one, self.search)
                found[one.name] = measure_perplexity(
                    model, self.rows.rows[::every], batch=BATCH
                ).row_nll
            except NonFiniteLossError:
                if not found and one is models[-1]:
                    raise
        return found

    def losses(self, measured: Mapping[str, Sequence[float]]) -> dict[str, Loss]:
        """What models lost, from the NLL of all rows or of every second."""
        found = dict[str, Loss]()
        for name, after in measured.items():
            every = 1 if len(after) == len(self.before) else 2
            own = (
                perplexities(each, self.kinds[::every]) for each in (self.before[::every], after)
            )
            dense, pruned = own
            found[name] = Loss({kind: pruned[kind] / dense[kind] for kind in dense})
        return found

    def with_share(self, found: Healing, share: float) -> Healing:
        """The model with a share of its change of weights."""
        own = dict(pruned_copy(self.dense(), found.plan, self.search.rows).named_parameters())
        weights = {
            name: torch.lerp(own[name].detach().cpu().float(), value.float(), share).to(value)
            for name, value in found.weights.items()
        }
        return replace(found, weights=weights)


def _words(losses: Mapping[str, Loss]) -> str:
    return "; ".join(f"{name} {loss}" for name, loss in losses.items())


def _facts(losses: Mapping[str, Loss]) -> dict[str, Any]:
    return {
        name: {"mean": one.mean, "worst": one.worst, "kind": one.worst_kind}
        for name, one in losses.items()
    }


def model_of(dense: PreTrainedModel, found: Healing, search: CalibrationSet) -> PreTrainedModel:
    """The healed model, beside the dense one, whose tensors it shares where it can."""
    model = pruned_copy(dense, found.plan, search.rows)
    set_weights_(model, found.weights, shared=True)
    return model


def keep(folder: Path, found: Healing, pruning: Pruning, data: Texts) -> None:
    """Write what was chosen, as a whole or not at all. `pruning` is the model of the plan, and
    `data` the source of the rows of the fit."""

    def build(directory: Path) -> None:
        save_plan(found.plan, directory / PLAN)
        write_sealed_json(directory / COMPENSATE_FACTS, {"search": found.name, **found.facts})
        if (told := found.healed(data)) is not None:
            save_healed(
                directory,
                found.weights,
                pruning.identity,
                told.words,
                data,
                perplexity=told.perplexity,
            )

    replace_directory(folder, build)
