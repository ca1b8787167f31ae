"""The plan: all that a search hands on. One frozen value, one JSON file.

Stages after the search read plans and do not need to know which method made them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from blockpruner.core.blocks import Mask, parse_mask


@dataclass(frozen=True)
class Plan:
    """kind: "mask" (blocks are removed), "laco" (layers are merged) or "slicegpt" (the residual stream is sliced);
    removed: all blocks, sorted; order: what each removal took, in order, or LaCo's merges; ratio: share of all
    parameters removed; ratios: the cumulative ratio after each removal; removes: the share of each resource, the time
    of generation where it was measured, as blocks cost it; blocks: counts by kind; parameters: dense and pruned;
    calibration: rows, tokens and the perplexity on them of the dense and of the pruned model (null where it is only
    known once the model is made); recover: whether the pruned model is trained before it is evaluated; nested: whether
    `order` is a sequence whose beginnings meet smaller budgets; options: the method's; details: a transformation's."""

    kind: str
    target: str
    run: str
    budget: str
    method: str
    metric: str
    search: str
    layers: int
    removed: tuple[str, ...]
    order: tuple[str, ...]
    ratio: float
    ratios: tuple[float, ...]
    blocks: Mapping[str, int]
    parameters: Mapping[str, int]
    calibration: Mapping[str, Any]
    recover: bool = False
    nested: bool = True
    removes: Mapping[str, float] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def mask(self) -> Mask:
        return parse_mask(",".join(self.removed))
