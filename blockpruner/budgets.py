"""Budgets: how far to prune, and which prefix of a removal sequence meets one.

A budget is a ratio ("0.22"), a number of blocks ("17blocks") or of whole layers ("7layers", by parameters the
same as that many layers). A ratio is met by the prefix whose ratio is nearest, a tie going to the larger, as the
rows of arXiv 2406.10594 are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from blockpruner.blocks import BlockId, Mask
from blockpruner.errors import InputError
from blockpruner.families import ParameterCounts


@dataclass(frozen=True)
class Budget:
    """text: as in params.yaml; ratio: share of all parameters, or blocks: a count; exactly one is not None."""

    text: str
    ratio: float | None = None
    blocks: int | None = None


def parse_budget(text: str, counts: ParameterCounts) -> Budget:
    """Read a budget for one model; raises InputError."""
    try:
        if text.endswith("blocks"):
            return Budget(text, blocks=_positive(text.removesuffix("blocks")))
        if text.endswith("layers"):
            layers = _positive(text.removesuffix("layers"))
            depth = len(counts.blocks) // 2
            if layers >= depth:
                raise InputError(f"budget {text!r} removes every layer of {depth}; the largest is {depth - 1}layers")
            return Budget(text, ratio=layers / depth * sum(counts.blocks.values()) / counts.total)
        ratio = float(text)
        if 0.0 < ratio < 1.0:
            return Budget(text, ratio=ratio)
    except ValueError as error:
        if isinstance(error, InputError):
            raise
    raise InputError(
        f'budget {text!r} is not valid; give a share of all parameters between 0 and 1 ("0.22"), a number of '
        'blocks ("17blocks") or of whole layers ("7layers")'
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def is_settled(budget: Budget, prefixes: Sequence[Mask], counts: ParameterCounts, remaining: Sequence[Mask]) -> bool:
    """Whether longer sequences cannot change which prefix meets `budget`.

    Args:
        prefixes: cumulative masks of the sequence so far, shortest first (without the dense one).
        remaining: the units that may still be removed.
    """
    mask = prefixes[-1] if prefixes else frozenset[BlockId]()
    if not remaining:
        return True
    if budget.blocks is not None:
        return len(mask) >= budget.blocks
    assert budget.ratio is not None
    ratio = budget.ratio
    gap = ratio - counts.ratio(mask)
    return gap <= 0 or min(counts.ratio(mask | unit) for unit in remaining) - ratio > gap


def choose_prefix(budget: Budget, prefixes: Sequence[Mask], counts: ParameterCounts) -> int:
    """Number of removals (1 or more) of the sequence that meet `budget`.

    Raises:
        InputError: the budget is beyond the sequence's end, below its first removal, or not hit by a block count;
            names the largest or nearest reachable budget.
    """
    if not prefixes:
        raise InputError(f"budget {budget.text!r} cannot be met: nothing can be removed")
    largest = f"{len(prefixes[-1])}blocks, ratio {counts.ratio(prefixes[-1]):.4f}"
    if budget.blocks is not None:
        sizes = [len(prefix) for prefix in prefixes]
        if budget.blocks in sizes:
            return sizes.index(budget.blocks) + 1
        if budget.blocks > sizes[-1]:
            raise InputError(f"budget {budget.text!r} cannot be reached; the largest reachable is {largest}")
        near = [f"{size}blocks" for size in sizes if abs(size - budget.blocks) < sizes[0]]
        raise InputError(f"budget {budget.text!r} is not reached by whole units; nearest: {', '.join(near)}")
    assert budget.ratio is not None
    ratios = [0.0, *(counts.ratio(prefix) for prefix in prefixes)]
    wanted = budget.ratio
    best = min(range(len(ratios)), key=lambda k: (round(abs(ratios[k] - wanted), 12), -k))
    if best == 0:
        raise InputError(
            f"budget {budget.text!r} is nearest to removing nothing; the smallest that removes a block here is "
            f"{ratios[1]:.4f}"
        )
    if best == len(prefixes) and ratios[best] < budget.ratio and len(prefixes) > 1:
        last_step = ratios[best] - ratios[best - 1]
        if budget.ratio - ratios[best] > last_step:
            raise InputError(f"budget {budget.text!r} cannot be reached; the largest reachable is {largest}")
    return best
