"""Compensate a plan: change weights of kept blocks, and keep the change only if held-out rows say that it helps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blockpruner.core.blocks import DENSE, Mask
from blockpruner.core.errors import InputError
from blockpruner.core.plan import Plan
from blockpruner.core.progress import Observer
from blockpruner.healing.refit import STRENGTHS, Mended, refit
from blockpruner.healing.streams import Stream, Streams
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.model.models import prune_, shared_copy
from blockpruner.scoring.metrics import perplexity
from blockpruner.scoring.work import Task

SHARES = (1.0, 0.75, 0.5)
"""How much of a change is tried; the best one on the held-out rows is kept, or none."""

ROUGH = 0.3
"""The strength of fits that only rank plans."""

REACH = 4
"""At how many stops from a hole on such fits change writers. Further on a fit hardly lowers the error."""

Fits = dict[str, tuple[dict[str, Tensor], dict[str, Any]]]
"""By the plans' names: the changed weights by their names in the pruned model, none where nothing helped; and facts as
JSON: method, tokens, held-out perplexities, and what was done at each stop."""


@torch.no_grad()
def compensate(
    dense: PreTrainedModel,
    plans: Mapping[str, Plan],
    rows: CalibrationSet,
    held_out: int,
    observer: Observer,
) -> Fits:
    """Find new weights for the pruned models of some plans. What they have in common is computed once.

    Args:
        dense: on one device; its memory also takes the sums of one fit (four float64 matrices of the MLP's width). It
            is as before at the end. The host's memory takes the fitted matrices of every plan.
        plans: by a name each.
        rows: of any lengths; all real tokens are fitted to.
        held_out: how many of the rows, the last ones, choose strengths and decide whether a change helps.

    Raises:
        InputError: a plan that changes weights; or no row to fit to or to hold out.
    """
    count, masks = len(rows.rows), {name: plan.mask for name, plan in plans.items()}
    _require(plans, count, held_out)
    observer.begin("compensate by refit")
    streams, held = Streams(dense, rows.rows, count - held_out), range(count - held_out, count)

    def measured(*masks: Mask) -> dict[Mask, float]:
        losses: dict[Mask, list[float]] = {mask: [] for mask in masks}
        for scored in streams.run([Task(span, masks) for span in streams.row_batches(rows.rows, held)], rows.rows):
            losses[scored.mask] += scored.loss
        return {mask: perplexity(math.fsum(each) / len(each)) for mask, each in losses.items()}

    def kept(name: str, mask: Mask, changed: Mapping[Tensor, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The share of a change that is best on the rows that are held out, and what it does there."""
        best, found = 0.0, {"dense": plain[DENSE], "before": plain[mask], "after": plain[mask]}
        for share in SHARES if changed else ():
            _set_(streams, changed, share)
            after = measured(mask)[mask]
            if after < found["after"]:
                best, found["after"] = share, after
            streams.put_aside_()
        _set_(streams, changed, best)
        own = {id(weight): name for name, weight in prune_(shared_copy(dense), mask).named_parameters()}
        new = {own[id(weight)]: value if best == 1 else weight.clone().cpu() for weight, value in changed.items()}
        streams.put_aside_()
        left = "" if best else ": no help, left as it was"
        observer.note(f"{name}: held-out perplexity {found['before']:.2f} -> {found['after']:.2f}{left}")
        facts = {"method": "refit", "tokens": tokens, "share": best, "perplexity": found, "stops": stops[name]}
        return new if best else {}, facts

    tokens, plain = sum(map(len, rows.rows[: count - held_out])), measured(*{DENSE, *masks.values()})
    stops: dict[str, list[Mended]] = {name: [] for name in plans}
    changes: dict[str, Mapping[Tensor, Tensor]] = {}
    try:
        for stream, mended in _fitted(streams, masks, STRENGTHS, math.inf, observer):
            for name in stream.masks:
                changes[name] = stream.weights
                stops[name] += [mended] if mended else []
        found = {name: kept(name, mask, changes.pop(name)) for name, mask in masks.items()}
    finally:
        streams.put_aside_()
    observer.end(f"dense {plain[DENSE]:.2f}")
    return found


@torch.no_grad()
def ranked(
    dense: PreTrainedModel,
    plans: Mapping[str, Plan],
    rows: CalibrationSet,
    held_out: int,
    observer: Observer,
) -> dict[str, float]:
    """The perplexity that the model of each plan has on the held-out rows, fitted to the others with strength ROUGH
    near holes.

    It is that of the streams' ends, so no weight is kept. Arguments and errors are those of `compensate`.
    """
    _require(plans, len(rows.rows), held_out)
    observer.begin(f"compare {len(plans)} masks by a rough refit")
    streams, ends = Streams(dense, rows.rows, len(rows.rows) - held_out), dict[str, Sequence[Tensor]]()
    masks = {name: plan.mask for name, plan in plans.items()}
    try:
        for stream, _ in _fitted(streams, masks, (ROUGH,), REACH, observer):
            stream.weights = {}
            ends |= dict.fromkeys(stream.masks, stream.states)
        found = {name: streams.perplexity(states) for name, states in ends.items()}
    finally:
        streams.put_aside_()
    observer.end(", ".join(f"{name} {found[name]:.2f}" for name in sorted(found, key=found.__getitem__)))
    return found


def _require(plans: Mapping[str, Plan], count: int, held_out: int) -> None:
    for kind in (plan.kind for plan in plans.values() if plan.kind != "mask"):
        raise InputError(f"compensate.method refit is for plans that remove blocks, not for {kind}; set none")
    if not 0 < held_out < count:
        raise InputError(
            f"compensate needs rows to fit to and rows to hold out: {count} rows, {held_out} held out; raise "
            "compensate.num_rows, or set compensate.validation between 0 and 1"
        )


def _fitted(
    streams: Streams, masks: Mapping[str, Mask], strengths: Sequence[float], reach: float, observer: Observer
) -> Iterator[tuple[Stream, Mended]]:
    """The streams as `refit` yields them, with progress."""
    names = [str(block) for block in streams.blocks]
    for stream, mended in refit(streams, masks, strengths, reach):
        yield stream, mended
        if mended:
            changed, gone = mended["writers"], mended["hole"]
            done = 1 + max(map(names.index, [*changed, *gone]))
            hole = f" before hole {'+'.join(gone)}" if gone else ""
            observer.advance(done, len(names), f"{'+'.join(changed) or 'writers'}{hole}")


def _set_(streams: Streams, new: Mapping[Tensor, Tensor], share: float) -> None:
    """Set weights to their old values moved by a share of the change."""
    for weight, value in new.items():
        wide = torch.promote_types(value.dtype, torch.float32)
        streams.change_(weight, torch.lerp(weight.to(wide), value.to(weight.device, wide), share))
