"""SliceGPT as a kind of method: the width whose ratio is nearest to a budget. Nothing is
searched."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from blockpruner.core.budgets import Budget
from blockpruner.core.families import Config
from blockpruner.core.options import Options
from blockpruner.core.plan import Plan
from blockpruner.methods.kind import Job
from blockpruner.methods.slicegpt.widths import sliced_parameters, width_for_ratio
from blockpruner.methods.weights import Details, Removed, WeightsKind, share_of
from blockpruner.scoring.work import Rows
from blockpruner.versions import PLAN_VERSION, WEIGHTS_VERSION

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SliceGPT(WeightsKind):
    name = "slicegpt"
    title = "SliceGPT"
    exports = frozenset({"hf"})
    version = PLAN_VERSION

    def planner(self, options: Options, job: Job) -> Callable[[Budget], Details]:
        """`hidden` in the details is the dense model's width."""
        config = job.material.config

        def plan(budget: Budget) -> Details:
            ratio = share_of(budget, self.name)
            return {
                "width": width_for_ratio(config, ratio),
                "hidden": int(config["hidden_size"]),
            }

        return plan

    def require(self, budget: Budget, options: Options, config: Config) -> None:
        width_for_ratio(config, share_of(budget, self.name))

    def removed(self, details: Details, config: Config) -> Removed:
        _, sliced = sliced_parameters(config, details["width"])
        return Removed(pruned=sliced)

    def apply_(self, model: PreTrainedModel, plan: Plan, rows: Rows) -> PreTrainedModel:
        from blockpruner.methods.slicegpt.slicing import slice_

        return slice_(model, rows, plan.details["width"])

    def facts(self, plan: Plan, rows: str) -> dict[str, Any]:
        return {"width": plan.details["width"], "rows": rows, "weights": WEIGHTS_VERSION}

    def method_words(self, plan: Plan, unit: str) -> str:
        return "SliceGPT, hidden width sliced"

    def removed_words(self, plan: Plan) -> str:
        return f"width {plan.details['hidden']:,} → {plan.details['width']:,}"

    def card_words(self, plan: Plan) -> str:
        return (
            f"with its residual stream sliced from {plan.details['hidden']:,} to"
            f" {plan.details['width']:,} columns by SliceGPT (arXiv 2401.15024)"
        )


SLICEGPT = SliceGPT()
