"""What a search is given: the units that it may remove, and functions that score masks.

A search is a function of a problem and its own options. It knows neither model nor trial store. It
only decides which masks to ask about.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from blockpruner.core.blocks import Mask
from blockpruner.core.budgets import Goal, Resources
from blockpruner.scoring.objectives import MaskScore
from blockpruner.search.racing import Select


@dataclass(frozen=True)
class Problem:
    """One search problem."""

    units: Sequence[Mask]
    """What may be removed at once, in tie-break order: of equal scores the first wins."""
    ask: Callable[..., list[MaskScore]]
    """Of masks, and a number of rows: scores masks on the first rows, else on all; in the order
    given."""
    select: Select
    """Scores the candidates of one step. In an accelerated run it leaves out some that cannot
    win."""
    rows: int
    """How many rows the calibration set has."""
    goal: Goal | None = None
    """The budget, for a search that works for one budget alone."""
    resources: Resources = field(default_factory=dict)
    """What units cost of each resource that is known."""
