"""A surrogate: a quadratic function of masks, fitted to the losses that a search has asked for.

    E(m) = sum_i a_i m_i + sum_{i<j} b_ij m_i m_j,    E(0) = 0, m_i = 1 where unit i is removed

The expansion at the dense model comes first: a_i = L({i}) - L(0), b_ij = L({i,j}) - L({i}) - L({j})
+ L(0), where these masks are among the facts, else 0. What is left of the other facts is fitted by
ridge regression of all coefficients, in its dual form with the kernel k(m, m') = c + c (c - 1) / 2,
c the number of units that both masks remove.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from blockpruner.core.blocks import DENSE, Mask
from blockpruner.scoring.objectives import MaskScore

RIDGE = 1e-4
"""The variance of what a quadratic function cannot explain of a mask scored on all N rows, over the
variance of its coefficients. On k rows it is (N / k)^2 times as large."""


@dataclass(frozen=True)
class Surrogate:
    """E, over units."""

    units: Sequence[Mask]
    linear: np.ndarray
    """a [n]."""
    pairs: np.ndarray
    """b [n, n], symmetric, with a zero diagonal."""

    def indicators(self, masks: Sequence[Mask]) -> np.ndarray:
        """m [masks, n]."""
        return np.array([[unit <= mask for unit in self.units] for mask in masks], float).reshape(
            -1, len(self.units)
        )

    def __call__(self, masks: Sequence[Mask]) -> np.ndarray:
        """E [masks], in the unit of the losses."""
        return self.of(self.indicators(masks))

    def of(self, m: np.ndarray) -> np.ndarray:
        """E of indicators [masks, n]."""
        values: np.ndarray = m @ self.linear + ((m @ self.pairs) * m).sum(axis=1) / 2
        return values


def fit(units: Sequence[Mask], scores: Collection[MaskScore]) -> Surrogate:
    """Fit E to the rises of the loss over the dense model, each on the rows that its mask was
    scored on. The scores are of different masks, the dense model on all rows among them."""
    by_mask = {score.mask: score for score in scores}
    dense = by_mask.pop(DENSE)
    found = Surrogate(units, np.zeros(len(units)), np.zeros((len(units), len(units))))
    m = found.indicators(list(by_mask))
    for score, row in zip(by_mask.values(), m, strict=True):
        members = np.flatnonzero(row).tolist()
        parts = [by_mask.get(units[i]) for i in members]
        if parts == [score]:
            found.linear[members] = score.rise_over(dense)
        elif len(parts) == 2 and None not in parts:
            apart = sum(part.rise_over(dense, score.rows_used) for part in parts if part)
            found.pairs[members, members[::-1]] = score.rise_over(dense) - apart
    left = np.array([score.rise_over(dense) for score in by_mask.values()]) - found.of(m)
    left[m.sum(axis=1) <= 2] = 0.0
    common = m @ m.T
    ridge = [RIDGE * (dense.rows_used / score.rows_used) ** 2 for score in by_mask.values()]
    weights = np.linalg.solve(common + common * (common - 1) / 2 + np.diag(ridge), left)
    pairs = (m.T * weights) @ m
    np.fill_diagonal(pairs, 0.0)
    return Surrogate(units, found.linear + m.T @ weights, found.pairs + pairs)
