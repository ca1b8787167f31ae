"""Fewer trials for the same choice: lazy evaluation and racing of a greedy step's candidates.

Decides which candidates of a step are scored, and on how many rows. Both decisions rest on what
this search asked for, not on what a store happens to know: a run repeated over any store decides
the same.

Racing (F-race, on paired rows): all candidates see the same rows, which keeps the variance of their
differences small. After each slice of rows a candidate is dropped if the lower confidence bound of
its mean difference to the leader is above zero. The rows are a finite population, since the
decision is about their mean and not about all text. A row says nearly the same about a candidate as
in an earlier step, and only the change has to be estimated. The winner is always scored on all
rows.

Lazy (lazy greedy): the priority of a candidate is its last known rise of the loss. The most
promising candidates are scored first. The others stay unscored if their rises, less a margin, are
above the best fresh one. The margin comes from how far rises have moved, and is wider for a
candidate known on few rows. Rises are not monotone, hence audits: in every n-th step all candidates
enter, and the choice without them is recorded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from blockpruner.core.blocks import Mask
from blockpruner.core.families import Costs
from blockpruner.scoring.objectives import MaskScore, Objective
from blockpruner.scoring.settings import Score


@dataclass(frozen=True)
class Considered:
    """What a step considered; a candidate without a score was not."""

    scores: tuple[MaskScore, ...]
    """In the order of the candidates, after the base if that was asked for. One with too few rows
    lost the race."""
    lazy_choice: Mask | None = None
    """The choice before an audit let all candidates enter; None in a step without audit."""


class Select:
    """Scores masks of which only the best matters: here every mask on all rows."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective

    def __call__(self, index: int, base: Mask, masks: Sequence[Mask]) -> Considered:
        """The scores of one greedy step; the lowest of those on all rows is the step's choice.
        `masks` are the base plus one candidate each, and the base itself if its score is wanted."""
        return Considered(tuple(self._objective(masks, base=base)))

    def challenge(self, standing: MaskScore, masks: Sequence[Mask]) -> list[MaskScore]:
        """Scores of masks that may be better than a standing one. The best one has all rows if it
        is better."""
        return self._objective(masks)


CONFIDENCE = 0.999
"""The confidence of each comparison in a race."""

FLOOR = 10
"""The least number of candidates that enter a lazy step."""

SLACK = 2.0
"""The margin of the lazy rule, as a multiple of sqrt(m^2 + e^2): m is the median of how far a rise
had moved when it was taken again, e the standard error of the candidate's own rise."""

AUDIT = 6
"""All candidates enter every so many lazy steps."""


def accelerate(objective: Objective, score: Score, costs: Costs | None = None) -> Select:
    """What selects and scores the candidates of a step; `costs` are of the resource that prices a
    removal, None where all cost the same."""
    parts = (score.acceleration or "none").split("+")
    if parts == ["none"]:
        return Select(objective)
    return Accelerated(objective, "race" in parts, "lazy" in parts, costs)


def price(rise: float, share: float) -> float:
    """The number that is lowest for the best removal. Where a removal lowers the loss, saving more
    is better."""
    return rise / share if rise > 0 else rise * share


def worth(score: MaskScore, base: MaskScore, costs: Costs | None) -> float:
    """What orders the candidates of a step: their loss, or the price of its rise over the base."""
    return (
        score.loss
        if costs is None
        else price(score.loss - base.loss, costs.ratio(score.mask - base.mask))
    )


class Accelerated(Select):
    """Leaves out masks or rows, by what it has found in earlier steps of one search: rows if it
    `races`, and candidates if it `is_lazy`."""

    def __init__(
        self, objective: Objective, races: bool, is_lazy: bool, costs: Costs | None
    ) -> None:
        super().__init__(objective)
        self._races, self._is_lazy, self._costs = races, is_lazy, costs
        self._rises: dict[Mask, np.ndarray] = {}
        self._drifts: list[float] = []

    def __call__(self, index: int, base: Mask, masks: Sequence[Mask]) -> Considered:
        candidates = [mask for mask in masks if mask != base]
        lazy_choice = None
        # a quota may ask for other units
        unknown = any(mask - base not in self._rises for mask in candidates)
        if not self._is_lazy or index == 0 or unknown:
            found = self._score(candidates, base)
        else:
            found = self._most_promising(candidates, base)
            if index % AUDIT == 0:
                lazy_choice = self._best(found, base)
                rest = [mask for mask in candidates if mask not in found]
                found |= self._score(rest, base, found[lazy_choice])
        if base in masks:
            found[base] = self._objective([base])[0]
        return Considered(tuple(found[mask] for mask in masks if mask in found), lazy_choice)

    def challenge(self, standing: MaskScore, masks: Sequence[Mask]) -> list[MaskScore]:
        if not self._races:
            return self._objective(masks)
        found = race(self._objective, standing.mask, masks, CONFIDENCE, standing=standing)
        return [found[mask] for mask in masks]

    def _most_promising(self, candidates: Sequence[Mask], base: Mask) -> dict[Mask, MaskScore]:
        error = {
            mask: standard_error(self._rises[mask - base], self._objective.rows)
            for mask in candidates
        }
        waiting = sorted(candidates, key=lambda mask: self._price(mask - base))
        entering, waiting = waiting[:FLOOR], waiting[FLOOR:]
        found: dict[Mask, MaskScore] = {}
        while entering:
            found |= self._score(entering, base, found[self._best(found, base)] if found else None)
            best = self._price(self._best(found, base) - base)
            drift = float(np.median(np.abs(self._drifts)))
            margin = {mask: SLACK * math.hypot(drift, error[mask]) for mask in waiting}
            entering = [mask for mask in waiting if self._price(mask - base, margin[mask]) < best]
            waiting = [mask for mask in waiting if mask not in entering]
        return found

    def _best(self, scores: Mapping[Mask, MaskScore], base: Mask) -> Mask:
        """The best of the masks scored on all rows, the first of equals."""
        (before,) = self._objective([base])
        complete = (score for score in scores.values() if score.is_complete)
        return min(complete, key=lambda score: worth(score, before, self._costs)).mask

    def _price(self, unit: Mask, margin: float = 0.0) -> float:
        """The price of the rise that is known of a unit, less a margin."""
        return price(float(self._rises[unit].mean()) - margin, self._share(unit))

    def _share(self, unit: Mask) -> float:
        return 1.0 if self._costs is None else self._costs.ratio(unit)

    def _score(
        self, masks: Sequence[Mask], base: Mask, standing: MaskScore | None = None
    ) -> dict[Mask, MaskScore]:
        """Score masks, by a race or on all rows, and keep their rises over the base on the same
        rows."""
        if not masks:
            return {}
        past = {mask: self._rises[mask - base] for mask in masks if mask - base in self._rises}
        past = {mask: rises for mask, rises in past.items() if np.isfinite(rises).all()}
        if self._races:
            found = race(self._objective, base, masks, CONFIDENCE, past, standing, self._share)
        else:
            found = dict(zip(masks, self._objective([base, *masks])[1:], strict=True))
        before = np.array(self._objective([base])[0].row_loss)
        for mask, score in found.items():
            seen = np.array(score.row_loss) - before[: score.rows_used]
            runner = Runner(seen, past.get(mask, np.empty(0)))
            if mask in past and score.loss < math.inf:
                self._drifts.append(float(runner.expected.mean() - past[mask].mean()))
            self._rises[mask - base] = runner.expected
        return found


def standard_error(rises: np.ndarray, total: int) -> float:
    """The error of the mean over all rows, from the known ones: sd / sqrt(K) with the finite
    population correction."""
    known = len(rises)
    if not np.isfinite(rises).all():
        return 0.0
    return float(rises.std(ddof=1)) * math.sqrt(1 / known - 1 / total) if known < total else 0.0


def slices(rows: int) -> Iterator[int]:
    """After how many rows a race drops candidates: 2, 3, 4, 6, 9, ... and the last row."""
    stop = 2
    while stop < rows:
        yield stop
        stop += max(1, stop // 2)
    yield rows


PRIOR_ROWS = 4
"""The weight of the candidates' typical variance, counted in rows of a candidate's own."""


@dataclass(frozen=True)
class Runner:
    """A candidate in a race: its rises of the loss over the base, nats per token, row by row."""

    seen: np.ndarray
    """[k] in this step."""
    past: np.ndarray
    """[K] of an earlier step, K >= k, or [0] if there is none."""

    @property
    def expected(self) -> np.ndarray:
        """Rises on all rows that anything is known of, [K]: the seen ones, then the past ones moved
        by the mean change on the rows seen. Their mean is the difference estimator of two-phase
        sampling."""
        rest = self.past[len(self.seen) :]
        return np.concatenate([self.seen, rest + (self.change.mean() if len(rest) else 0.0)])

    @property
    def change(self) -> np.ndarray:
        """From past to seen, [k]."""
        change: np.ndarray = self.seen - self.past[: len(self.seen)]
        return change

    def times(self, factor: float) -> Runner:
        return Runner(factor * self.seen, factor * self.past)


def lower_bounds(
    others: Sequence[Runner], leader: Runner, total: int, confidence: float
) -> np.ndarray:
    """Lower confidence bound of the mean over all rows of each runner's difference to the leader.

        mean(d) - t(confidence, p + k - 1) * sqrt(V(d) * (1/K - 1/total) + V(c) * (1/k - 1/K))

    k rows are seen of `total`. d is the difference of the expected rises on the K rows that
    something is known of, c the difference of the changes on the rows seen. A candidate that was
    scored on all rows in an earlier step has K = total: only what has changed since is uncertain.
    Without a past K = k, and this is the bound of a paired t-test with the finite population
    correction. V is a moderated variance (Smyth 2004), since two or three rows often look alike by
    chance: (p * median over runners + (k - 1) * own) / (p + k - 1), p = PRIOR_ROWS.
    """
    k = len(leader.seen)
    known = np.array([min(len(runner.expected), len(leader.expected)) for runner in others])
    d = [
        runner.expected[:rows] - leader.expected[:rows]
        for runner, rows in zip(others, known, strict=True)
    ]
    c = [
        runner.change - leader.change
        for runner, rows in zip(others, known, strict=True)
        if rows > k
    ]
    freedom = PRIOR_ROWS + k - 1

    def moderated(rows: Sequence[np.ndarray]) -> np.ndarray:
        own = np.array([row.var(ddof=1) for row in rows])
        result: np.ndarray = (PRIOR_ROWS * np.median(own) + (k - 1) * own) / freedom
        return result

    variance = moderated(d) * (1 / known - 1 / total)
    if c:
        variance[known > k] += moderated(c) * (1 / k - 1 / known[known > k])
    means = np.array([row.mean() for row in d])
    bounds: np.ndarray = means - special.stdtrit(freedom, confidence) * np.sqrt(variance)
    return bounds


def race(
    objective: Objective,
    base: Mask,
    masks: Sequence[Mask],
    confidence: float,
    past: Mapping[Mask, np.ndarray] | None = None,
    standing: MaskScore | None = None,
    share: Callable[[Mask], float] = lambda unit: 1.0,
) -> dict[Mask, MaskScore]:
    """Score masks on more and more rows, and drop those that are worse than the leader, or
    infinite. The leader sees all rows.

    Args:
        base: scored on the same rows, outside the race.
        past: rises of masks in an earlier step, row by row from the first row on.
        standing: a mask with all rows, which the others run against and which cannot be dropped;
            without it, at least one of the others sees all rows.
        share: what a removed unit saves of the resource that prices it. Rises are compared as if
            all saved as much as the leader.
    """
    past = past or {}
    known: dict[Mask, MaskScore] = {}
    alive = list(masks)
    for stop in slices(objective.rows):
        if len(alive) == 1 and standing is None:
            stop = objective.rows
        before, *scores = objective([base, *alive], stop)
        known |= {score.mask: score for score in scores}
        if stop == objective.rows:
            break
        finite = [score for score in scores if score.loss < math.inf]
        scores = finite or scores[: standing is None]
        alive = [score.mask for score in scores]
        if not finite:
            continue
        zero = np.array(before.row_loss)
        runners = [
            Runner(np.array(s.row_loss) - zero, past.get(s.mask, np.empty(0))) for s in scores
        ]
        if standing is not None:
            rises = np.array(standing.row_loss) - np.array(objective([base])[0].row_loss)
            runners.append(Runner(rises[:stop], rises))
        saved = [
            share(mask - base)
            for mask in (*alive, *([standing.mask] if standing is not None else []))
        ]
        rises_now = [float(runner.expected.mean()) for runner in runners]
        leader = int(
            np.argmin([price(rise, size) for rise, size in zip(rises_now, saved, strict=True)])
        )
        per_share = rises_now[leader] > 0
        runners = [
            runner.times(saved[leader] / size if per_share else size / saved[leader])
            for runner, size in zip(runners, saved, strict=True)
        ]
        others = [i for i in range(len(runners)) if i != leader]
        bounds = lower_bounds(
            [runners[i] for i in others], runners[leader], objective.rows, confidence
        )
        kept = {leader, *(i for i, bound in zip(others, bounds, strict=True) if bound <= 0)}
        alive = [mask for i, mask in enumerate(alive) if i in kept]
        if not alive:
            break
    return known
