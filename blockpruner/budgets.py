"""Budgets: how far to prune, and which prefix of a removal sequence meets one.

A budget is a ratio ("0.22"), a number of blocks ("17blocks") or of whole layers ("7layers", by parameters the
same as that many layers). A ratio is met by the prefix whose ratio is nearest, a tie going to the larger, as the
rows of arXiv 2406.10594 are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

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


def require_reachable(budget: Budget, units: Sequence[Mask], counts: ParameterCounts) -> None:
    """Refuse, before anything is computed, a budget that no sequence over `units` meets.

    Raises:
        InputError: names the largest or nearest budget that can be reached.
    """
    everything = frozenset[BlockId]().union(*units)
    largest = f"{len(everything)}blocks, ratio {counts.ratio(everything):.4f}"
    size = len(units[0])
    beyond = f"budget {budget.text!r} cannot be reached; the largest reachable is {largest}"
    if budget.blocks is not None:
        if budget.blocks > len(everything):
            raise InputError(beyond)
        if budget.blocks % size:
            low = budget.blocks - budget.blocks % size
            near = ", ".join(f"{n}blocks" for n in (low, low + size) if 0 < n <= len(everything))
            raise InputError(f"budget {budget.text!r} is not reached by whole units; nearest: {near}")
    elif budget.ratio is not None:
        sizes = [counts.ratio(unit) for unit in units]
        if budget.ratio > counts.ratio(everything) + max(sizes) / 2:
            raise InputError(beyond)
        if budget.ratio < min(sizes) / 2:
            raise InputError(
                f"budget {budget.text!r} is nearest to removing nothing; the smallest that removes a block here is "
                f"{min(sizes):.4f}"
            )


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


@dataclass(frozen=True)
class Goal:
    """A budget as a test of single masks, for searches that do not remove one unit after the other.

    share: how much a mask removes, counted as the budget counts; wanted: how much it should; tolerance: how far off
    still meets it: half of the smallest unit, so that no mask could be nearer by one unit more or less.
    """

    budget: Budget
    share: Callable[[Mask], float]
    wanted: float
    tolerance: float

    def distance(self, mask: Mask) -> float:
        return abs(self.share(mask) - self.wanted)

    def is_met(self, mask: Mask) -> bool:
        return self.distance(mask) <= self.tolerance + 1e-12

    def around(self, mask: Mask) -> Goal:
        """The same goal, moved to what a mask achieves, so that two masks that meet it can be compared."""
        return replace(self, wanted=self.share(mask))


def goal_of(budget: Budget, units: Sequence[Mask], counts: ParameterCounts) -> Goal:
    if budget.blocks is not None:
        return Goal(budget, len, budget.blocks, 0.0)
    assert budget.ratio is not None
    return Goal(budget, counts.ratio, budget.ratio, min(counts.ratio(unit) for unit in units) / 2)


def choose_prefix(budget: Budget, prefixes: Sequence[Mask], counts: ParameterCounts) -> int:
    """Number of removals (1 or more) of the sequence that meet `budget`.

    Raises:
        InputError: nothing in the sequence meets it; what is out of reach is refused by `require_reachable` before.
    """
    if not prefixes:
        raise InputError(f"budget {budget.text!r} cannot be met: nothing can be removed")
    largest = f"{len(prefixes[-1])}blocks, ratio {counts.ratio(prefixes[-1]):.4f}"
    if budget.blocks is not None:
        sizes = [len(prefix) for prefix in prefixes]
        if budget.blocks not in sizes:
            raise InputError(f"budget {budget.text!r} is not in this sequence; its largest is {largest}")
        return sizes.index(budget.blocks) + 1
    assert budget.ratio is not None
    wanted = budget.ratio
    ratios = [0.0, *(counts.ratio(prefix) for prefix in prefixes)]
    best = min(range(len(ratios)), key=lambda k: (round(abs(ratios[k] - wanted), 12), -k))
    if best == 0:
        raise InputError(
            f"budget {budget.text!r} is nearest to removing nothing; the smallest that removes a block here is "
            f"{ratios[1]:.4f}"
        )
    return best
