"""Removal in random order: the floor that a method has to beat."""

import random
from collections.abc import Iterator

from blockpruner.core.options import Options
from blockpruner.search.iteration import Iteration
from blockpruner.search.one_shot import in_order
from blockpruner.search.problem import Problem


class RandomOptions(Options):
    seed: int = 42


def random_order(problem: Problem, options: RandomOptions) -> Iterator[Iteration]:
    """Remove the units in a random order."""
    return in_order(random.Random(options.seed).sample(list(problem.units), len(problem.units)), problem.rows)
