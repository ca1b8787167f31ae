"""Evolutionary search as in EvoPress (arXiv 2410.14649, algorithm 1, and its public code for
dropping blocks).

A parent has some children in each generation: copies in which one to three times, rather one than
three, a kept unit is removed and a removed one of its kind is restored. Two children are chosen on
one row in `share`, then the best of these and the parent on all. The first parent is the best of
some random masks. What a mask removes of each kind stays.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from pydantic import Field

from blockpruner.core.blocks import DENSE, Mask
from blockpruner.core.options import Options
from blockpruner.search.iteration import Iteration, compared
from blockpruner.search.problem import Problem
from blockpruner.search.space import Space, goal_of_problem

MUTATIONS, FINALISTS = 3, 2


class GeneticOptions(Options):
    generations: int | None = Field(default=None, ge=1)
    """null: those of the public script, k (n - k) / 1.5 for k of n layers."""
    children: int = Field(default=32, ge=1)
    initial: int = Field(default=64, ge=1)
    """Random masks, of which the best is the first parent."""
    share: int = Field(default=16, ge=1)
    """Children are first compared on one row in so many."""
    seed: int = 0


def genetic(problem: Problem, options: GeneticOptions) -> Iterator[Iteration]:
    """Yield an iteration for each generation; the last one's choice is the answer."""
    draw, goal = random.Random(options.seed), goal_of_problem(problem)
    space = Space(problem.units, goal, lambda unit: frozenset(block.kind for block in unit))
    # as even as masks of the goal are
    counts = max(space.compositions, key=lambda counts: (min(counts), *counts))
    rows = -(-problem.rows // options.share)

    def random_mask() -> Mask:
        drawn = (
            draw.sample(kind, count) for kind, count in zip(space.classes, counts, strict=True)
        )
        return DENSE.union(*(unit for units in drawn for unit in units))

    def child(mask: Mask) -> Mask:
        for _ in range(min(draw.randint(1, MUTATIONS), draw.randint(1, MUTATIONS))):
            halves = [
                ([u for u in kind if u <= mask], [u for u in kind if not u <= mask])
                for kind in space.classes
            ]
            removed, kept = draw.choice([each for each in halves if all(each)])
            mask = mask - draw.choice(removed) | draw.choice(kept)
        return mask

    dense, *scores = problem.ask([DENSE, *_distinct(random_mask, options.initial, ())])
    parent = min(scores, key=lambda score: score.loss)
    yield compared(0, [dense, *scores], parent)
    removed, layers = sum(counts) / len(space.classes), len(problem.units) / len(space.classes)
    for index in range(1, 1 + (options.generations or round(removed * (layers - removed) / 1.5))):
        children = _distinct(partial(child, parent.mask), options.children, (parent.mask,))
        first = sorted(problem.ask(children, rows), key=lambda score: score.loss)
        finalists = [parent, *problem.ask([score.mask for score in first[:FINALISTS]])]
        parent = min(finalists, key=lambda score: score.loss)
        yield compared(index, [*finalists, *first[FINALISTS:]], parent)


def _distinct(drawn: Callable[[], Mask], count: int, known: Sequence[Mask]) -> list[Mask]:
    """So many different masks, none of them known; fewer where hardly any are left."""
    found = dict.fromkeys(known)
    for _ in range(100 * count):
        if len(found) == count + len(known):
            break
        found.setdefault(drawn())
    return list(found)[len(known) :]
