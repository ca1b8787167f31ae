"""What can stand in for one dense model, over all runs of it: the options, and those that no other betters.

Decides which runs may be compared, which models count as of one size, and what is on the front.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from blockpruner.reporting.inputs import PrunedOption, ReportedRun
from blockpruner.reporting.results import Option

BAND = 0.015
"""Models whose ratios differ by no more than this share of all parameters count as of one size. It is half of a layer
of a 32-layer model, as near as whole layers come to a budget."""


@dataclass(frozen=True)
class Comparison:
    """Runs of one dense model, evaluated on the same text and items and timed in the same setting."""

    runs: tuple[ReportedRun, ...]

    @property
    def options(self) -> tuple[Option, ...]:
        """The dense model, then all targets by run."""
        return (self.runs[0].dense, *(target for reported in self.runs for target in reported.targets))

    def gain(self, option: Option) -> float:
        """The speed-up of an option where all are timed, else the share of the parameters that it removes."""
        return option.speedup if self.runs[0].dense.timed else option.ratio

    @property
    def targets(self) -> list[PrunedOption]:
        """The targets by size, the least pruned first."""
        found = (target for reported in self.runs for target in reported.targets)
        return sorted(found, key=lambda option: option.ratio)

    @property
    def front(self) -> list[Option]:
        """The options that no other betters in held-out perplexity and gain together, the least gain first."""
        members = front([(-self.gain(option), option.model.perplexity) for option in self.options])
        return sorted((self.options[i] for i in members), key=self.gain)


def comparisons(runs: Sequence[ReportedRun]) -> list[Comparison]:
    """Group runs whose results may be compared, in order of appearance."""
    groups: dict[object, list[ReportedRun]] = {}
    for reported in runs:
        dense, labels = reported.dense.model, reported.labels
        setting = reported.dense.race.dense.setting if reported.dense.timed else None
        text = (labels.heldout, dense.heldout.rows, dense.heldout.tokens)
        items = tuple((task, *numbers.tolist()) for task, numbers in sorted(dense.items.items()))
        key = (labels.model, dense.parameters, text, labels.tasks, items, setting)
        groups.setdefault(key, []).append(reported)
    return [Comparison(tuple(group)) for group in groups.values()]


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Find the points that no other dominates (Pareto front), by index; in both coordinates less is better.

    A point dominates another if it is no worse in both and better in one. Equal points do not dominate each other.
    """
    members: list[int] = []
    for i in sorted(range(len(points)), key=points.__getitem__):
        # of those at or before it in x, the last member has the least y
        if not members or points[i][1] < points[members[-1]][1] or points[i] == points[members[-1]]:
            members.append(i)
    return sorted(members)
