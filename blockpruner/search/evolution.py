"""Evolutionary search: make many variants of one mask and keep the best one, a (1 + lambda) search as in EvoPress.

Decides how masks vary and on how many rows they are compared (arXiv 2410.14649: 32 offspring with a few swaps each,
first on few tokens, the best ones on more). Here all variants meet the same budget, and a mask replaces its parent only
if its loss on all rows is lower. No generation is worse than the one before.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Container, Iterator, Sequence
from functools import partial
from typing import Annotated, Literal

from pydantic import Field, field_validator

from blockpruner.core.blocks import DENSE, Mask
from blockpruner.core.options import Options
from blockpruner.scoring.objectives import MaskScore
from blockpruner.search.greedy import greedy_to_goal
from blockpruner.search.iteration import Iteration
from blockpruner.search.problem import Problem
from blockpruner.search.space import Space, goal_of_problem, nearest, unit_order

ROWS_FACTOR = 4
"""How many times as many rows each round sees; with two rounds before the last, 16 times as many from first to last, as
EvoPress (2,048 to 32,768 tokens)."""

ACROSS = 0.1
"""Probability that a swap is between kinds, where it could also be within one: such swaps change more at once."""

DRAWS = 10
"""How often as many masks are drawn as are wanted, before less will do: a parent may have few variants left."""


class EvolutionOptions(Options):
    generations: int = Field(default=50, ge=1)
    """How many times there are offspring. A start with random masks is one more generation before these."""
    offspring: int = Field(default=32, ge=1)
    survivors: tuple[Annotated[int, Field(ge=1)], ...] = (8, 2)
    """How many offspring are left after each round but the last, which is over all rows. A round sees a quarter of the
    rows of the next one, and at least one row."""
    patience: int = Field(default=20, ge=0)
    """After how many generations without improvement the search stops; 0 never stops it."""
    start: Literal["greedy", "random"] = "random"
    """Start from greedy's own mask, at its ratio, or from the best of `offspring` random masks."""
    seed: int = 42

    @property
    def has_greedy_steps(self) -> bool:
        return self.start == "greedy"

    @field_validator("survivors")
    @classmethod
    def _fewer_and_fewer(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if list(value) != sorted(value, reverse=True):
            raise ValueError("no number may be larger than the one before")
        return value


def evolution(problem: Problem, options: EvolutionOptions) -> Iterator[Iteration]:
    """Yield greedy's iterations if the search starts there, then one iteration for each generation.

    Raises:
        InputError: the budget is nearest to removing nothing.
    """
    offspring, survivors = options.offspring, options.survivors
    goal, rng = goal_of_problem(problem), random.Random(options.seed)
    order = unit_order(problem.units)
    if options.start == "greedy":
        prefixes = yield from greedy_to_goal(problem)
        scores = problem.ask([nearest(goal, prefixes)])
        index, parent = len(prefixes), scores[0]
        space = Space(problem.units, goal.around(parent.mask))
    else:
        index, space = 1, Space(problem.units, goal)
        masks = _distinct(partial(space.draw, rng), offspring, ())
        scores = [*problem.ask([DENSE]), *contest(problem, sorted(masks, key=order), survivors)]
        parent = _best(scores[1:])
        yield Iteration(0, tuple(scores), (None,) * len(scores), scores.index(parent))
    known: set[Mask] = set()  # on all rows, and no better than the parent
    idle = 0
    for generation in range(index, index + options.generations):
        known |= {score.mask for score in scores if score.is_complete}
        masks = _distinct(partial(vary, parent.mask, space, rng), offspring, known)
        scores = [parent, *contest(problem, sorted(masks, key=order), survivors)]
        best = _best(scores)
        yield Iteration(generation, tuple(scores), (None,) * len(scores), scores.index(best))
        idle = idle + 1 if best == parent else 0
        if not masks or 0 < options.patience == idle:
            return
        parent = best


def vary(mask: Mask, space: Space, rng: random.Random) -> Mask:
    """A mask after min(a, b) swaps, a and b drawn from 1 to 3, as EvoPress draws them."""
    for _ in range(min(rng.randint(1, 3), rng.randint(1, 3))):
        exchanges = space.exchanges(mask)
        across = [exchange for exchange in exchanges if exchange.across]
        within = [exchange for exchange in exchanges if not exchange.across]
        likely = across if across and (not within or rng.random() < ACROSS) else within
        if not likely:
            break
        chosen = rng.choice(likely)
        restored = DENSE.union(*rng.sample(chosen.restorable, chosen.restored))
        mask = mask - restored | DENSE.union(*rng.sample(chosen.removable, chosen.removed))
    return mask


def contest(problem: Problem, masks: Sequence[Mask], survivors: Sequence[int]) -> list[MaskScore]:
    """Score masks on more and more rows, the best of a round in the next; each on as many rows as it came to see.

    Args:
        masks: of equal scores the first goes on.
        survivors: how many go on after each round but the last.
    """
    found: dict[Mask, MaskScore] = {}
    for rounds_left, kept in zip(range(len(survivors), 0, -1), survivors, strict=True):
        scores = problem.ask(masks, math.ceil(problem.rows / ROWS_FACTOR**rounds_left))
        found |= {score.mask: score for score in scores}
        masks = [score.mask for score in sorted(scores, key=lambda score: score.loss)[:kept]]
    found |= {score.mask: score for score in problem.ask(masks)}
    return list(found.values())


def _best(scores: Sequence[MaskScore]) -> MaskScore:
    """The lowest of those on all rows, the first of equals."""
    return min((score for score in scores if score.is_complete), key=lambda score: score.loss)


def _distinct(draw: Callable[[], Mask], wanted: int, known: Container[Mask]) -> list[Mask]:
    """As many different masks as are wanted, in the order drawn; fewer where there seem to be no more."""
    found: dict[Mask, None] = {}
    for _ in range(DRAWS * wanted):
        mask = draw()
        if mask not in known:
            found[mask] = None
        if len(found) == wanted:
            break
    return list(found)
