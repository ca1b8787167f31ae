"""Compensate a plan: change weights of kept blocks, and keep the change only if held-out rows say that it helps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blockpruner.core.blocks import DENSE, Mask
from blockpruner.core.errors import InputError
from blockpruner.core.plan import Plan
from blockpruner.core.progress import Observer
from blockpruner.healing.refit import COMPENSATIONS
from blockpruner.healing.streams import Streams
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.model.models import prune_, shared_copy
from blockpruner.scoring.metrics import perplexity
from blockpruner.scoring.work import Task

SHARES = (1.0, 0.75, 0.5)
"""How much of a change is tried; the best one on the held-out rows is kept, or none."""


@torch.no_grad()
def compensate(
    dense: PreTrainedModel, plan: Plan, rows: CalibrationSet, held_out: int, method: str, observer: Observer
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Find new weights for the pruned model of a plan. The dense model is as before at the end.

    Args:
        dense: on one device; its memory also takes the sums of one fit (four float64 matrices of the MLP's width).
        rows: of any lengths; all real tokens are fitted to.
        held_out: how many of the rows, the last ones, choose strengths and decide whether the change helps.

    Returns:
        The changed weights by their names in the pruned model, none where nothing helped; and facts as JSON: method,
        tokens, held-out perplexities, and what was done at each stop.

    Raises:
        InputError: an unknown method; a plan that changes weights; or no row to fit to or to hold out.
    """
    row, count = COMPENSATIONS[method], len(rows.rows)
    if plan.kind != "mask":
        raise InputError(f"compensate.method {method} is for plans that remove blocks, not for {plan.kind}; set none")
    if not 0 < held_out < count:
        raise InputError(
            f"compensate needs rows to fit to and rows to hold out: {count} rows, {held_out} held out; raise "
            "compensate.num_rows, or set compensate.validation between 0 and 1"
        )
    observer.begin(f"compensate by {method}")
    streams = Streams(dense, rows.rows, count - held_out)
    held = range(count - held_out, count)

    def measured(mask: Mask) -> float:
        tasks = [Task(span, (mask,)) for span in streams.row_batches(rows.rows, held)]
        losses = [loss for scored in streams.run(tasks, rows.rows) for loss in scored.loss]
        return perplexity(math.fsum(losses) / len(losses))

    best, before = 0.0, measured(plan.mask)
    found = {"dense": measured(DENSE), "before": before, "after": before}
    try:
        stops, names = [], [str(block) for block in streams.blocks]
        for mended in row.change_(streams, plan.mask):
            stops.append(mended)
            changed, gone = mended.get("writers", []), mended["hole"]
            done = 1 + max(map(names.index, [*changed, *gone]))
            hole = f" before hole {'+'.join(gone)}" if gone else ""
            observer.advance(done, len(names), f"{'+'.join(changed) or 'writers'}{hole}")
        new = {weight: weight.clone().cpu() for weight, old in streams.old.items() if not weight.cpu().equal(old)}
        for share in SHARES if new else ():
            _set_(streams.old, new, share)
            after = measured(plan.mask)
            if after < found["after"]:
                best, found["after"] = share, after
        _set_(streams.old, new, best)
        own = {id(weight): name for name, weight in prune_(shared_copy(dense), plan.mask).named_parameters()}
        weights = {own[id(weight)]: value.copy_(weight) for weight, value in new.items()} if best else {}
    finally:
        for weight, value in streams.old.items():
            weight.copy_(value)
    words = f"held-out perplexity {before:.2f} -> {found['after']:.2f}" + ("" if best else ": no help, left as it was")
    observer.end(f"{row.title}: {words}, dense {found['dense']:.2f}")
    tokens = sum(map(len, rows.rows[: count - held_out]))
    return weights, {"method": method, "tokens": tokens, "share": best, "perplexity": found, "stops": stops}


def _set_(old: Mapping[Any, Tensor], new: Mapping[Any, Tensor], share: float) -> None:
    """Set weights to their old values moved by a share of the change."""
    for weight, value in new.items():
        wide = torch.promote_types(value.dtype, torch.float32)
        weight.copy_(torch.lerp(old[weight].to(wide), value.to(wide), share))
