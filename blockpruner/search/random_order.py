"""Removal in random order: the floor that a method has to beat."""

from __future__ import annotations

import random
from collections.abc import Iterator

from blockpruner.search.iteration import Iteration
from blockpruner.search.one_shot import in_order
from blockpruner.search.problem import Problem


def random_order(problem: Problem, *, seed: int) -> Iterator[Iteration]:
    """Remove the units in an order drawn with `seed`."""
    return in_order(random.Random(seed).sample(list(problem.units), len(problem.units)), problem.rows)
