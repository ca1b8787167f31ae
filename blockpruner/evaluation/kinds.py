"""What pruning costs by kind of text, and when one kind has lost too much.

Decides the rule, for every door: report, model card and commands.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from blockpruner.scoring.metrics import perplexity

UNEVEN = 1.2
"""One kind lost too much if its perplexity, times the dense model's, is more than so many times the geometric mean of
all kinds. Draws of calibration texts of the same kinds differ by less."""


def rows_by_kind(row_nll: Sequence[float], kinds: Sequence[str]) -> dict[str, list[float]]:
    """The mean NLL of each row, by its kind; nothing where rows have no kinds."""
    found: dict[str, list[float]] = {}
    for nll, kind in zip(row_nll, kinds, strict=False):
        found.setdefault(kind, []).append(nll)
    return found


def perplexities(row_nll: Sequence[float], kinds: Sequence[str]) -> dict[str, float]:
    """The perplexity of each kind."""
    return {kind: perplexity(fmean(own)) for kind, own in rows_by_kind(row_nll, kinds).items()}


def times_dense(told: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The perplexity of each kind `after`, times `dense`."""
    return {kind: found["after"] / found["dense"] for kind, found in told.items()}


def uneven(ratios: Mapping[str, float]) -> str:
    """A warning on the kind that lost more than `UNEVEN` allows; empty where none did.

    Args:
        ratios: perplexities by kind, each times the dense model's.
    """
    if not ratios:
        return ""
    worst = max(ratios, key=ratios.__getitem__)
    excess = ratios[worst] / math.exp(fmean(map(math.log, ratios.values())))
    if excess <= UNEVEN:
        return ""
    return (
        f"{worst.capitalize()} lost most: {ratios[worst]:.2f} times dense, {excess:.2f} times the mean of all kinds. "
        "Give texts of that kind, if the model is for it."
    )
