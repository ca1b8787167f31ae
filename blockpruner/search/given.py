"""Orders that ask for no score: one from elsewhere, published or written by hand; and a random one,
the floor that a method has to beat.
"""

import random
from collections.abc import Iterator

from blockpruner.core.blocks import DENSE, format_mask, parse_mask
from blockpruner.core.errors import InputError
from blockpruner.core.options import Options
from blockpruner.search.iteration import Iteration
from blockpruner.search.one_shot import in_order
from blockpruner.search.problem import Problem


class GivenOptions(Options):
    order: tuple[str | int, ...]
    """What each step removes: a block ("mha.25"), or several ("mha.3,mlp.3")."""


def given(problem: Problem, options: GivenOptions) -> Iterator[Iteration]:
    """Remove in the order given; raises InputError for a block that is no candidate, or is named
    twice."""
    # YAML may hold a number, which is no block: the error names it.
    steps = [parse_mask(str(text)) for text in options.order]
    if not steps:
        raise InputError(
            'score.options.order is empty; name what to remove, for instance ["mha.25", "mlp.3"]'
        )
    candidates = DENSE.union(*problem.units)
    removed = DENSE
    for step in steps:
        problems = {
            "is not among the candidates": step - candidates,
            "was removed before": step & removed,
        }
        for problem_words, blocks in problems.items():
            if blocks:
                raise InputError(
                    f"score.options.order removes {format_mask(blocks)}, which {problem_words}; the"
                    f" candidates are {format_mask(candidates)}"
                )
        removed |= step
    return in_order(steps, problem.rows)


class RandomOptions(Options):
    seed: int = 42


def random_order(problem: Problem, options: RandomOptions) -> Iterator[Iteration]:
    """Remove the units in a random order."""
    generator = random.Random(options.seed)
    order = generator.sample(list(problem.units), len(problem.units))
    return in_order(order, problem.rows)
