"""SliceGPT as a kind of method: the width whose ratio is nearest to a budget. Nothing is
searched."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from blockpruner.core.budgets import Budget
from blockpruner.core.families import Config
from blockpruner.core.options import Options
from blockpruner.core.plan import Plan
from blockpruner.methods.kind import Job
from blockpruner.methods.slicegpt.widths import sliced_parameters, width_for_ratio
from blockpruner.methods.weights import Details, Removed, share_of, weights_kind
from blockpruner.scoring.work import Rows
from blockpruner.versions import PLAN_VERSION, WEIGHTS_VERSION

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def plan_width(options: Options, job: Job) -> Callable[[Budget], Details]:
    """Plans SliceGPT's width whose ratio is nearest to a budget; `hidden` in its details is the
    dense model's."""
    config = job.material.config
    return lambda budget: {
        "width": require_width(budget, options, config),
        "hidden": int(config["hidden_size"]),
    }


def require_width(budget: Budget, options: Options, config: Config) -> int:
    """The width that `plan_width` plans; raises UnreachableError as `width_for_ratio` and
    `sliced_parameters` do."""
    return width_for_ratio(config, share_of(budget, "slicegpt"))


def _apply(model: PreTrainedModel, plan: Plan, rows: Rows) -> PreTrainedModel:
    from blockpruner.methods.slicegpt.slicing import slice_

    return slice_(model, rows, plan.details["width"])


SLICEGPT = weights_kind(
    "slicegpt",
    "SliceGPT",
    plan=plan_width,
    removed=lambda details, config: Removed(pruned=sliced_parameters(config, details["width"])[1]),
    apply_=_apply,
    identity=lambda plan, rows: {
        "width": plan.details["width"],
        "rows": rows,
        "weights": WEIGHTS_VERSION,
    },
    words=lambda plan, unit: "SliceGPT, hidden width sliced",
    taken_out=lambda plan: f"width {plan.details['hidden']:,} → {plan.details['width']:,}",
    card=lambda plan: (
        f"with its residual stream sliced from {plan.details['hidden']:,} to"
        f" {plan.details['width']:,} columns by SliceGPT (arXiv 2401.15024)"
    ),
    require=require_width,
    exports=frozenset({"hf"}),
    version=PLAN_VERSION,
)
