"""Ridge regression from sums over tokens: what is fitted, how strongly, and how well it does on
other tokens.

For features X [N, p] and residuals R [N, q], the change D [p, q] minimises

    |X D - R|^2 + s mean(diag(X^T X)) |D|^2

with s the strength. Everything comes from X^T X and X^T R, so the fitted tokens themselves are
never kept, and any strength costs one factorization more. Of few tokens that are held out, features
and residuals are kept. Strengths are compared in the dtype of the features; the change of the best
one is solved for in float64, without gains.

Where column j of X D counts g_j times, D_j = Q diag(g_j / (g_j^2 L + t)) Q^T c_j, with X^T X = Q
diag(L) Q^T, C = X^T R and t = s mean(diag(X^T X)) mean(g^2). One decomposition serves all columns
and strengths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from blockpruner.scoring.gram import add_gram_, factor, products

Solver = Callable[[float], Tensor]
"""The change D [p, q] for a strength."""


@dataclass
class Moments:
    """Sums over tokens."""

    gram: Tensor
    """X^T X [p, p]; until `symmetric_`, its upper triangle."""
    cross: Tensor
    """X^T R [p, q]."""
    is_rough: bool = False
    """As of `products`."""

    @classmethod
    def zero(
        cls,
        features: int,
        outputs: int,
        device: torch.device,
        dtype: torch.dtype = torch.float64,
        rough: bool = False,
    ) -> Moments:
        sizes = ((features, features), (features, outputs))
        gram, cross = (torch.zeros(size, dtype=dtype, device=device) for size in sizes)
        return cls(gram, cross, rough)

    def add(self, features: Tensor, residuals: Tensor) -> None:
        """Add tokens: features [N, p], residuals [N, q]."""
        with products(self.is_rough):
            add_gram_(self.gram, features)
            self.cross.addmm_(features.T, residuals)

    def solve(self, strength: float, dtype: torch.dtype = torch.float64) -> Tensor:
        """The change D [p, q] of these tokens, solved for in a dtype, or in float64 where that one
        is too narrow."""
        found, is_too_narrow = factor(self.gram, strength, dtype)
        if is_too_narrow and dtype is not torch.float64:
            return self.solve(strength)
        return torch.cholesky_solve(self.cross.to(dtype), found)

    def gained(self, gain: Tensor) -> Solver:
        """The changes D of these tokens where column j of X D counts gain_j times, [q]."""
        values, vectors = torch.linalg.eigh(self.gram)
        gain = gain.to(values)
        turned, squares = vectors.T @ self.cross * gain, gain.square()
        pull = self.gram.diagonal().mean() * squares.mean()
        return lambda strength: vectors @ (turned / (squares * values[:, None] + strength * pull))

    def error(self, features: Tensor, residuals: Tensor, change: Tensor) -> float:
        """|X D - R|^2 / |R|^2 of a change; below 1 it helps."""
        with products(self.is_rough):
            left = residuals - features @ change.to(features)
        total = float(residuals.double().square().sum())
        return float(left.double().square().sum()) / total if total else 1.0


def best_change(
    fitted: Moments,
    held_out: tuple[Tensor, Tensor],
    strengths: Sequence[float],
    near: float,
    gain: Tensor | None = None,
) -> tuple[Tensor, float, float]:
    """The change that does best on tokens that are held out, features [N, p] and residuals [N, q];
    its strength, and its error there.

    Args:
        strengths: from small to large. The error falls and then rises with the strength, so that it
            is followed from the one that is nearest to `near` to where its neighbours are no
            better. One alone is a first guess, which needs no float64.
        gain: how many times each column of X D counts; None: all once.
    """
    solve = partial(fitted.solve, dtype=fitted.gram.dtype) if gain is None else fitted.gained(gain)
    found: dict[int, float] = {}

    def tried(index: int) -> float:
        if index not in found:
            change = solve(strengths[index])
            found[index] = fitted.error(*held_out, change if gain is None else change * gain)
        return found[index]

    best, at = (
        -1,
        min(range(len(strengths)), key=lambda index: abs(math.log(strengths[index] / near))),
    )
    while best != at:
        best = at
        at = min(range(max(0, best - 1), min(best + 2, len(strengths))), key=tried)
    change = (
        fitted.solve(strengths[best])
        if gain is None and len(strengths) > 1
        else solve(strengths[best])
    )
    return change, strengths[best], found[best]
