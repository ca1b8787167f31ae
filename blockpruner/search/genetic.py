"""Evolutionary search as in EvoPress (arXiv 2410.14649, algorithm 1, and its public code for
dropping blocks).

A parent has some children in each generation: copies in which one to three times, rather one than
three, a kept unit is removed and a removed one of its kind is restored. Two children are chosen on
one row in `share`, then the best of these and the parent on all. The first parent is the best of
some random masks. What a mask removes of each kind stays.
"""

import math
import random
from collections.abc import Callable, Iterator
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
    """Children are first compared on every `share`-th part of the rows."""
    seed: int = 0


def genetic(problem: Problem, options: GeneticOptions) -> Iterator[Iteration]:
    """Yield an iteration for each generation; the last one's choice is the answer."""
    generator = random.Random(options.seed)
    goal = goal_of_problem(problem)
    space = Space(problem.units, goal, lambda unit: frozenset(block.kind for block in unit))
    # How many units of each kind a mask removes: as even as the goal allows.
    counts = max(space.compositions, key=lambda counts: (min(counts), *counts))
    rows = math.ceil(problem.rows / options.share)

    def random_mask() -> Mask:
        mask = DENSE
        for kind, count in zip(space.classes, counts, strict=True):
            mask = mask.union(*generator.sample(kind, count))
        return mask

    def mutate(mask: Mask) -> Mask:
        mutations = min(generator.randint(1, MUTATIONS), generator.randint(1, MUTATIONS))
        for _ in range(mutations):
            exchangeable = []
            for kind in space.classes:
                removed = [unit for unit in kind if unit <= mask]
                kept = [unit for unit in kind if not unit <= mask]
                if removed and kept:
                    exchangeable.append((removed, kept))
            removed, kept = generator.choice(exchangeable)
            restored_unit = generator.choice(removed)
            removed_unit = generator.choice(kept)
            mask = (mask - restored_unit) | removed_unit
        return mask

    initial_masks = distinct_masks(random_mask, options.initial)
    dense, *scores = problem.ask([DENSE, *initial_masks])
    parent = min(scores, key=lambda score: score.loss)
    yield compared(0, [dense, *scores], parent)
    generations = options.generations
    if generations is None:
        kinds = len(space.classes)
        removed_layers = sum(counts) / kinds
        kept_layers = len(problem.units) / kinds - removed_layers
        generations = round(removed_layers * kept_layers / 1.5)
    for index in range(1, generations + 1):
        children = distinct_masks(partial(mutate, parent.mask), options.children, parent.mask)
        ranked = sorted(problem.ask(children, rows), key=lambda score: score.loss)
        finalists = [score.mask for score in ranked[:FINALISTS]]
        candidates = [parent, *problem.ask(finalists)]
        parent = min(candidates, key=lambda score: score.loss)
        yield compared(index, [*candidates, *ranked[FINALISTS:]], parent)


def distinct_masks(
    draw: Callable[[], Mask], count: int, excluded: Mask | None = None
) -> list[Mask]:
    """Up to `count` distinct masks that differ from `excluded`: fewer if few are possible."""
    masks = dict[Mask, None]()
    for _ in range(100 * count):
        if len(masks) == count:
            break
        mask = draw()
        if mask != excluded:
            masks[mask] = None
    return list(masks)
