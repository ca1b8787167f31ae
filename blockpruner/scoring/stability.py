"""How firmly calibration rows decide a choice among candidates.

Decides which candidates count as rivals of the chosen one, and how rows are resampled. All it needs
are the losses of single rows, which every search leaves in its tables.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import special

from blockpruner.core.blocks import Mask

LEVEL = 0.95
"""The level of the interval that separates two candidates."""

RESAMPLES = 2000
"""The standard error of a share is then at most 1.1 points. The draws are the same in every step
and every run."""

ROUNDING = 1e-12
"""Equal losses may differ by less than this."""


@dataclass(frozen=True)
class Stability:
    """What other calibration rows might have chosen in one step of a search."""

    rivals: tuple[Mask, ...]
    """Those of them that cannot be told from the chosen one: 0 is in the 95 % interval of the
    paired t test."""
    kept: float
    """In which share of resampled row sets, of as many rows, the chosen candidate has the lowest
    loss again."""


def stability(losses: Mapping[Mask, Sequence[float]], chosen: Mask) -> Stability | None:
    """Compare the chosen candidate with the others. None where the rows tell nothing: there is one,
    there is nothing to compare, or something else than the lowest loss of these rows was chosen.

        d = l_other - l_chosen, row by row; a rival has mean(d) <= t[n-1, 0.975] sd(d) / sqrt(n)

    The losses are of each candidate on the first rows, in the order of ties. Those with the most
    rows are compared, on the rows that they share with the chosen one. One that is infinite is
    not."""
    rivals_rows = [len(row_losses) for mask, row_losses in losses.items() if mask != chosen]
    rows = min(len(losses.get(chosen, ())), max(rivals_rows, default=0))
    shared = [
        mask
        for mask, row_losses in losses.items()
        if len(row_losses) >= rows and math.inf not in row_losses
    ]
    if rows < 2 or chosen not in shared:
        return None
    chosen_index = shared.index(chosen)
    row_losses = np.array([losses[mask][:rows] for mask in shared])
    d = row_losses - row_losses[chosen_index]
    means = d.mean(axis=1)
    errors = d.std(axis=1, ddof=1) / math.sqrt(rows)
    # The search took another than the lowest loss, as with a price: these rows do not decide.
    if means.min() < -ROUNDING:
        return None
    close = means <= special.stdtrit(rows - 1, (1 + LEVEL) / 2) * errors + ROUNDING
    pairs = zip(shared, close, strict=True)
    rivals = tuple(mask for mask, is_close in pairs if is_close and mask != chosen)
    resampled_means = _counts(rows) @ d.T / rows
    share = np.mean(resampled_means.argmin(axis=1) == chosen_index)
    return Stability(rivals, float(share))


@lru_cache(maxsize=8)
def _counts(rows: int) -> np.ndarray:
    """How often each row is drawn, [RESAMPLES, rows]."""
    draws = np.random.default_rng(0).multinomial(rows, np.full(rows, 1 / rows), RESAMPLES)
    return draws.astype(float)
