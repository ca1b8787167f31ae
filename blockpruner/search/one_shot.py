"""One-shot ranking: score every unit once, in the dense model, then remove the lowest, one after
the other.

Over layers it is ShortGPT by Block Influence (arXiv 2403.03853), RM by relative magnitude (as in
arXiv 2406.10594), and Shortened-LLM by perplexity (arXiv 2402.02834). Over blocks it is LLM-Drop by
Block Influence (arXiv 2406.15786), and the first ablation of table 2 of arXiv 2406.10594 by
perplexity.
"""

from collections.abc import Iterator, Sequence

from blockpruner.core.blocks import DENSE, Mask
from blockpruner.core.options import Options
from blockpruner.scoring.objectives import MaskScore
from blockpruner.search.iteration import Iteration
from blockpruner.search.problem import Problem


def one_shot(problem: Problem, options: Options) -> Iterator[Iteration]:
    """Yield one removal at a time. All scores are in the first iteration."""
    dense, *scores = problem.ask([DENSE, *problem.units])
    # The sort is stable: of equal scores the first unit comes first.
    ranking = sorted(range(len(scores)), key=lambda number: scores[number].loss)
    yield Iteration(0, (dense, *scores), (None, *problem.units), 1 + ranking[0])
    order = [problem.units[number] for number in ranking]
    yield from in_order(order, problem.rows, start=1)


def in_order(order: Sequence[Mask], rows: int, start: int = 0) -> Iterator[Iteration]:
    """Iterations that remove units in a known order from the `start`-th on, without asking for a
    score."""
    for index in range(start, len(order)):
        mask = DENSE.union(*order[: index + 1])
        scores = [MaskScore(mask, (), rows)]
        added: list[Mask | None] = [order[index]]
        # The dense model comes first in every trace.
        if index == 0:
            scores.insert(0, MaskScore(DENSE, (), rows))
            added.insert(0, None)
        yield Iteration(index, tuple(scores), tuple(added), len(scores) - 1)
