"""A surrogate: a quadratic function of masks, fitted to the losses that a search has asked for.

    E(m) = sum_i a_i m_i + sum_{i<j} b_ij m_i m_j,    E(0) = 0, m_i = 1 where unit i is removed

The expansion at the dense model comes first: a_i = L({i}) - L(0), b_ij = L({i,j}) - L({i}) - L({j}) + L(0), where these
masks are among the facts, else 0. What is left of the other facts is fitted by ridge regression of all coefficients, in
its dual form with the kernel k(m, m') = c + c (c - 1) / 2, c the number of units that both masks remove.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from blockpruner.core.blocks import DENSE, Mask
from blockpruner.scoring.objectives import MaskScore

RIDGE = 1e-4
"""The variance of what a quadratic function cannot explain of a mask scored on all N rows, over the variance of its
coefficients. On k rows it is (N / k)^2 times as large."""


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
        return np.array([[unit <= mask for unit in self.units] for mask in masks], float).reshape(-1, len(self.units))

    def __call__(self, masks: Sequence[Mask]) -> np.ndarray:
        """E [masks], in the unit of the losses."""
        return self.of(self.indicators(masks))

    def of(self, m: np.ndarray) -> np.ndarray:
        """E of indicators [masks, n]."""
        values: np.ndarray = m @ self.linear + ((m @ self.pairs) * m).sum(axis=1) / 2
        return values


def fit(units: Sequence[Mask], scores: Collection[MaskScore]) -> Surrogate:
    """Fit E to the rises of the loss over the dense model, each on the rows that its mask was scored on.

    Args:
        scores: of different masks, the dense model on all rows among them.
    """
    (dense,) = (score.row_loss for score in scores if score.mask == DENSE)
    others = [score for score in scores if score.mask != DENSE]
    y = np.array([score.loss - math.fsum(dense[: score.rows_used]) / score.rows_used for score in others])
    found = Surrogate(units, np.zeros(len(units)), np.zeros((len(units), len(units))))
    m = found.indicators([score.mask for score in others])
    sizes = m.sum(axis=1)
    for row in np.flatnonzero(sizes == 1):
        found.linear[m[row] > 0] = y[row]
    for row in np.flatnonzero(sizes == 2):
        i, j = np.flatnonzero(m[row])
        found.pairs[i, j] = found.pairs[j, i] = y[row] - found.linear[i] - found.linear[j]
    common = m @ m.T
    ridge = [RIDGE * (len(dense) / score.rows_used) ** 2 for score in others]
    left = y - found.of(m)
    weights = np.linalg.solve(common + common * (common - 1) / 2 + np.diag(ridge), left)
    pairs = (m.T * weights) @ m
    np.fill_diagonal(pairs, 0.0)
    return Surrogate(units, found.linear + m.T @ weights, found.pairs + pairs)
