"""One step of a search as a value: which masks were considered, their scores, and the one chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from blockpruner.blocks import DENSE, Mask
from blockpruner.scoring.objectives import Score


@dataclass(frozen=True)
class Iteration:
    """scores and added run in parallel; added is None for a mask without a candidate (the dense model).

    lazy_choice: in an audited iteration, the mask that had been chosen before all candidates entered.
    """

    index: int
    scores: tuple[Score, ...]
    added: tuple[Mask | None, ...]
    chosen: int
    lazy_choice: Mask | None = None

    @property
    def removed(self) -> Mask:
        """The cumulative mask after this iteration."""
        return self.scores[self.chosen].mask


def removals(trace: Sequence[Iteration]) -> tuple[list[Mask], list[float]]:
    """What each iteration removed, in order, and the perplexities of the dense model and after each removal."""
    order = [iteration.added[iteration.chosen] or DENSE for iteration in trace]
    after = [iteration.scores[iteration.chosen].perplexity for iteration in trace]
    return order, [trace[0].scores[0].perplexity, *after]
