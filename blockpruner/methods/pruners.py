"""The pruned model of a plan: PRUNERS, one row a kind of plan.

Decides how a plan becomes a model in memory. How a checkpoint is written of it is decided by `checkpoints`, how it is
measured by `evaluation`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from transformers import PreTrainedModel

from blockpruner.core.plan import Plan
from blockpruner.methods.laco.merging import merge_, merged
from blockpruner.methods.laco.walk import Merge
from blockpruner.methods.slicegpt.slicing import slice_
from blockpruner.model.models import masked, prune_, shared_copy
from blockpruner.scoring.work import Rows


@dataclass(frozen=True)
class Pruner:
    """apply_: changes a dense model in place, for good; rows are the calibration rows, from which SliceGPT takes its
    directions. lend: the dense model changed for a while, another way to the same model; None where there is none, and
    then `apply_` writes to the tensors of the dense model."""

    apply_: Callable[[PreTrainedModel, Plan, Rows], PreTrainedModel]
    lend: Callable[[PreTrainedModel, Plan], AbstractContextManager[PreTrainedModel]] | None = None


def prune_by_plan_(
    dense: PreTrainedModel, plan: Plan, rows: Rows, note: Callable[[PreTrainedModel], object]
) -> PreTrainedModel:
    """The pruned model, in place of the dense one.

    Args:
        note: takes down what it should say, for a verification: from the dense model changed for a while, where it can
            be.
    """
    pruner = PRUNERS[plan.kind]
    if pruner.lend is not None:
        with pruner.lend(dense, plan) as reduced:
            note(reduced)
    pruned = pruner.apply_(dense, plan, rows)
    if pruner.lend is None:
        note(pruned)
    return pruned


def pruned_copy(dense: PreTrainedModel, plan: Plan, rows: Rows) -> PreTrainedModel:
    """The pruned model beside the dense one, which stays whole; over the same tensors where the plan leaves them be."""
    pruner = PRUNERS[plan.kind]
    return pruner.apply_(shared_copy(dense) if pruner.lend else copy.deepcopy(dense), plan, rows)


def _merges(plan: Plan) -> list[Merge]:
    return [Merge(*pair) for pair in plan.details["merges"]]


PRUNERS: dict[str, Pruner] = {
    "mask": Pruner(lambda model, plan, rows: prune_(model, plan.mask), lambda model, plan: masked(model, plan.mask)),
    "laco": Pruner(
        lambda model, plan, rows: merge_(model, _merges(plan), plan.details["variant"]),
        lambda model, plan: merged(model, _merges(plan), plan.details["variant"]),
    ),
    "slicegpt": Pruner(lambda model, plan, rows: slice_(model, rows, plan.details["width"])),
}
