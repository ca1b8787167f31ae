"""SliceGPT as a kind of method: the width whose ratio is nearest to a budget. Nothing is searched."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from blockpruner.core.budgets import Budget
from blockpruner.core.errors import InputError
from blockpruner.core.families import Config
from blockpruner.core.options import Options
from blockpruner.core.plan import Plan
from blockpruner.methods.kind import Job
from blockpruner.methods.slicegpt.widths import sliced_parameters, width_for_ratio
from blockpruner.methods.weights import Details, Left, weights_kind
from blockpruner.scoring.work import Rows
from blockpruner.versions import PLAN_VERSION, WEIGHTS_VERSION

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def plan_width(options: Options, job: Job) -> Callable[[Budget], Details]:
    """Plans SliceGPT's width whose ratio is nearest to a budget; `hidden` in its details is the dense model's.

    Raises:
        InputError: a budget that is no share of parameters.
        UnreachableError: a ratio out of reach, or a family that cannot be sliced.
    """
    config = job.material.config
    hidden = int(config["hidden_size"])
    return lambda budget: {"width": require_width(budget, options, config), "hidden": hidden}


def require_width(budget: Budget, options: Options, config: Config) -> int:
    """The width that `plan_width` plans; raises as it does."""
    if budget.ratio is None or budget.resource != "parameters":
        raise InputError(
            f"budget {budget.text!r} is met by removing blocks, and slicegpt removes none; give a share of all "
            'parameters ("0.22")'
        )
    return width_for_ratio(config, budget.ratio)


def _left(details: Details, config: Config) -> Left:
    _, pruned = sliced_parameters(config, details["width"])
    return Left(pruned=pruned)


def _apply(model: PreTrainedModel, plan: Plan, rows: Rows) -> PreTrainedModel:
    from blockpruner.methods.slicegpt.slicing import slice_

    return slice_(model, rows, plan.details["width"])


def _card(plan: Plan) -> str:
    details = plan.details
    return (
        f"with its residual stream sliced from {details['hidden']:,} to {details['width']:,} columns by SliceGPT "
        "(arXiv 2401.15024)"
    )


SLICEGPT = weights_kind(
    "slicegpt",
    "SliceGPT",
    plan=plan_width,
    left=_left,
    apply_=_apply,
    identity=lambda plan, rows: {"width": plan.details["width"], "rows": rows, "weights": WEIGHTS_VERSION},
    words=lambda plan, unit: "SliceGPT, hidden width sliced",
    taken_out=lambda plan: f"width {plan.details['hidden']:,} → {plan.details['width']:,}",
    card=_card,
    require=require_width,
    exports=frozenset({"hf"}),
    version=PLAN_VERSION,
)
