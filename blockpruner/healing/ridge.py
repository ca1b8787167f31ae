"""Ridge regression from sums over tokens: what is fitted, how strongly, and how well it does on other tokens.

For features X [N, p] and residuals R [N, q], the change D [p, q] minimises

    |X D - R|^2 + s mean(diag(X^T X)) |D|^2

with s the strength. Everything comes from X^T X, X^T R and |R|^2, so the tokens themselves are never kept, and any
strength costs one factorization more.

Where column j of X D counts g_j times, D_j = Q diag(g_j / (g_j^2 L + t)) Q^T c_j, with X^T X = Q diag(L) Q^T, C = X^T R
and t = s mean(diag(X^T X)) mean(g^2). One decomposition serves all columns and strengths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Moments:
    """Sums over tokens, float64."""

    gram: Tensor
    """X^T X [p, p]."""
    cross: Tensor
    """X^T R [p, q]."""
    total: float = 0.0
    """|R|^2."""

    @classmethod
    def zero(cls, features: int, outputs: int, device: torch.device) -> Moments:
        sizes = ((features, features), (features, outputs))
        gram, cross = (torch.zeros(size, dtype=torch.float64, device=device) for size in sizes)
        return cls(gram, cross)

    def add(self, features: Tensor, residuals: Tensor) -> None:
        """Add tokens: features [N, p], residuals [N, q], float32 or wider. Products are taken in their dtype."""
        self.gram += features.T @ features
        self.cross += features.T @ residuals
        self.total += float(residuals.double().square().sum())

    def solve(self, strength: float) -> Tensor:
        """The change D [p, q] of these tokens."""
        shifted = self.gram.clone()
        shifted.diagonal().add_(strength * self.gram.diagonal().mean())
        factor = torch.linalg.cholesky(shifted)
        del shifted
        return torch.cholesky_solve(self.cross, factor)

    def solutions(self, strengths: Sequence[float], gain: Tensor) -> Iterator[Tensor]:
        """The changes D of these tokens where column j of X D counts gain_j times, [q]."""
        values, vectors = torch.linalg.eigh(self.gram)
        turned, squares = vectors.T @ self.cross * gain, gain.square()
        pull = self.gram.diagonal().mean() * squares.mean()
        for strength in strengths:
            yield vectors @ (turned / (squares * values[:, None] + strength * pull))

    def error(self, change: Tensor) -> float:
        """|X D - R|^2 / |R|^2 of a change over these tokens; below 1 it helps."""
        moved = (change * (self.gram @ change - 2 * self.cross)).sum()
        return 1.0 + float(moved) / self.total if self.total else 1.0


def best_change(
    fitted: Moments, held_out: Moments, strengths: Sequence[float], gain: Tensor | None = None
) -> tuple[Tensor, float, float]:
    """The change that does best on tokens that it was not fitted to, its strength, and its error there.

    Args:
        gain: how many times each column of X D counts; None: all once.
    """
    best: tuple[Tensor, float, float] | None = None
    changes = map(fitted.solve, strengths) if gain is None else fitted.solutions(strengths, gain)
    for strength, change in zip(strengths, changes, strict=True):
        error = held_out.error(change if gain is None else change * gain)
        if best is None or error < best[2]:
            best = change, strength, error
    assert best is not None
    return best
