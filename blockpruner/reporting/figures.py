"""The maps of removed blocks, each with its caption."""

from functools import partial

from blockpruner.core.blocks import parse_mask
from blockpruner.core.plan import Plan
from blockpruner.reporting import plots
from blockpruner.reporting.plots import Plot

MAP_CAPTION = "The blocks of {}: what is filled is gone"
ORDER_CAPTION = ". The numbers are those of the removals."
SET_CAPTION = ". All was chosen together."


def removed_map(name: str, plan: Plan) -> Plot:
    """Draw how much of each block a plan removes, with the removals in order where they have one."""
    order = [parse_mask(unit) for unit in plan.order] if plan.nested else []
    caption = MAP_CAPTION.format(name) + (ORDER_CAPTION if order else SET_CAPTION)
    size = (max(10.2, 0.29 * plan.layers + 1.5), 1.45)
    draw = partial(plots.block_map, layers=plan.layers, gone=plan.gone, removals=order)
    return plots.render(f"{name}-map", caption, size, draw)
