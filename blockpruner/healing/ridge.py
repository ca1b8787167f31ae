"""Ridge regression from sums over tokens.

For features X [N, p] and residuals R [N, q], the change D [p, q] minimises

    |X D - R|^2 + s mean(diag(X^T X)) |D|^2

with the ridge penalty s. Everything comes from X^T X and X^T R, so the fitted tokens themselves are
not kept, and another penalty costs one factorization. Features and residuals of the few held-out
tokens are kept. Penalties are compared in the dtype of the features; the change for the best one is
solved for in float64, without gains.

If column j of X D counts g_j times, D_j = Q diag(g_j / (g_j^2 L + t)) Q^T c_j, with X^T X = Q
diag(L) Q^T, C = X^T R and t = s mean(diag(X^T X)) mean(g^2). One decomposition serves all columns
and penalties.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from blockpruner.fitting.gram import add_gram_, cholesky, fast_matmul

Solver = Callable[[float], Tensor]
"""The change D [p, q] for a ridge penalty."""


@dataclass
class Moments:
    """Sums over tokens."""

    gram: Tensor
    """X^T X [p, p]; until `symmetric_`, its upper triangle."""
    cross: Tensor
    """X^T R [p, q]."""
    is_fast: bool = False
    """As in `fast_matmul`."""

    @classmethod
    def zero(
        cls,
        features: int,
        outputs: int,
        device: torch.device,
        dtype: torch.dtype = torch.float64,
        is_fast: bool = False,
    ) -> Moments:
        """The sums of no token."""
        gram = torch.zeros(features, features, dtype=dtype, device=device)
        cross = torch.zeros(features, outputs, dtype=dtype, device=device)
        return cls(gram, cross, is_fast)

    def add(self, features: Tensor, residuals: Tensor) -> None:
        """Add tokens: features [N, p], residuals [N, q]."""
        with fast_matmul(self.is_fast):
            add_gram_(self.gram, features)
            self.cross.addmm_(features.T, residuals)

    def solve(self, penalty: float, dtype: torch.dtype = torch.float64) -> Tensor:
        """The change D [p, q], solved for in a dtype, or in float64 if that dtype is too narrow."""
        factor, is_too_narrow = cholesky(self.gram, penalty, dtype)
        if is_too_narrow and dtype is not torch.float64:
            return self.solve(penalty)
        return torch.cholesky_solve(self.cross.to(dtype), factor)

    def solver_with_gains(self, gain: Tensor) -> Solver:
        """The changes D if column j of X D counts gain_j times, [q]."""
        eigenvalues, eigenvectors = torch.linalg.eigh(self.gram)
        gain = gain.to(eigenvalues)
        squares = gain.square()
        rotated = eigenvectors.T @ self.cross * gain
        scale = self.gram.diagonal().mean() * squares.mean()

        def solve(penalty: float) -> Tensor:
            rotated_change = rotated / (squares * eigenvalues[:, None] + penalty * scale)
            change: Tensor = eigenvectors @ rotated_change
            return change

        return solve

    def error(self, features: Tensor, residuals: Tensor, change: Tensor) -> float:
        """|X D - R|^2 / |R|^2 of a change; below 1 it helps."""
        with fast_matmul(self.is_fast):
            remaining = residuals - features @ change.to(features)
        total = float(residuals.double().square().sum())
        if not total:
            return 1.0
        return float(remaining.double().square().sum()) / total


def best_change(
    moments: Moments,
    heldout: tuple[Tensor, Tensor],
    penalties: Sequence[float],
    start: float,
    gain: Tensor | None = None,
) -> tuple[Tensor, float, float]:
    """The change with the least error on held-out tokens, features [N, p] and residuals [N, q]; its
    penalty, and its error there.

    Args:
        penalties: from small to large. A single one is a first guess, which needs no float64.
        start: the penalty near which the search begins.
        gain: how many times each column of X D counts; None: once.
    """
    solve: Solver
    if gain is None:
        solve = partial(moments.solve, dtype=moments.gram.dtype)
    else:
        solve = moments.solver_with_gains(gain)
    errors: dict[int, float] = {}

    def heldout_error(index: int) -> float:
        if index not in errors:
            change = solve(penalties[index])
            scaled_change = change if gain is None else change * gain
            errors[index] = moments.error(*heldout, scaled_change)
        return errors[index]

    distances = [abs(math.log(penalty / start)) for penalty in penalties]
    candidate = distances.index(min(distances))
    best = -1
    # The error falls and then rises with the penalty: go downhill until no neighbour is better.
    while candidate != best:
        best = candidate
        neighbours = range(max(0, best - 1), min(best + 2, len(penalties)))
        candidate = min(neighbours, key=heldout_error)
    if gain is None and len(penalties) > 1:
        solve = moments.solve
    return solve(penalties[best]), penalties[best], errors[best]
