"""Greedy search: remove the unit whose removal leaves the lowest score, again and again (arXiv 2406.10594, alg. 1).

Decides the order of removal. Sequences are nested: the first k removals answer every smaller budget, so the
caller stops when its budgets are settled. Since only the lowest score of an iteration matters, `select` may leave
candidates out that cannot have it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from blockpruner.blocks import DENSE, Mask
from blockpruner.scoring.accelerate import Select
from blockpruner.search.iteration import Iteration


def greedy(select: Select, units: Sequence[Mask]) -> Iterator[Iteration]:
    """Yield iterations until nothing is left to remove.

    Args:
        select: scores masks, lower nll is better.
        units: what may be removed at once, in tie-break order: of equal scores the first wins (strict <).
    """
    removed: Mask = DENSE
    remaining = list(units)
    index = 0
    while remaining:
        base = [removed] if index == 0 else []
        selection = select(index, removed, base + [removed | unit for unit in remaining])
        scores = selection.scores
        complete = [i for i, s in enumerate(scores) if s.rows_used == s.rows_total and s.mask != removed]
        best = min(complete, key=lambda i: scores[i].nll)
        added = tuple(None if score.mask == removed else score.mask - removed for score in scores)
        yield Iteration(index, scores, added, best, selection.lazy_choice)
        remaining = [unit for unit in remaining if unit != added[best]]
        removed = scores[best].mask
        index += 1
