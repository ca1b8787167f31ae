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
from dataclasses import dataclass

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
        scores = self._objective(masks, base=base)
        return Considered(tuple(scores))

    def challenge(self, standing: MaskScore, masks: Sequence[Mask]) -> list[MaskScore]:
        """Scores of masks that may be better than a standing one. The best one has all rows if it
        is better."""
        return self._objective(masks)


def make_select(objective: Objective, score: Score, costs: Costs | None = None) -> Select:
    """The selection of a search by `score.acceleration`. `costs` are those of the resource that
    prices a removal, None where all cost the same."""
    acceleration = score.acceleration or "none"
    if acceleration == "none":
        return Select(objective)
    races = "race" in acceleration
    is_lazy = "lazy" in acceleration
    return Accelerated(objective, races, is_lazy, costs)


def price(rise: float, share: float) -> float:
    """The number that is lowest for the best removal."""
    if rise > 0:
        return rise / share
    # Of two removals that lower the loss, the one that saves more is better.
    return rise * share


def worth(score: MaskScore, base: MaskScore, costs: Costs | None) -> float:
    """The number that ranks the candidates of a step: their loss, or the price of its rise over the
    base."""
    if costs is None:
        return score.loss
    rise = score.loss - base.loss
    share = costs.ratio(score.mask - base.mask)
    return price(rise, share)


def row_rises(score: MaskScore, base: MaskScore) -> np.ndarray:
    """The rise of the loss over the base, row by row, on the rows that both were scored on."""
    rows = min(score.rows_used, base.rows_used)
    losses = np.array(score.row_loss[:rows])
    base_losses = np.array(base.row_loss[:rows])
    rises: np.ndarray = losses - base_losses
    return rises


class Accelerated(Select):
    """Leaves out masks or rows, by what earlier steps of the same search have shown: rows if it
    `races`, and candidates if it `is_lazy`."""

    def __init__(
        self, objective: Objective, races: bool, is_lazy: bool, costs: Costs | None
    ) -> None:
        super().__init__(objective)
        self._races = races
        self._is_lazy = is_lazy
        self._costs = costs
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
            # Rises are not monotone: an audit shows what the lazy rule misses.
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
        errors = {}
        prices = {}
        for mask in candidates:
            unit = mask - base
            errors[mask] = standard_error(self._rises[unit], self._objective.rows)
            prices[mask] = self._optimistic_price(unit)
        waiting = sorted(candidates, key=prices.__getitem__)
        entering = waiting[:FLOOR]
        waiting = waiting[FLOOR:]
        scores: dict[Mask, MaskScore] = {}
        standing = None
        while entering:
            scores |= self._score(entering, base, standing)
            best = self._best(scores, base)
            standing = scores[best]
            best_price = self._optimistic_price(best - base)
            drift = float(np.median(np.abs(self._drifts)))
            entering = []
            for mask in waiting:
                margin = SLACK * math.hypot(drift, errors[mask])
                # Lazy step: a candidate whose optimistic price is no better is left unscored.
                if self._optimistic_price(mask - base, margin) < best_price:
                    entering.append(mask)
            waiting = [mask for mask in waiting if mask not in entering]
        return scores

    def _best(self, scores: Mapping[Mask, MaskScore], base: Mask) -> Mask:
        """The best of the masks that are scored on all rows, the earliest of equals."""
        base_score = self._score_base(base)
        complete = [score for score in scores.values() if score.is_complete]
        best = min(complete, key=lambda score: worth(score, base_score, self._costs))
        return best.mask

    def _score_base(self, base: Mask) -> MaskScore:
        return self._objective([base])[0]

    def _optimistic_price(self, unit: Mask, margin: float = 0.0) -> float:
        """The price of a unit's latest rise less a margin."""
        rise = float(self._rises[unit].mean())
        return price(rise - margin, self._share(unit))

    def _share(self, unit: Mask) -> float:
        if self._costs is None:
            return 1.0
        return self._costs.ratio(unit)

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
            # The change from an infinite rise has no mean.
            if rises is not None and np.isfinite(rises).all():
                past[mask] = rises
        if self._races:
            scores = race(self._objective, base, masks, CONFIDENCE, past, standing, self._share)
        else:
            complete = self._objective([base, *masks])[1:]
            scores = dict(zip(masks, complete, strict=True))
        base_score = self._score_base(base)
        for mask, score in scores.items():
            runner = Runner(row_rises(score, base_score), past.get(mask, NO_ROWS))
            if mask in past and score.loss < math.inf:
                drift = runner.expected.mean() - past[mask].mean()
                self._drifts.append(float(drift))
            self._rises[mask - base] = runner.expected
        return scores


def standard_error(rises: np.ndarray, total: int) -> float:
    """The standard error of the mean over all rows, from the rises on K of them: sd / sqrt(K) with
    the finite population correction."""
    count = len(rises)
    # The error of an infinite mean is not defined; such a candidate gets no margin for it.
    if count == total or not np.isfinite(rises).all():
        return 0.0
    deviation = float(rises.std(ddof=1))
    return deviation * math.sqrt(1 / count - 1 / total)


def slices(rows: int) -> Iterator[int]:
    """The numbers of rows after which a race drops candidates: 2, 3, 4, 6, 9, ... and all."""
    stop = 2
    while stop < rows:
        yield stop
        stop += max(1, stop // 2)
    yield rows


NO_ROWS = np.empty(0)


@dataclass(frozen=True)
class Runner:
    """A candidate in a race: its rises of the loss over the base, nats per token, row by row."""

    current: np.ndarray
    """[k] in this step."""
    past: np.ndarray
    """[K] of an earlier step, K >= k, or [0] if there is none."""

    @property
    def expected(self) -> np.ndarray:
        """Rises on all rows of either step, [K]: the current ones, then the past ones moved by the
        mean change. Their mean is the difference estimator of two-phase sampling."""
        unseen = self.past[len(self.current) :]
        if not len(unseen):
            return self.current
        return np.concatenate([self.current, unseen + self.change.mean()])

    @property
    def change(self) -> np.ndarray:
        """The change from the past rises to the current ones, [k]."""
        change: np.ndarray = self.current - self.past[: len(self.current)]
        return change

    def times(self, factor: float) -> Runner:
        return Runner(factor * self.current, factor * self.past)


def lower_bounds(
    runners: Sequence[Runner], leader: Runner, total: int, confidence: float
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
    leader_rises = leader.expected
    differences = []
    changes = []
    for runner in runners:
        rises = runner.expected
        rows = min(len(rises), len(leader_rises))
        differences.append(rises[:rows] - leader_rises[:rows])
        if rows > k:
            changes.append(runner.change - leader.change)
    K = np.array([len(difference) for difference in differences])
    # The uncertainty of the past rises: they are of K rows, not of all.
    variance = moderated_variance(differences, k) * (1 / K - 1 / total)
    # The uncertainty of the change since then: it is of k rows, not of K.
    if changes:
        has_past = k < K
        scale = 1 / k - 1 / K[has_past]
        variance[has_past] += moderated_variance(changes, k) * scale
    means = np.array([difference.mean() for difference in differences])
    quantile = special.stdtrit(PRIOR_ROWS + k - 1, confidence)
    bounds: np.ndarray = means - quantile * np.sqrt(variance)
    return bounds


def moderated_variance(samples: Sequence[np.ndarray], k: int) -> np.ndarray:
    """V of `lower_bounds`, one of each sample."""
    variances = np.array([sample.var(ddof=1) for sample in samples])
    prior = PRIOR_ROWS * np.median(variances)
    moderated: np.ndarray = prior + (k - 1) * variances
    return moderated / (PRIOR_ROWS + k - 1)


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
        standing: a mask with all rows, which the masks run against and which cannot be dropped;
            without it, at least one of the masks sees all rows.
        share: what a removed unit saves of the resource that prices it. Rises are compared as if
            all saved as much as the leader.
    """
    past_rises = dict(past or {})
    if standing is not None:
        (base_score,) = objective([base])
        past_rises[standing.mask] = row_rises(standing, base_score)
    scores: dict[Mask, MaskScore] = {}
    alive = list(masks)
    for rows in slices(objective.rows):
        # The last candidate has won, and the winner has all rows.
        if len(alive) == 1 and standing is None:
            rows = objective.rows
        base_score, *alive_scores = objective([base, *alive], rows)
        scores |= {score.mask: score for score in alive_scores}
        if rows == objective.rows:
            break
        contenders = [score for score in alive_scores if score.loss < math.inf]
        if not contenders:
            # All overflow. Without a standing mask somebody has to win.
            alive = alive[:1] if standing is None else []
        else:
            # Differences to an infinite loss are not defined, and would drop every rival.
            if standing is not None and standing.loss < math.inf:
                contenders.append(standing)
            runners = {}
            shares = {}
            for score in contenders:
                rises = row_rises(score, base_score)
                runners[score.mask] = Runner(rises, past_rises.get(score.mask, NO_ROWS))
                shares[score.mask] = share(score.mask - base)
            survivors = _survivors(runners, shares, objective.rows, confidence)
            alive = [mask for mask in alive if mask in survivors]
        if not alive:
            break
    return scores


def _survivors(
    runners: Mapping[Mask, Runner], shares: Mapping[Mask, float], total: int, confidence: float
) -> set[Mask]:
    """The masks that stay in the race: the leader, and all that may be as good."""
    prices = {}
    for mask, runner in runners.items():
        rise = float(runner.expected.mean())
        prices[mask] = price(rise, shares[mask])
    leader = min(prices, key=prices.__getitem__)
    scaled = {}
    for mask, runner in runners.items():
        factor = shares[mask] / shares[leader]
        # A rise is divided by the share, a fall is multiplied by it.
        if prices[leader] > 0:
            factor = shares[leader] / shares[mask]
        scaled[mask] = runner.times(factor)
    leading = scaled.pop(leader)
    bounds = lower_bounds(list(scaled.values()), leading, total, confidence)
    survivors = {leader}
    for mask, bound in zip(scaled, bounds, strict=True):
        if bound <= 0:
            survivors.add(mask)
    return survivors
