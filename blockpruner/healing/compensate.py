"""Compensate a plan: change weights of kept blocks, and keep the change only if held-out rows say
that it helps."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blockpruner.core.blocks import Cut
from blockpruner.core.errors import InputError, NonFiniteLossError
from blockpruner.core.plan import Plan
from blockpruner.core.progress import Observer
from blockpruner.healing.refit import ROUGH, Mended, refit
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.methods.registry import KINDS
from blockpruner.model.models import prune_, shared_copy
from blockpruner.scoring.metrics import perplexity
from blockpruner.scoring.streams import Streams

SHARES = (0.75, 0.5)
"""How much of a change is tried beside all of it, as long as less is better on the held-out
rows."""

Fits = dict[str, tuple[dict[str, Tensor], dict[str, Any]]]
"""By the plans' names: the changed weights by their names in the pruned model, none where nothing
helped; and facts as JSON: method, tokens, held-out perplexities, and what was done at each stop."""


@torch.no_grad()
def compensate(
    dense: PreTrainedModel,
    plans: Mapping[str, Plan],
    fit: CalibrationSet,
    tuning: CalibrationSet,
    observer: Observer,
    is_last: bool = True,
) -> Fits:
    """Find new weights for the pruned models of some plans, by their names. What they have in
    common is computed once. Raises InputError for a plan that does more than take parts out, or
    without rows, and NonFiniteLossError if the dense model overflows.

    Args:
        dense: on one device; its memory also takes the sums of one fit (`sums_bytes`). It is as
            before at the end. The host's memory takes the fitted matrices of every plan.
        tuning: rows that choose strengths and decide whether a change helps.
        is_last: whether strengths and shares of a change are tried. Else this is a first guess.
    """
    for kind in (plan.kind for plan in plans.values() if not KINDS[plan.kind].is_part):
        raise InputError(
            f"compensate.method refit is for plans that take parts out, not for {kind}; set none"
        )
    if not (fit.rows and tuning.rows):
        raise InputError(
            f"compensate needs rows to fit to and rows to hold out: {len(fit.rows)} and"
            f" {len(tuning.rows)}; raise compensate.num_rows, or set compensate.validation between"
            " 0 and 1"
        )
    rows, cuts = (*fit.rows, *tuning.rows), {name: plan.cut for name, plan in plans.items()}
    observer.begin("compensate by refit")
    streams = Streams(dense, rows, len(fit.rows), len(plans))

    def measured(states: Mapping[int, Tensor]) -> float:
        """The held-out perplexity from states behind the last block, infinite where a loss is not
        finite."""
        losses = streams.losses(states)
        return (
            perplexity(math.fsum(losses) / len(losses))
            if all(map(math.isfinite, losses))
            else math.inf
        )

    def changed_by(share: float, cut: Cut, changed: Mapping[Tensor, Tensor]) -> float:
        """The held-out perplexity of a cut with a share of a change."""
        _set_(streams, cut, changed, share)
        found = measured(streams.ends(cut.mask))
        streams.put_aside_()
        return found

    def kept(
        name: str, cut: Cut, changed: Mapping[Tensor, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The share of a change that is best on the rows that are held out, and what it does
        there."""
        tried = {0.0: changed_by(0.0, cut, {}) if is_last else math.inf}
        if changed:
            tried[1.0] = measured(ends[name])
        for share in SHARES if changed and is_last else ():
            tried[share] = changed_by(share, cut, changed)
            if tried[share] > tried[1.0]:
                break
        best = min(tried, key=tried.__getitem__)
        found = {"dense": unpruned, "before": tried[0.0], "after": tried[best]}
        _set_(streams, cut, changed, best)
        own = {
            id(weight): name
            for name, weight in prune_(shared_copy(dense), cut.mask).named_parameters()
        }
        new = {
            own[id(weight)]: value if best == 1 else weight.clone().cpu()
            for weight, value in changed.items()
        }
        for block, channels in cut.channels.items():
            if (writer := own[id(streams.weight(block))]) in new:
                new[writer] = new[writer][:, list(channels)]
        streams.put_aside_()
        if is_last:
            left = "" if best else ": no help, left as it was"
            observer.note(
                f"{name}: held-out perplexity {found['before']:.2f} -> {found['after']:.2f}{left}"
            )
        facts = {
            "method": "refit",
            "tokens": tokens,
            "share": best,
            "perplexity": found,
            "stops": stops[name],
        }
        return new if best else {}, facts

    tokens = fit.tokens
    stops: dict[str, list[Mended]] = {name: [] for name in plans}
    changes: dict[str, Mapping[Tensor, Tensor]] = {}
    ends: dict[str, Mapping[int, Tensor]] = {}
    names = [str(block) for block in streams.blocks]
    try:
        for stream, mended in refit(streams, cuts, () if is_last else ROUGH):
            for name in stream.cuts:
                changes[name] = stream.weights
                ends[name] = {number: stream.states[number] for number in streams.held_out}
                stops[name] += [mended] if mended else []
            if mended:
                done = 1 + max(map(names.index, [*mended["writers"], *mended["hole"]]))
                observer.advance(done, len(names), "+".join(mended["writers"]) or "writers")
        unpruned = measured(dict(enumerate(streams.dense)))
        if unpruned == math.inf:
            raise NonFiniteLossError(
                "a held-out loss of the dense model is not finite; try model.dtype: float32"
            )
        found = {name: kept(name, cut, changes.pop(name)) for name, cut in cuts.items()}
    finally:
        streams.put_aside_()
    observer.end(f"the dense model's perplexity of the rows set aside is {unpruned:.2f}")
    return found


def _set_(streams: Streams, cut: Cut, new: Mapping[Tensor, Tensor], share: float) -> None:
    """Take a cut's channels out, and move weights by a share of the change."""
    streams.narrow_(cut.channels)
    for weight, value in new.items():
        wide = torch.promote_types(value.dtype, torch.float32)
        streams.change_(weight, torch.lerp(weight.to(wide), value.to(weight.device, wide), share))
