"""How firmly calibration rows decide a choice among candidates.

Decides which candidates count as rivals of the chosen one, and how rows are resampled. All it needs are the losses of
single rows, which every search leaves in its tables.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from blockpruner.core.blocks import Mask

LEVEL = 0.95
"""The level of the interval that separates two candidates."""

RESAMPLES = 2000
"""The standard error of a share is then at most 1.1 points. The draws are the same in every step and every run."""

ROUNDING = 1e-12
"""Equal losses may differ by less than this."""


@dataclass(frozen=True)
class Stability:
    """What other calibration rows might have chosen in one step of a search."""

    rows: int
    """On how many rows the candidates are compared."""
    compared: int
    """How many candidates beside the chosen one were scored on all of these rows."""
    rivals: tuple[Mask, ...]
    """Those of them that cannot be told from the chosen one: 0 is in the 95 % interval of the paired t test."""
    margin: float
    """How much more the mean loss of the next candidate is, in the loss's units."""
    kept: float
    """In which share of resampled row sets, of as many rows, the chosen candidate has the lowest loss again."""


def stability(losses: Mapping[Mask, Sequence[float]], chosen: Mask) -> Stability | None:
    """Compare the chosen candidate with the others.

        d = l_other - l_chosen, row by row; a rival has mean(d) <= t[n-1, 0.975] sd(d) / sqrt(n)

    Args:
        losses: of each candidate on the first rows, in the order of ties. Those with the most rows are compared, on the
            rows that they share with the chosen one.

    Returns:
        None where the rows tell nothing: there is one, there is nothing to compare, or something else than the lowest
        loss of these rows was chosen.
    """
    rows = min(
        len(losses.get(chosen, ())), max((len(own) for mask, own in losses.items() if mask != chosen), default=0)
    )
    shared = [mask for mask, own in losses.items() if len(own) >= rows]
    if rows < 2:
        return None
    d = differences([losses[mask][:rows] for mask in shared], shared.index(chosen))
    means, errors = d.mean(axis=1), d.std(axis=1, ddof=1) / math.sqrt(rows)
    if means.min() < -ROUNDING:
        return None
    close = means <= special.stdtrit(rows - 1, (1 + LEVEL) / 2) * errors + ROUNDING
    return Stability(
        rows=rows,
        compared=len(shared) - 1,
        rivals=tuple(mask for mask, is_close in zip(shared, close, strict=True) if is_close and mask != chosen),
        margin=float(np.delete(means, shared.index(chosen)).min()),
        kept=float(np.mean((resampled(d)).argmin(axis=1) == shared.index(chosen))),
    )


def differences(losses: ArrayLike, chosen: int) -> np.ndarray:
    """Losses less those of the chosen candidate, [candidates, rows]."""
    found = np.array(losses)
    less: np.ndarray = found - found[chosen]
    return less


def resampled(d: np.ndarray) -> np.ndarray:
    """Means of d [candidates, rows] over resampled rows, [RESAMPLES, candidates]."""
    means: np.ndarray = _counts(d.shape[1]) @ d.T / d.shape[1]
    return means


@lru_cache(maxsize=8)
def _counts(rows: int) -> np.ndarray:
    """How often each row is drawn, [RESAMPLES, rows]."""
    draws = np.random.default_rng(0).multinomial(rows, np.full(rows, 1 / rows), RESAMPLES)
    return draws.astype(float)
