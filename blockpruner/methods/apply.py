"""The pruned model of a plan, in memory.

How a checkpoint is written of it is decided by `checkpoints`, how it is measured by `evaluation`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

from transformers import PreTrainedModel

from blockpruner.core.plan import Plan
from blockpruner.methods.registry import KINDS
from blockpruner.model.models import shared_copy
from blockpruner.scoring.work import Rows


def prune_by_plan_(
    dense: PreTrainedModel, plan: Plan, rows: Rows, note: Callable[[PreTrainedModel], object]
) -> PreTrainedModel:
    """The pruned model, in place of the dense one.

    Args:
        note: takes down the outputs that a verification compares with: from the dense model changed for a while,
            where the kind of plan can lend it.
    """
    kind = KINDS[plan.kind]
    if kind.lend is not None:
        with kind.lend(dense, plan) as reduced:
            note(reduced)
    pruned = kind.apply_(dense, plan, rows)
    if kind.lend is None:
        note(pruned)
    return pruned


def pruned_copy(dense: PreTrainedModel, plan: Plan, rows: Rows) -> PreTrainedModel:
    """The pruned model beside the dense one, which stays whole. They share the tensors that the plan leaves alone."""
    kind = KINDS[plan.kind]
    return kind.apply_(shared_copy(dense) if kind.lend else copy.deepcopy(dense), plan, rows)
