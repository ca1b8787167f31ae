"""Fewer trials for the same choice: lazy evaluation and racing of a greedy step's candidates.

Decides which candidates of a step are scored, and on how many rows; never what a trial says. Both rest on facts that
were asked for in this search alone, not on what a store happens to know, so that a run repeated over any store takes
the same decisions.

Racing (as in F-race, on paired rows): all candidates see the same rows, so the variance of their differences is small.
After each slice of rows a candidate is dropped when the lower confidence bound of its mean difference to the leader is
above zero, t-distributed over rows, with the finite population correction: what is decided is the mean over
the calibration rows, not over all text. The winner is always scored on all rows.

Lazy (as in lazy greedy): a candidate's last known rise of the loss is its priority. The most promising are scored
first; the rest stays unscored when its rises, less a margin learned from how rises have moved, are above the best
fresh one. Rises are not monotone, hence audits: in every n-th step all candidates enter, and what would have been
chosen without is recorded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from blockpruner.blocks import Mask
from blockpruner.errors import InputError
from blockpruner.scoring.objectives import Objective, Score


@dataclass(frozen=True)
class Selection:
    """What a step considered: scores in the order of the candidates, the base first where it was asked for.

    A score with rows_used < rows_total lost the race; a candidate without a score was not considered.
    lazy_choice: the pick before an audit let all candidates enter; None in a step without audit.
    """

    scores: tuple[Score, ...]
    lazy_choice: Mask | None = None


def slices(rows: int) -> Iterator[int]:
    """After how many rows a race drops candidates: 2, 3, 5, 8, 12, ... and the last row."""
    stop = 2
    while stop < rows:
        yield stop
        stop += max(1, stop // 2)
    yield rows


PRIOR_ROWS = 4
"""How many rows the candidates' typical variance is worth, beside a candidate's own."""


def lower_bound(differences: np.ndarray, total: int, confidence: float) -> np.ndarray:
    """Lower confidence bound of each candidate's mean difference over all rows, from the rows seen.

        mean - t(confidence, p + k - 1) * s * sqrt((1 - k / total) / k),
        s^2 = (p * s0^2 + (k - 1) * sd^2) / (p + k - 1)

    with k rows seen of `total`, sd a candidate's own standard deviation, s0 the candidates' median one and
    p = PRIOR_ROWS: a moderated t statistic (Smyth 2004), since two or three rows alone often look alike by chance.

    Args:
        differences: [candidates, k], a candidate's loss less the leader's, row by row.
    """
    seen = differences.shape[1]
    own = differences.var(axis=1, ddof=1)
    freedom = PRIOR_ROWS + seen - 1
    variance = (PRIOR_ROWS * np.median(own) + (seen - 1) * own) / freedom
    spread = np.sqrt(variance / seen * (1 - seen / total))
    bound: np.ndarray = differences.mean(axis=1) - stats.t.ppf(confidence, freedom) * spread
    return bound


def race(objective: Objective, masks: Sequence[Mask], confidence: float) -> dict[Mask, Score]:
    """Score masks on more and more rows, dropping those that are worse than the leader; one at least sees all rows."""
    known: dict[Mask, Score] = {}
    alive = list(masks)
    for stop in slices(objective.rows):
        if len(alive) == 1:
            stop = objective.rows
        known |= {score.mask: score for score in objective(alive, stop)}
        if stop == objective.rows:
            break
        losses = np.array([known[mask].row_nll for mask in alive])
        leader = int(losses.mean(axis=1).argmin())
        others = [i for i in range(len(alive)) if i != leader]
        bounds = lower_bound(losses[others] - losses[leader], objective.rows, confidence)
        kept = {leader, *(i for i, bound in zip(others, bounds, strict=True) if bound <= 0)}
        alive = [mask for i, mask in enumerate(alive) if i in kept]
    return known


Select = Callable[[int, Mask, Sequence[Mask]], Selection]

DEFAULTS: Mapping[str, Mapping[str, float]] = {
    "race": {"confidence": 0.99},
    "lazy": {"floor": 8, "slack": 2.0, "audit": 6},
}
"""Settings by part of `score.acceleration`; docs/performance.md has the measurements behind them."""


def settings_of(score: Mapping[str, Any]) -> dict[str, Any]:
    """`acceleration` of a `score` section, and the settings that belong to it, defaults filled in.

    Raises:
        InputError: unknown acceleration, or a setting that does nothing with it.
    """
    name = score["acceleration"]
    parts = [] if name == "none" else name.split("+")
    if name not in ("none", "lazy", "race", "lazy+race"):
        raise InputError(f"score.acceleration {name!r} is unknown; valid: none, lazy, race, lazy+race")
    for part, defaults in DEFAULTS.items():
        idle = [key for key in defaults if key in score and part not in parts]
        if idle:
            raise InputError(
                f"score.{idle[0]} does nothing with score.acceleration: {name}; remove it, or set acceleration: "
                f"{part} or lazy+race"
            )
    defaults = {key: value for part in parts for key, value in DEFAULTS[part].items()}
    return {"acceleration": name} | {key: score.get(key, value) for key, value in defaults.items()}


def accelerate(objective: Objective, settings: Mapping[str, Any]) -> Select:
    """How the candidates of a step are selected, from `settings_of`."""
    if settings["acceleration"] == "none":
        return lambda index, base, masks: Selection(tuple(objective(masks)))
    return Accelerated(
        objective,
        confidence=settings.get("confidence"),
        floor=settings.get("floor"),
        slack=settings.get("slack", 0.0),
        audit=settings.get("audit", 0),
    )


class Accelerated:
    """Selects the candidates of one search, step after step.

    Args:
        confidence: of the race's bounds, in (0.5, 1); None scores each candidate that enters on all rows.
        floor: candidates that enter a step at least; None lets all enter (racing alone).
        slack: margin of the lazy rule, in root mean squares of the differences between fresh and stale rises seen.
        audit: all candidates enter every `audit`-th step; 0 is never.
    """

    def __init__(
        self, objective: Objective, *, confidence: float | None, floor: int | None, slack: float, audit: int
    ) -> None:
        self._objective = objective
        self._confidence = confidence
        self._floor = floor
        self._slack = slack
        self._audit = audit
        self._rises: dict[Mask, float] = {}
        self._drifts: list[float] = []

    def __call__(self, index: int, base: Mask, masks: Sequence[Mask]) -> Selection:
        """The scores of one step; the lowest of those on all rows is the step's choice.

        Args:
            masks: base plus one candidate each, and the base itself where its score is wanted.
        """
        candidates = [mask for mask in masks if mask != base]
        lazy_choice = None
        if self._floor is None or index == 0:
            found = self._score(candidates, base)
        else:
            found = self._most_promising(candidates, base)
            if self._audit and index % self._audit == 0:
                lazy_choice = _best(found)
                rest = [mask for mask in candidates if mask not in found]
                found |= self._score([lazy_choice, *rest], base)
        if base in masks:
            found[base] = self._objective([base])[0]
        return Selection(tuple(found[mask] for mask in masks if mask in found), lazy_choice)

    def _most_promising(self, candidates: Sequence[Mask], base: Mask) -> dict[Mask, Score]:
        stale = {mask: self._rises[mask - base] for mask in candidates}
        waiting = sorted(candidates, key=stale.__getitem__)
        entering, waiting = waiting[: self._floor], waiting[self._floor :]
        found: dict[Mask, Score] = {}
        while entering:
            incumbent = [_best(found)] if found else []
            found |= self._score([*incumbent, *entering], base)
            best = self._rises[_best(found) - base]
            margin = self._slack * math.sqrt(float(np.mean(np.square(self._drifts))))
            entering = [mask for mask in waiting if stale[mask] - margin < best]
            waiting = [mask for mask in waiting if mask not in entering]
        return found

    def _score(self, masks: Sequence[Mask], base: Mask) -> dict[Mask, Score]:
        """Score masks, by a race or on all rows, and keep their rises over the base on the same rows."""
        if self._confidence is None:
            found = dict(zip(masks, self._objective(masks), strict=True))
        else:
            found = race(self._objective, masks, self._confidence)
        before = self._objective([base])[0].row_nll
        for mask, score in found.items():
            rise = score.nll - math.fsum(before[: score.rows_used]) / score.rows_used
            if mask - base in self._rises:
                self._drifts.append(rise - self._rises[mask - base])
            self._rises[mask - base] = rise
        return found


def _best(scores: Mapping[Mask, Score]) -> Mask:
    """The lowest of the masks scored on all rows, the first of equals."""
    complete = [score for score in scores.values() if score.rows_used == score.rows_total]
    return min(complete, key=lambda score: score.nll).mask
