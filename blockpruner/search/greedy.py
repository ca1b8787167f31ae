"""Greedy search: remove the unit whose removal leaves the lowest score, again and again (arXiv 2406.10594, alg. 1).

Decides the order of removal. Sequences are nested: the first k removals answer every smaller budget, so the
caller stops when its budgets are settled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from blockpruner.blocks import DENSE, Mask
from blockpruner.search.iteration import Evaluate, Iteration


def greedy(evaluate: Evaluate, units: Sequence[Mask]) -> Iterator[Iteration]:
    """Yield iterations until nothing is left to remove.

    Args:
        evaluate: scores masks, lower nll is better.
        units: what may be removed at once, in tie-break order: of equal scores the first wins (strict <).
    """
    removed: Mask = DENSE
    remaining = list(units)
    index = 0
    while remaining:
        base = [removed] if index == 0 else []
        scores = evaluate(index, base + [removed | unit for unit in remaining])
        dense, candidates = scores[: len(base)], scores[len(base) :]
        best = min(range(len(remaining)), key=lambda i: candidates[i].nll)
        yield Iteration(
            index=index,
            scores=(*dense, *candidates),
            added=(*([None] * len(dense)), *remaining),
            chosen=len(dense) + best,
        )
        removed |= remaining.pop(best)
        index += 1
