"""Lazy evaluation and racing: fewer trials for the same choice in a greedy step.

Decides which candidates of a step are scored, and on how many rows. Both decisions rest on what
this search asked for, not on what a store happens to hold. So a run that is repeated over any store
decides the same.

Racing (F-race, on paired rows): all candidates see the same rows, which keeps the variance of their
differences small. After each slice of rows a candidate is dropped if the lower confidence bound of
its mean difference to the leader is above zero. The rows are a finite population, since the
decision is about their mean and not about all text. A row gives nearly the same rise of a candidate
as in an earlier step, and only the change has to be estimated. The winner is always scored on all
rows.

Lazy (lazy greedy): the priority of a candidate is its latest rise of the loss. The most promising
candidates are scored. The others stay unscored if their rises, less a margin, are above the best
fresh one. The margin comes from how far rises have moved, and is wider for a candidate that was
scored on few rows. Rises are not monotone, hence audits: in every n-th step all candidates enter,
and the choice without them is recorded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import special

from blockpruner.core.blocks import Mask
from blockpruner.core.families import Costs
from blockpruner.scoring.objectives import MaskScore, Objective
from blockpruner.scoring.settings import Score

CONFIDENCE = 0.999
"""The confidence of each comparison in a race."""

PRIOR_ROWS = 4
"""The weight of the candidates' typical variance, as a number of rows of one candidate."""

FLOOR = 10
"""The least number of candidates that enter a lazy step."""

SLACK = 2.0
"""The margin of the lazy rule, as a multiple of sqrt(m^2 + e^2): m is the median of how far a rise
had moved when it was taken again, e the standard error of the candidate's rise."""

AUDIT = 6
"""All candidates enter every so many lazy steps."""


@dataclass(frozen=True)
class Considered:
    """The scores of a step. A candidate without a score was left out."""

    scores: tuple[MaskScore, ...]
    """In the order of the candidates. One with too few rows lost the race."""
    lazy_choice: Mask | None = None
    """The choice before an audit let all candidates enter; None in a step without audit."""


class Select:
    """Scores masks of which only the best matters: this one scores every mask on all rows."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective

    def __call__(self, index: int, base: Mask, masks: Sequence[Mask]) -> Considered:
        """The scores of one greedy step; the lowest of those on all rows is the step's choice.
        `masks` are the base plus one candidate each, and the base itself if its score is needed."""
        return Considered(tuple(self._objective(masks, base=base)))

    def challenge(self, standing: MaskScore, masks: Sequence[Mask]) -> list[MaskScore]:
        """Scores of masks that may be better than a standing one. The best one has all rows if it
        is better."""
        return self._objective(masks)


def make_select(objective: Objective, score: Score, costs: Costs | None = None) -> Select:
    """The selection of a search by `score.acceleration`. `costs` are those of the resource that
    prices a removal, None where all cost the same."""
    rules = (score.acceleration or "none").split("+")
    if rules == ["none"]:
        return Select(objective)
    return Accelerated(objective, "race" in rules, "lazy" in rules, costs)


def price(rise: float, share: float) -> float:
    """The number that is lowest for the best removal. Where a removal lowers the loss, saving more
    is better."""
    return rise / share if rise > 0 else rise * share


def worth(score: MaskScore, base: MaskScore, costs: Costs | None) -> float:
    """The number that ranks the candidates of a step: their loss, or the price of its rise over the
    base."""
    if costs is None:
        return score.loss
    return price(score.loss - base.loss, costs.ratio(score.mask - base.mask))


class Accelerated(Select):
    """Leaves out masks or rows, by what earlier steps of the same search have shown: rows if it
    `races`, and candidates if it `is_lazy`."""

    def __init__(
        self, objective: Objective, races: bool, is_lazy: bool, costs: Costs | None
    ) -> None:
        super().__init__(objective)
        self._races, self._is_lazy, self._costs = races, is_lazy, costs
        self._rises: dict[Mask, np.ndarray] = {}
        """The latest rises of each unit, row by row."""
        self._drifts: list[float] = []
        """How far mean rises have moved from one step to the next in which they were taken."""

    def __call__(self, index: int, base: Mask, masks: Sequence[Mask]) -> Considered:
        candidates = [mask for mask in masks if mask != base]
        lazy_choice = None
        # With a quota of MHA blocks, a step may ask for units that no earlier one asked for.
        has_new_unit = any(mask - base not in self._rises for mask in candidates)
        if not self._is_lazy or index == 0 or has_new_unit:
            scores = self._score(candidates, base)
        else:
            scores = self._score_promising(candidates, base)
            if index % AUDIT == 0:
                lazy_choice = self._best(scores, base)
                unscored = [mask for mask in candidates if mask not in scores]
                scores |= self._score(unscored, base, scores[lazy_choice])
        if base in masks:
            scores[base] = self._score_base(base)
        in_order = tuple(scores[mask] for mask in masks if mask in scores)
        return Considered(in_order, lazy_choice)

    def challenge(self, standing: MaskScore, masks: Sequence[Mask]) -> list[MaskScore]:
        if not self._races:
            return self._objective(masks)
        scores = race(self._objective, standing.mask, masks, CONFIDENCE, standing=standing)
        return [scores[mask] for mask in masks]

    def _score_promising(self, candidates: Sequence[Mask], base: Mask) -> dict[Mask, MaskScore]:
        """The lazy rule: score candidates by priority, until no other can be the best."""
        error = {
            mask: standard_error(self._rises[mask - base], self._objective.rows)
            for mask in candidates
        }
        waiting = sorted(candidates, key=lambda mask: self._optimistic_price(mask - base))
        entering, waiting = waiting[:FLOOR], waiting[FLOOR:]
        scores: dict[Mask, MaskScore] = {}
        while entering:
            standing = scores[self._best(scores, base)] if scores else None
            scores |= self._score(entering, base, standing)
            best_price = self._optimistic_price(self._best(scores, base) - base)
            drift = float(np.median(np.abs(self._drifts)))
            entering = []
            for mask in waiting:
                margin = SLACK * math.hypot(drift, error[mask])
                if self._optimistic_price(mask - base, margin) < best_price:
                    entering.append(mask)
            waiting = [mask for mask in waiting if mask not in entering]
        return scores

    def _best(self, scores: Mapping[Mask, MaskScore], base: Mask) -> Mask:
        """The best of the masks that are scored on all rows, the earliest of equals."""
        base_score = self._score_base(base)
        complete = [score for score in scores.values() if score.is_complete]
        return min(complete, key=lambda score: worth(score, base_score, self._costs)).mask

    def _score_base(self, base: Mask) -> MaskScore:
        return self._objective([base])[0]

    def _optimistic_price(self, unit: Mask, margin: float = 0.0) -> float:
        """The price of a unit's latest rise less a margin."""
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
        past = {}
        for mask in masks:
            rises = self._rises.get(mask - base)
            if rises is not None and np.isfinite(rises).all():
                past[mask] = rises
        if self._races:
            scores = race(self._objective, base, masks, CONFIDENCE, past, standing, self._share)
        else:
            scores = dict(zip(masks, self._objective([base, *masks])[1:], strict=True))
        base_losses = np.array(self._score_base(base).row_loss)
        for mask, score in scores.items():
            runner = Runner(
                np.array(score.row_loss) - base_losses[: score.rows_used],
                past.get(mask, np.empty(0)),
            )
            if mask in past and score.loss < math.inf:
                self._drifts.append(float(runner.expected.mean() - past[mask].mean()))
            self._rises[mask - base] = runner.expected
        return scores


def standard_error(rises: np.ndarray, total: int) -> float:
    """The standard error of the mean over all rows, from the rises on K of them: sd / sqrt(K) with
    the finite population correction."""
    count = len(rises)
    if count == total or not np.isfinite(rises).all():
        return 0.0
    return float(rises.std(ddof=1)) * math.sqrt(1 / count - 1 / total)


def slices(rows: int) -> Iterator[int]:
    """The numbers of rows after which a race drops candidates: 2, 3, 4, 6, 9, ... and all."""
    stop = 2
    while stop < rows:
        yield stop
        stop += max(1, stop // 2)
    yield rows


@dataclass(frozen=True)
class Runner:
    """A candidate in a race: its rises of the loss over the base, nats per token, row by row."""

    current: np.ndarray
    """[k] in this step."""
    past: np.ndarray = field(default_factory=lambda: np.empty(0))
    """[K] of an earlier step, K >= k, or [0] if there is none."""

    @property
    def expected(self) -> np.ndarray:
        """Rises on all rows of either step, [K]: the current ones, then the past ones moved by the
        mean change. Their mean is the difference estimator of two-phase sampling."""
        rest = self.past[len(self.current) :]
        shift = self.change.mean() if len(rest) else 0.0
        return np.concatenate([self.current, rest + shift])

    @property
    def change(self) -> np.ndarray:
        """The change from the past rises to the current ones, [k]."""
        change: np.ndarray = self.current - self.past[: len(self.current)]
        return change

    def times(self, factor: float) -> Runner:
        return Runner(factor * self.current, factor * self.past)


def lower_bounds(
    others: Sequence[Runner], leader: Runner, total: int, confidence: float
) -> np.ndarray:
    """Lower confidence bound of the mean over all rows of each runner's difference to the leader.

        mean(d) - t(confidence, p + k - 1) * sqrt(V(d) * (1/K - 1/total) + V(c) * (1/k - 1/K))

    k of `total` rows are scored. d is the difference of the expected rises on the K rows of either
    step, c the difference of the changes on the k rows. A candidate that was scored on all rows in
    an earlier step has K = total: only what has changed since is uncertain. Without a past K = k,
    and this is the bound of a paired t-test with the finite population correction. V is a moderated
    variance (Smyth 2004), since two or three rows often look alike by chance:
    (p * median over runners + (k - 1) * variance) / (p + k - 1), p = PRIOR_ROWS.
    """
    k = len(leader.current)
    row_counts, differences, changes = [], [], []
    for runner in others:
        rows = min(len(runner.expected), len(leader.expected))
        row_counts.append(rows)
        differences.append(runner.expected[:rows] - leader.expected[:rows])
        if rows > k:
            changes.append(runner.change - leader.change)
    expected_rows = np.array(row_counts)
    freedom = PRIOR_ROWS + k - 1

    def moderated_variance(samples: Sequence[np.ndarray]) -> np.ndarray:
        variances = np.array([sample.var(ddof=1) for sample in samples])
        moderated: np.ndarray = PRIOR_ROWS * np.median(variances) + (k - 1) * variances
        return moderated / freedom

    variance = moderated_variance(differences) * (1 / expected_rows - 1 / total)
    if changes:
        has_past = expected_rows > k
        variance[has_past] += moderated_variance(changes) * (1 / k - 1 / expected_rows[has_past])
    means = np.array([difference.mean() for difference in differences])
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
        past: rises of masks in an earlier step, row by row from row 0 on.
        standing: a mask with all rows, which the others run against and which cannot be dropped;
            without it, at least one of the others sees all rows.
        share: what a removed unit saves of the resource that prices it. Rises are compared as if
            all saved as much as the leader.
    """
    scores: dict[Mask, MaskScore] = {}
    alive = list(masks)
    standing_rises = None
    if standing is not None:
        (base_score,) = objective([base])
        standing_rises = np.array(standing.row_loss) - np.array(base_score.row_loss)
    for rows in slices(objective.rows):
        if len(alive) == 1 and standing is None:
            rows = objective.rows
        base_score, *alive_scores = objective([base, *alive], rows)
        scores |= {score.mask: score for score in alive_scores}
        if rows == objective.rows:
            break
        base_losses = np.array(base_score.row_loss)
        runners: dict[Mask, Runner] = {}
        for score in alive_scores:
            if score.loss < math.inf:
                rises = np.array(score.row_loss) - base_losses
                runners[score.mask] = Runner(rises, (past or {}).get(score.mask, np.empty(0)))
        if runners:
            if standing is not None and standing_rises is not None:
                runners[standing.mask] = Runner(standing_rises[:rows], standing_rises)
            shares = [share(mask - base) for mask in runners]
            survives = _survivors(list(runners.values()), shares, objective.rows, confidence)
            survivors = {mask for mask, lives in zip(runners, survives, strict=True) if lives}
            alive = [mask for mask in alive if mask in survivors]
        else:
            # All overflow. Without a standing mask somebody has to win.
            alive = alive[:1] if standing is None else []
        if not alive:
            break
    return scores


def _survivors(
    runners: Sequence[Runner], shares: Sequence[float], total: int, confidence: float
) -> list[bool]:
    """Whether each runner stays in the race: the leader, and all that may be as good."""
    rises = [float(runner.expected.mean()) for runner in runners]
    prices = [price(rise, share) for rise, share in zip(rises, shares, strict=True)]
    leader = int(np.argmin(prices))
    scaled = []
    for runner, share in zip(runners, shares, strict=True):
        factor = shares[leader] / share if rises[leader] > 0 else share / shares[leader]
        scaled.append(runner.times(factor))
    others = [runner for number, runner in enumerate(scaled) if number != leader]
    survives = (lower_bounds(others, scaled[leader], total, confidence) <= 0).tolist()
    survives.insert(leader, True)
    return [bool(lives) for lives in survives]
