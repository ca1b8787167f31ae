"""Quadratic search: single units and pairs, scored once, predict every mask; the best predicted ones are scored.

It follows the Ising formulation of block pruning (arXiv 2602.00161). The trials of singles and pairs serve every budget
of every resource. A budget is then solved by descent from many starts, the surrogate (`surrogate`) is fitted anew with
what the best masks turned out to be, and so on for some rounds. Pairs of units that are cheap for their parameters come
first, and of these the adjacent ones. Pairs that are not scored are taken to add up (b = 0).
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from itertools import combinations

import numpy as np
from pydantic import Field

from blockpruner.core.blocks import DENSE, Mask
from blockpruner.core.options import Options
from blockpruner.scoring.accelerate import price
from blockpruner.scoring.objectives import MaskScore
from blockpruner.search.iteration import Iteration
from blockpruner.search.problem import Problem
from blockpruner.search.space import Space, goal_of_problem
from blockpruner.search.surrogate import Surrogate, fit

STARTS = 20
"""From how many masks of each composition the surrogate descends."""

ROUNDING = 1e-12
"""A step lowers the energy by more."""


class QuadraticOptions(Options):
    pairs: int = Field(default=400, ge=0)
    """How many pairs of units are scored, at most."""
    rows: int | None = Field(default=None, ge=1)
    """On how many of the first rows a pair is scored; null is all."""
    candidates: int = Field(default=16, ge=1)
    """How many masks are scored in a round, those with the lowest prediction."""
    rounds: int = Field(default=4, ge=1)
    """How many rounds there are; each fits the surrogate to all that is known before."""
    seed: int = 42
    """The seed of the starts of descents."""


def quadratic(problem: Problem, options: QuadraticOptions) -> Iterator[Iteration]:
    """Yield an iteration for the single units, one for the pairs, and one for each round, which chooses the best mask.

    Raises:
        InputError: the budget is nearest to removing nothing.
    """
    space, chance = Space(problem.units, goal_of_problem(problem)), random.Random(options.seed)
    dense, *singles = problem.ask([DENSE, *problem.units])
    yield Iteration(0, (dense, *singles), (None, *problem.units), 0)
    chosen = pairs(problem, [score.loss - dense.loss for score in singles])[: options.pairs]
    joint = problem.ask(chosen, min(options.rows or problem.rows, problem.rows))
    yield Iteration(1, (dense, *joint), (None,) * (1 + len(joint)), 0)
    scores = {score.mask: score for score in (dense, *singles, *joint)}
    best: MaskScore | None = None
    tried: set[Mask] = set()
    for index in range(2, 2 + options.rounds):
        energy = fit(problem.units, scores.values())
        masks = lowest(energy, space, options.candidates, tried, chance)
        if not masks:
            break
        found = [] if best else problem.ask(masks[:1])
        standing = best or found[0]
        found += problem.select.challenge(standing, masks[len(found) :])
        scores |= {score.mask: score for score in found}
        shown = [*([best] if best else []), *found]
        best = min((score for score in shown if score.is_complete), key=lambda score: score.loss)
        tried.update(masks)
        yield Iteration(index, tuple(shown), (None,) * len(shown), shown.index(best))


def pairs(problem: Problem, rises: list[float]) -> list[Mask]:
    """All pairs of units, those first that matter most: of units that are cheap for their parameters, or adjacent."""
    units, costs = problem.units, problem.resources["parameters"]
    prices = [price(rise, costs.ratio(unit)) for rise, unit in zip(rises, units, strict=True)]
    rank = {unit: place for place, (_, unit) in enumerate(sorted(zip(prices, units, strict=True), key=lambda x: x[0]))}
    depth = {unit: min((block.layer, block.order) for block in unit) for unit in units}
    along = {unit: place for place, unit in enumerate(sorted(units, key=depth.__getitem__))}

    def order(pair: tuple[Mask, Mask]) -> float:
        a, b = pair
        return max(rank[a], rank[b]) / (2 if abs(along[a] - along[b]) == 1 else 1)

    return [a | b for a, b in sorted(combinations(units, 2), key=order)]


def lowest(energy: Surrogate, space: Space, count: int, known: Collection[Mask], chance: random.Random) -> list[Mask]:
    """Masks of the space with the lowest energy, as far as descents find them, lowest first.

    Each composition of the space is searched from several masks of it: the one that is best if units just add up, and
    random ones.

    Args:
        known: not these.
    """
    place = {unit: i for i, unit in enumerate(energy.units)}
    classes = [np.array([place[unit] for unit in members]) for members in space.classes]
    alike = np.zeros((len(place), len(place)), bool)
    for members in classes:
        alike[np.ix_(members, members)] = True
    seen: dict[bytes, float] = {}  # by the kept units: of equals the one comes first that removes the first unit
    for counts in space.compositions:
        for start in range(STARTS):
            m = np.zeros(len(place))
            for members, size in zip(classes, counts, strict=True):
                order = members[np.argsort(energy.linear[members], kind="stable")].tolist()
                m[chance.sample(order, size) if start else order[:size]] = 1
            seen |= {(other == 0).tobytes(): value for other, value in _descent(energy, m, alike, count)}
    found = []
    for key in sorted(seen, key=lambda key: (seen[key], key)):
        kept = np.frombuffer(key, bool)
        mask = DENSE.union(*(unit for unit, is_kept in zip(energy.units, kept, strict=True) if not is_kept))
        if mask not in known:
            found.append(mask)
        if len(found) == count:
            break
    return found


def _descent(energy: Surrogate, m: np.ndarray, alike: np.ndarray, count: int) -> Iterator[tuple[np.ndarray, float]]:
    """Indicators and energies on the way down from a mask, and of the lowest `count` neighbours of where it ends.

    A step exchanges two units of a class so that E falls the most.
    """
    value = float(energy.of(m[None])[0])
    while True:
        yield m, value
        slope = energy.linear + energy.pairs @ m
        change = slope[None, :] - slope[:, None] - energy.pairs  # of restoring i and removing j
        change = np.where(alike & (m[:, None] > 0) & (m[None, :] == 0), change, np.inf)
        least = int(np.argmin(change))
        if change.flat[least] >= -ROUNDING:
            break
        m, value = _exchanged(m, least), value + float(change.flat[least])
    for index in np.argsort(change, axis=None, kind="stable")[:count].tolist():
        if np.isfinite(change.flat[index]):
            yield _exchanged(m, index), value + float(change.flat[index])


def _exchanged(m: np.ndarray, index: int) -> np.ndarray:
    """Indicators after the exchange that has this place in the matrix [restored, removed]."""
    other = m.copy()
    restored, removed = divmod(index, len(m))
    other[restored], other[removed] = 0, 1
    return other
