"""The maps of removed blocks, each with its caption."""

from __future__ import annotations

from collections.abc import Sequence

from blockpruner.core.blocks import Mask, parse_mask
from blockpruner.core.plan import Plan
from blockpruner.reporting import plots
from blockpruner.reporting.inputs import PrunedOption
from blockpruner.reporting.plots import Plot

MAP_CAPTION = "The blocks of {}: filled ones are gone"
ORDER_CAPTION = ", and bear the number of their removal."
SET_CAPTION = ". The search chose all of them together, so they have no order."


def removed_map(name: str, plan: Plan, order: Sequence[Mask]) -> Plot:
    """Draw which blocks a plan removes, with the removals in order where they have one."""
    caption = MAP_CAPTION.format(name) + (ORDER_CAPTION if order else SET_CAPTION)
    size = (max(10.2, 0.29 * plan.layers + 1.5), 1.45)
    return plots.render(
        f"{name}-map", caption, size, lambda figure: plots.block_map(figure, plan.layers, plan.mask, order)
    )


def map_of(target: PrunedOption) -> list[Plot]:
    """Draw which blocks of a target are gone; nothing where it removes none as a whole."""
    if not target.plan.removed:
        return []
    order = [parse_mask(unit) for unit in target.plan.order] if target.plan.nested else []
    return [removed_map(target.name, target.plan, order)]
