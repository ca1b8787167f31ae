"""The choice among proposals: all are compensated, and the one that is best on the selection split
is kept.

No search and no fit has seen the rows of the selection split.

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
from blockpruner.methods.healed import Healed, save_healed, set_weights_
from blockpruner.store.files import replace_directory, write_sealed_json
from blockpruner.store.manifest import COMPENSATE_FACTS, HEALED_PLAN
from blockpruner.store.plans import save_plan

SUBSAMPLE, MIN_ROWS, KEEP_WITHIN = 4, 64, 1.1
"""Successive halving: several proposals are first fitted to one of four rows, if there are at least
64. A proposal stays if its worst kind has lost at most 1.1 times as much as the best proposal's."""

SMALLER_STEPS = (0.75, 0.5, 0.25)
"""How much of a change of weights is tried if a kind of text lost by all of it."""

BATCH = 8
"""Rows of the selection split that are computed at once."""


@dataclass(frozen=True)
class Healing:
    """The proposal that is kept, and its compensated weights."""

    name: str
    """The name of the search that proposed it."""
    plan: Plan
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    """The changed weights by their names in the pruned model; empty if none changed."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What was done, as JSON: the compensation's facts; by proposal, under "judged" what it lost on
    the selection split (the mean of all kinds, and the worst kind), under "heat" the same on half
    of its rows after a fit to a quarter of the rows."""

    def healed(self, data: Texts) -> Healed | None:
        """What was done, to texts of `data`; None if no weight changed."""
        if not self.weights:
            return None
        method, tokens = self.facts["method"], self.facts["tokens"]
        words = f"compensated without training ({method}, {tokens:,} tokens of `{data.title}`)"
        return Healed(Path(), "", words, (), "", {method: self.facts["perplexity"]})


def choose(
    dense: Callable[[], PreTrainedModel],
    plans: Mapping[str, Plan],
    fit: CalibrationSet,
    validation: CalibrationSet,
    selection: CalibrationSet,
    search: CalibrationSet,
    observer: Observer,
) -> Healing:
    """Compensate proposals, all of one target, as their plans say, and keep the one that lost least
    on the selection split (`kinds.best_loss`). Without such rows the first is kept. Raises what
    `compensate` raises.

    Which plan is best before weights are fitted says little about which is best afterwards.

    Args:
        dense: loads the dense model, which is as before at the end; called if something must be
            computed.
        validation: the rows that choose the ridge penalties of the fit.
        search: the rows of which some kinds make weights.
    """
    dense = cache(dense)
    names = list(plans)
    is_fitted = plans[names[0]].compensate != "none"

    def compensated(names: Sequence[str], stride: int = 1) -> list[Healing]:
        """The proposals, fitted to every `stride`-th row."""
        if not is_fitted:
            return [Healing(name, plans[name]) for name in names]
        fits = compensate(
            dense(),
            {name: plans[name] for name in names},
            CalibrationSet(fit.rows[::stride]),
            CalibrationSet(validation.rows[::stride]),
            observer,
            is_final=stride == 1,
        )
        return [Healing(name, plans[name], *fits[name]) for name in names]

    # Without rows that judge, no other proposal was searched.
    if not selection.rows:
        return compensated(names[:1])[0]
    judging = Judging(dense, selection, search)
    halving_losses = dict[str, Loss]()
    # Successive halving: a fit to few rows is enough to drop the clearly worse proposals.
    if is_fitted and len(plans) > 1 and len(fit.rows) >= MIN_ROWS:
        halving_losses = judging.losses(judging.row_nlls(compensated(names, SUBSAMPLE), 2))
        limit = KEEP_WITHIN * min(loss.worst for loss in halving_losses.values())
        names = [name for name, loss in halving_losses.items() if loss.worst <= limit]
        observer.note(
            f"after a refit to every {SUBSAMPLE}th row: {_words(halving_losses)}; next, a refit to"
            f" all rows: {', '.join(names)}"
        )
    finalists = {healing.name: healing for healing in compensated(names)}
    row_nlls = judging.row_nlls(list(finalists.values()))
    losses = judging.losses(row_nlls)
    best = finalists[best_loss(losses)]
    if len(losses) > 1:
        observer.note(f"{_words(losses)}; {best.name} is kept")
    best, row_nll = accepted(best, row_nlls[best.name], judging, observer)
    dense_perplexities = perplexities(judging.dense_nll, judging.kinds)
    perplexity_by_kind = {
        kind: {"dense": dense_perplexities[kind], "after": healed}
        for kind, healed in perplexities(row_nll, judging.kinds).items()
    }
    loss = Loss.of(perplexity_by_kind)
    warning = uneven(loss.kinds)
    if warning:
        observer.note(f"warning: {warning}")
    facts = {"heat": _facts(halving_losses), "judged": _facts({**losses, best.name: loss})}
    plan = replace(best.plan, kinds=perplexity_by_kind)
    return replace(best, plan=plan, facts={**best.facts, **facts})


def accepted(
    healing: Healing, row_nll: Sequence[float], judging: "Judging", observer: Observer
) -> tuple[Healing, Sequence[float]]:
    """The model with the share of its change of weights that is best on every second row of the
    selection split, and the NLL of all its rows. All of the change is kept unless a kind of text
    lost by it."""
    if not healing.weights:
        return healing, row_nll
    models = {"1.0": healing, "0.0": replace(healing, weights={})}
    nll_by_step = {"1.0": row_nll[::2], "0.0": judging.row_nll(models["0.0"], 2)}
    losses = judging.losses(nll_by_step)
    unfitted_losses = losses["0.0"].kinds
    harmed = [kind for kind, loss in losses["1.0"].kinds.items() if loss > unfitted_losses[kind]]
    # No kind lost: smaller steps need not be measured.
    if not harmed:
        return healing, row_nll
    for step in SMALLER_STEPS:
        models[str(step)] = judging.with_step(healing, step)
        nll_by_step[str(step)] = judging.row_nll(models[str(step)], 2)
    best_step = best_loss(judging.losses(nll_by_step))
    observer.note(
        f"{', '.join(harmed)} lost by the refit: {float(best_step):.0%} of its change is kept"
    )
    share = float(best_step) * healing.facts.get("share", 1.0)
    best = replace(models[best_step], facts={**healing.facts, "share": share})
    return best, judging.row_nll(best)


@dataclass
class Judging:
    """The selection split, and what models lose on it. Rows are of one length, and kind after
    kind."""

    dense: Callable[[], PreTrainedModel]
    rows: CalibrationSet
    search: CalibrationSet
    """The rows of which some kinds of methods make weights."""

    @cached_property
    def kinds(self) -> Sequence[str]:
        """The kind of text of each row."""
        return self.rows.kinds or ("texts",) * len(self.rows.rows)

    @cached_property
    def dense_nll(self) -> Sequence[float]:
        """The dense model's mean NLL of each row."""
        return measure_perplexity(self.dense(), self.rows.rows, batch=BATCH).row_nll

    def row_nll(self, healing: Healing, stride: int = 1) -> Sequence[float]:
        """The mean NLL of every `stride`-th row by a model; raises NonFiniteLossError."""
        model = model_of(self.dense(), healing, self.search)
        return measure_perplexity(model, self.rows.rows[::stride], batch=BATCH).row_nll

    def row_nlls(self, models: Sequence[Healing], stride: int = 1) -> dict[str, Sequence[float]]:
        """The mean NLL of every `stride`-th row by several models, without those that overflow.
        Raises NonFiniteLossError if all of them do."""
        nll_by_name = dict[str, Sequence[float]]()
        for healing in models:
            try:
                nll_by_name[healing.name] = self.row_nll(healing, stride)
            except NonFiniteLossError:
                if not nll_by_name and healing is models[-1]:
                    raise
        return nll_by_name

    def losses(self, nll_by_name: Mapping[str, Sequence[float]]) -> dict[str, Loss]:
        """What models lost, from the NLL of all rows or of every second row."""
        losses = dict[str, Loss]()
        for name, row_nll in nll_by_name.items():
            # Steps of a refit are compared on every second row, the models on all.
            stride = 1 if len(row_nll) == len(self.dense_nll) else 2
            kinds = self.kinds[::stride]
            dense = perplexities(self.dense_nll[::stride], kinds)
            pruned = perplexities(row_nll, kinds)
            losses[name] = Loss({kind: pruned[kind] / dense[kind] for kind in dense})
        return losses

    def with_step(self, healing: Healing, step: float) -> Healing:
        """The model with a share of its change of weights."""
        model = pruned_copy(self.dense(), healing.plan, self.search.rows)
        old_weights = dict(model.named_parameters())
        weights = {}
        for name, value in healing.weights.items():
            old = old_weights[name].detach().cpu().float()
            weights[name] = torch.lerp(old, value.float(), step).to(value)
        return replace(healing, weights=weights)


def _words(losses: Mapping[str, Loss]) -> str:
    return "; ".join(f"{name} {loss}" for name, loss in losses.items())


def _facts(losses: Mapping[str, Loss]) -> dict[str, Any]:
    return {
        name: {"mean": loss.mean, "worst": loss.worst, "kind": loss.worst_kind}
        for name, loss in losses.items()
    }


def model_of(dense: PreTrainedModel, healing: Healing, search: CalibrationSet) -> PreTrainedModel:
    """The healed model. It shares tensors with the dense one where it can."""
    model = pruned_copy(dense, healing.plan, search.rows)
    set_weights_(model, healing.weights, shared=True)
    return model


def keep(folder: Path, healing: Healing, pruning: Pruning, data: Texts) -> None:
    """Write what was chosen, as a whole or not at all. `pruning` is the model of the plan, and
    `data` the source of the rows of the fit."""

    def build(directory: Path) -> None:
        save_plan(healing.plan, directory / HEALED_PLAN)
        write_sealed_json(directory / COMPENSATE_FACTS, {"search": healing.name, **healing.facts})
        healed = healing.healed(data)
        if healed is not None:
            save_healed(
                directory,
                healing.weights,
                pruning.identity,
                healed.words,
                data,
                perplexity=healed.perplexity,
            )

    replace_directory(folder, build)
