"""EvoPress: one parent, and in each generation many variants of it, of which the best on fresh rows is the next parent.

Decides how masks vary and on which rows they are compared, as the public code of arXiv 2410.14649 does for dropping
blocks (`evo_drop_search.py`, `run_drop_search.sh`). A mask removes as many MHA as MLP blocks. Each round draws its rows
anew, and the parent takes part in the last round, on the same rows as its variants.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Annotated

from pydantic import Field, ValidationInfo, field_validator

from blockpruner.core.blocks import DENSE, Mask
from blockpruner.core.errors import InputError
from blockpruner.core.options import Options
from blockpruner.scoring.objectives import MaskScore
from blockpruner.search.iteration import Iteration
from blockpruner.search.problem import Problem
from blockpruner.search.space import Space, goal_of_problem

DRAWS = 10
"""How often as many masks are drawn as are wanted, before fewer will do: a parent may have few variants left."""

Count = Annotated[int, Field(ge=1)]


class EvoPressOptions(Options):
    """The defaults are those of the official run script."""

    generations: Count | None = None
    """How many times there are offspring; null is k (n - k) / 1.5, where k of n units of each kind are removed."""
    offspring: Count = 32
    initial: Count = 64
    """How many random masks there are, of which the best is the first parent."""
    initial_tokens: Count = 2048
    """About how many tokens these are compared on."""
    survivors: tuple[Count, ...] = (2, 1)
    """How many masks are left after each round of a generation; one after the last."""
    tokens: tuple[Count, ...] = Field(default=(2048, 32768), validate_default=True)
    """About how many tokens a round draws: whole rows until there are as many."""
    mutations: Count = 3
    """The most exchanges that make a variant: min(a, b), a and b drawn from 1 to this number."""
    seed: int = 42

    @field_validator("survivors")
    @classmethod
    def _down_to_one(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if value[-1:] != (1,) or list(value) != sorted(value, reverse=True):
            raise ValueError("the last number is 1, and no number is larger than the one before")
        return value

    @field_validator("tokens")
    @classmethod
    def _of_each_round(cls, value: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        if len(value) != len(info.data.get("survivors", value)):
            raise ValueError("give one number for each of survivors")
        return value


def evopress(problem: Problem, options: EvoPressOptions) -> Iterator[Iteration]:
    """Yield an iteration for the random masks, and one for each generation.

    Raises:
        InputError: the budget is nearest to removing nothing, or is a number of blocks that kinds cannot share.
    """
    goal, chance = goal_of_problem(problem), random.Random(options.seed)
    space = Space(problem.units, goal, balanced=True)
    masks = _distinct(partial(space.draw, chance), options.initial, ())
    size = len(masks[0])
    if goal.budget.blocks not in (None, size):
        raise InputError(
            f"budget {goal.budget.text!r}: method: evopress removes as many MHA as MLP blocks; the nearest budget is "
            f"{size}blocks"
        )
    scores = problem.ask(masks, _draw(problem, options.initial_tokens, chance))
    best = min(scores, key=lambda score: score.loss)  # of equals the first
    scores = [MaskScore(DENSE, (), problem.rows), *scores]
    yield Iteration(0, tuple(scores), (None,) * len(scores), scores.index(best))
    parent, kinds = best.mask, len(space.classes)
    removed, units = sum(unit <= parent for unit in problem.units) // kinds, len(problem.units) // kinds
    generations = options.generations or int(removed * (units - removed) / 1.5)
    for generation in range(1, 1 + generations):
        masks = _distinct(partial(vary, parent, space, chance, options.mutations), options.offspring, {parent})
        seen: dict[Mask, set[int]] = {}
        for kept, tokens in zip(options.survivors, options.tokens, strict=True):
            if kept == 1 and parent not in masks:
                masks.append(parent)
            rows = _draw(problem, tokens, chance)
            for mask in masks:
                seen.setdefault(mask, set()).update(rows)
            ranked = sorted(problem.ask(masks, rows), key=lambda score: score.loss)  # of equals the first
            masks = [score.mask for score in ranked[:kept]]
        (parent,) = masks
        known = [score for mask, rows in seen.items() for score in problem.ask([mask], sorted(rows))]
        yield Iteration(generation, tuple(known), (None,) * len(known), list(seen).index(parent))


def vary(mask: Mask, space: Space, chance: random.Random, mutations: int = 3) -> Mask:
    """A mask after a few exchanges, each of a removed unit for a kept one of its kind."""
    for _ in range(min(chance.randint(1, mutations), chance.randint(1, mutations))):
        exchanges = space.exchanges(mask)
        if not exchanges:
            break
        chosen = chance.choice(exchanges)
        mask = mask - chance.choice(chosen.restorable) | chance.choice(chosen.removable)
    return mask


def _draw(problem: Problem, tokens: int, chance: random.Random) -> list[int]:
    """Rows in any order until they have so many tokens, or all; in the order of the calibration set."""
    drawn: list[int] = []
    left = tokens
    for row in chance.sample(range(problem.rows), problem.rows):
        if left <= 0:
            break
        drawn.append(row)
        left -= problem.row_tokens[row]
    return sorted(drawn)


def _distinct(draw: Callable[[], Mask], wanted: int, known: Collection[Mask]) -> list[Mask]:
    """As many different masks as are wanted, in the order drawn; fewer where there seem to be no more."""
    found: dict[Mask, None] = {}
    for _ in range(DRAWS * wanted):
        mask = draw()
        if mask not in known:
            found[mask] = None
        if len(found) == wanted:
            break
    return list(found)
