"""What can stand in for one dense model, over all runs of it: which options there are, and which none betters.

Decides which runs may be compared, which targets are of one size, and what is on a front. How it is shown is decided
in `tables` and `plots`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from blockpruner.reporting.inputs import Result, Study, Target
from blockpruner.reporting.methods import method_words

BAND = 0.015
"""Targets whose ratios differ by no more than this share of all parameters count as of one size: half of a layer of a
32-layer model, which is as near as whole layers come to a budget."""


@dataclass(frozen=True)
class Option:
    """A model to choose: a target, or the dense model (target None)."""

    study: Study
    target: Target | None

    @property
    def name(self) -> str:
        return self.target.name if self.target else "dense"

    @property
    def method(self) -> str:
        if self.target is None:
            return ""
        return method_words(self.target) + (" + LoRA" if self.target.plan.recover else "")

    @property
    def result(self) -> Result:
        return self.target.result if self.target else self.study.dense

    @property
    def ratio(self) -> float:
        """Share of the parameters removed."""
        return self.target.plan.ratio if self.target else 0.0

    @property
    def speedup(self) -> float:
        """Of generation, over the dense model, both measured in turns."""
        return self.target.speedups.generation if self.target else 1.0

    @property
    def cache_saved(self) -> float:
        """Share of the dense model's KV cache."""
        return 1 - self.result.speed.kv_cache_bytes / self.study.dense.speed.kv_cache_bytes


@dataclass(frozen=True)
class Gain:
    """What pruning may be for. name: for machines; title: of an axis; of: of an option, more is better."""

    name: str
    title: str
    of: Callable[[Option], float]


SPEED = Gain("speed", "generation speed-up, ×", lambda option: option.speedup)
CACHE = Gain("kv_cache", "KV cache saved, %", lambda option: 100 * option.cache_saved)
SIZE = Gain("parameters", "parameters removed, %", lambda option: 100 * option.ratio)
GAINS = (SPEED, CACHE, SIZE)


@dataclass(frozen=True)
class Comparison:
    """Runs of one dense model, evaluated on the same text and items and timed in the same setting."""

    studies: tuple[Study, ...]

    @property
    def options(self) -> tuple[Option, ...]:
        """The dense model, then all targets by run."""
        targets = (Option(study, target) for study in self.studies for target in study.targets)
        return (Option(self.studies[0], None), *targets)

    def front(self, gain: Gain) -> list[Option]:
        """The options that no other betters in held-out perplexity and `gain` together, the least gain first."""
        options = self.options
        members = front([(-gain.of(option), option.result.perplexity) for option in options])
        return sorted((options[i] for i in members), key=gain.of)

    def bands(self) -> list[list[Option]]:
        """Targets of one size (BAND), the least pruned first; in a band by run, so that the first run leads."""
        targets = self.options[1:]
        found: list[list[Option]] = []
        for option in sorted(targets, key=lambda option: option.ratio):
            if not found or option.ratio - found[-1][0].ratio > BAND:
                found.append([])
            found[-1].append(option)
        return [sorted(band, key=targets.index) for band in found]


def comparisons(studies: Sequence[Study]) -> list[Comparison]:
    """Group runs whose results may be compared, in order of appearance."""
    groups: dict[object, list[Study]] = {}
    for study in studies:
        dense, labels = study.dense, study.labels
        text = (labels.heldout, dense.heldout_rows, dense.heldout_tokens)
        key = (labels.model, dense.parameters, text, labels.tasks, frozenset(dense.items), dense.speed.setting)
        groups.setdefault(key, []).append(study)
    return [Comparison(tuple(group)) for group in groups.values()]


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices, ascending, of the points that no other dominates (Pareto front); in both coordinates less is better.

    A point dominates another if it is no worse in both and better in one; equal points do not dominate each other.
    """
    members: list[int] = []
    for i in sorted(range(len(points)), key=points.__getitem__):
        # of those at or before it in x, the last member has the least y
        if not members or points[i][1] < points[members[-1]][1] or points[i] == points[members[-1]]:
            members.append(i)
    return sorted(members)
