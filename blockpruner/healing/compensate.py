"""Compensate a plan: change weights of kept blocks, and keep the change if it helps on held-out
rows."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blockpruner.core.blocks import Cut
from blockpruner.core.errors import InputError, NonFiniteLossError
from blockpruner.core.plan import Plan
from blockpruner.core.progress import Observer
from blockpruner.fitting.streams import Streams
from blockpruner.healing.refit import FIRST_GUESS_PENALTIES, RefitStats, refit
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.methods.registry import KINDS
from blockpruner.model.models import prune_, shared_copy
from blockpruner.scoring.metrics import perplexity

SMALLER_STEPS = (0.75, 0.5)
"""The steps that are tried besides the full change, as long as a smaller one is better on the
held-out rows."""

Fits = dict[str, tuple[dict[str, Tensor], dict[str, Any]]]
"""By the plans' names: the changed weights by their names in the pruned model, none if no change
helped; and facts as JSON: method, tokens, held-out perplexities, and what was done at each fit
point."""


@dataclass
class _Refit:
    """The full change of one plan."""

    weights: Mapping[Tensor, Tensor] = field(default_factory=dict)
    """The new values of the dense model's weights."""
    heldout_states: Mapping[int, Tensor] = field(default_factory=dict)
    """The states of the held-out batches behind the last block."""
    stats: list[RefitStats] = field(default_factory=list)


@torch.no_grad()
def compensate(
    dense: PreTrainedModel,
    plans: Mapping[str, Plan],
    fit: CalibrationSet,
    validation: CalibrationSet,
    observer: Observer,
    is_final: bool = True,
) -> Fits:
    """Find new weights for the pruned models of some plans, by their names. What the plans have in
    common is computed once. Raises InputError for a plan that does more than take parts out, or
    without rows, and NonFiniteLossError if the dense model overflows.

    Args:
        dense: on one device; its memory also takes the sums of one fit (`sums_bytes`). It is as
            before at the end. The host's memory takes the fitted matrices of every plan.
        validation: rows that choose ridge penalties and decide whether a change helps.
        is_final: whether penalties and smaller steps are tried. Else this is a first guess.
    """
    _require_fittable(plans, fit, validation)
    cuts = {name: plan.cut for name, plan in plans.items()}
    observer.begin("compensate by refit")
    rows = (*fit.rows, *validation.rows)
    streams = Streams(dense, rows, len(fit.rows), len(plans))
    fits: Fits = {}
    try:
        refits = _refit_all(streams, cuts, is_final, observer)
        dense_perplexity = _perplexity(streams, dict(enumerate(streams.dense)))
        if dense_perplexity == math.inf:
            raise NonFiniteLossError(
                "a held-out loss of the dense model is not finite; try model.dtype: float32"
            )
        for name, cut in cuts.items():
            # Popped, so that the matrices of a finished plan are freed.
            change = refits.pop(name)
            by_step = _perplexity_by_step(streams, cut, change, is_final)
            best_step = min(by_step, key=by_step.__getitem__)
            weights = {}
            if best_step:
                weights = _named_weights(dense, streams, cut, change.weights, best_step)
            before, after = by_step[0.0], by_step[best_step]
            facts = {
                "method": "refit",
                "tokens": fit.tokens,
                "share": best_step,
                "perplexity": {"dense": dense_perplexity, "before": before, "after": after},
                "stops": change.stats,
            }
            fits[name] = (weights, facts)
            if is_final:
                outcome = "" if best_step else ": no help, left as it was"
                observer.note(f"{name}: held-out perplexity {before:.2f} -> {after:.2f}{outcome}")
    finally:
        streams.restore_()
    observer.end(f"the dense model's perplexity of the rows set aside is {dense_perplexity:.2f}")
    return fits


def _require_fittable(
    plans: Mapping[str, Plan], fit: CalibrationSet, validation: CalibrationSet
) -> None:
    for plan in plans.values():
        if not KINDS[plan.kind].keeps_weights:
            raise InputError(
                "compensate.method refit is for plans that take parts out, not for"
                f" {plan.kind}; set none"
            )
    if not (fit.rows and validation.rows):
        raise InputError(
            f"compensate needs rows to fit to and rows to hold out: {len(fit.rows)} and"
            f" {len(validation.rows)}; raise compensate.num_rows, or set compensate.validation"
            " between 0 and 1"
        )


def _refit_all(
    streams: Streams, cuts: Mapping[str, Cut], is_final: bool, observer: Observer
) -> dict[str, _Refit]:
    """The full changes of all plans, by their names."""
    refits = {name: _Refit() for name in cuts}
    block_names = [str(block) for block in streams.blocks]
    penalties = () if is_final else FIRST_GUESS_PENALTIES
    for stream, stats in refit(streams, cuts, penalties):
        for name in stream.cuts:
            change = refits[name]
            change.weights = stream.weights
            change.heldout_states = streams.heldout(stream.states)
            if stats:
                change.stats.append(stats)
        if stats:
            positions = [block_names.index(name) for name in (*stats["writers"], *stats["hole"])]
            detail = "+".join(stats["writers"]) or "writers"
            observer.advance(1 + max(positions), len(block_names), detail)
    return refits


def _perplexity_by_step(
    streams: Streams, cut: Cut, change: _Refit, is_final: bool
) -> dict[float, float]:
    """The held-out perplexity of a pruned model with no, all or a share of its change.

    Least squares can overshoot on rows that it has not seen, so the full step is not always best.
    """
    by_step = {0.0: math.inf}
    if is_final:
        by_step[0.0] = _perplexity_with(streams, cut, {}, 0.0)
    if change.weights:
        by_step[1.0] = _perplexity(streams, change.heldout_states)
    if change.weights and is_final:
        for step in SMALLER_STEPS:
            by_step[step] = _perplexity_with(streams, cut, change.weights, step)
            # Each step costs a pass over the held-out rows: stop once a smaller one is worse.
            if by_step[step] > by_step[1.0]:
                break
    return by_step


def _perplexity(streams: Streams, states: Mapping[int, Tensor]) -> float:
    """The held-out perplexity from states behind the last block, infinite if a loss is not
    finite."""
    losses = streams.losses(states)
    if not all(math.isfinite(loss) for loss in losses):
        return math.inf
    return perplexity(math.fsum(losses) / len(losses))


def _perplexity_with(
    streams: Streams, cut: Cut, weights: Mapping[Tensor, Tensor], step: float
) -> float:
    """The held-out perplexity of a pruned model with a share of its change."""
    _set_step_(streams, cut, weights, step)
    heldout_perplexity = _perplexity(streams, streams.heldout_states(cut.mask))
    streams.restore_()
    return heldout_perplexity


def _set_step_(streams: Streams, cut: Cut, weights: Mapping[Tensor, Tensor], step: float) -> None:
    """Take a cut's channels out, and move weights by a share of the change."""
    streams.zero_channels_(cut.channels)
    for weight, value in weights.items():
        # 16-bit weights are interpolated in float32, and rounded once.
        dtype = torch.promote_types(value.dtype, torch.float32)
        moved = torch.lerp(weight.to(dtype), value.to(weight.device, dtype), step)
        streams.set_(weight, moved)


def _named_weights(
    dense: PreTrainedModel,
    streams: Streams,
    cut: Cut,
    weights: Mapping[Tensor, Tensor],
    step: float,
) -> dict[str, Tensor]:
    """The changed weights of a pruned model, on the host, by their names in that model."""
    pruned = prune_(shared_copy(dense), cut.mask)
    names = {id(weight): name for name, weight in pruned.named_parameters()}
    named = {}
    _set_step_(streams, cut, weights, step)
    for weight, value in weights.items():
        named[names[id(weight)]] = value if step == 1 else weight.clone().cpu()
    streams.restore_()
    for block, channels in cut.channels.items():
        name = names[id(streams.output_weight(block))]
        if name in named:
            named[name] = named[name][:, list(channels)]
    return named
