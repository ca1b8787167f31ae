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
        rows = [[unit <= mask for unit in self.units] for mask in masks]
        return np.array(rows, float).reshape(len(masks), len(self.units))

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
    score_by_mask = {score.mask: score for score in scores}
    dense = score_by_mask.pop(DENSE)
    n = len(units)
    expansion = Surrogate(units, np.zeros(n), np.zeros((n, n)))
    m = expansion.indicators(list(score_by_mask))
    # The expansion at the dense model: single units, then pairs of units that were scored alone.
    for score, row in zip(score_by_mask.values(), m, strict=True):
        members = np.flatnonzero(row).tolist()
        # Units may overlap: a mask with one whole unit in it may hold other blocks, too.
        if len(members) == 1 and units[members[0]] == score.mask:
            expansion.linear[members] = score.rise_over(dense)
        elif len(members) == 2:
            singles = [score_by_mask.get(units[index]) for index in members]
            first, second = singles
            if first is not None and second is not None:
                # The same rows on both sides, or the difference would hold that of the rows.
                single_rises = first.rise_over(dense, score.rows_used)
                single_rises += second.rise_over(dense, score.rows_used)
                expansion.pairs[members, members[::-1]] = score.rise_over(dense) - single_rises
    # Ridge regression of what the expansion does not explain, in its dual form.
    rises = np.array([score.rise_over(dense) for score in score_by_mask.values()])
    residuals = rises - expansion.of(m)
    residuals[m.sum(axis=1) <= 2] = 0.0
    common = m @ m.T
    kernel = common + common * (common - 1) / 2
    ridge = []
    for score in score_by_mask.values():
        ridge.append(RIDGE * (dense.rows_used / score.rows_used) ** 2)
    weights = np.linalg.solve(kernel + np.diag(ridge), residuals)
    pairs = (m.T * weights) @ m
    np.fill_diagonal(pairs, 0.0)
    return Surrogate(units, expansion.linear + m.T @ weights, expansion.pairs + pairs)
