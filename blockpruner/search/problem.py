"""What a search is given: the units that it may remove, and whom it may ask.

A search is a function of a problem and its own options. It knows neither model nor trial store, and decides nothing
but which masks to ask about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from blockpruner.core.blocks import DENSE, Mask
from blockpruner.core.budgets import Goal, Resources
from blockpruner.scoring.accelerate import Select
from blockpruner.scoring.objectives import Score


class Ask(Protocol):
    """Scores of masks, lower is better, in the order given; on the first `rows` rows (None: all)."""

    def __call__(self, masks: Sequence[Mask], rows: int | None = None, base: Mask = DENSE) -> list[Score]: ...


@dataclass(frozen=True)
class Problem:
    """units: what may be removed at once, in tie-break order: of equal scores the first wins; ask: scores any masks;
    select: scores the candidates of one step, leaving out some that cannot win where the run is accelerated;
    rows: of the calibration set; goal: the budget of a search that works for one alone, else None; resources: what
    units cost, of the resources that are known (`budgets.Resources`)."""

    units: Sequence[Mask]
    ask: Ask
    select: Select
    rows: int
    goal: Goal | None = None
    resources: Resources = field(default_factory=dict)
