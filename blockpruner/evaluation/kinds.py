"""What pruning costs by kind of text, and when one kind has lost too much.

Decides the rule, for every door: report, model card and commands.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from blockpruner.scoring.metrics import perplexity

UNEVEN = 1.2
"""One kind lost too much if its perplexity, times the dense model's, is more than so many times the geometric mean of
all kinds."""
LOST = (
    "The kind {!r} lost most: its perplexity is {:.2f} times the dense model's, {:.2f} times the mean of all kinds. "
    "If the model is for it, raise its share among the texts, or give more of it."
)


def rows_by_kind(row_nll: Sequence[float], kinds: Sequence[str]) -> dict[str, list[float]]:
    """The mean NLL of each row, by its kind; nothing where rows have no kinds."""
    found: dict[str, list[float]] = {}
    for nll, kind in zip(row_nll, kinds, strict=False):
        found.setdefault(kind, []).append(nll)
    return found


def perplexities(row_nll: Sequence[float], kinds: Sequence[str]) -> dict[str, float]:
    return {kind: perplexity(fmean(own)) for kind, own in rows_by_kind(row_nll, kinds).items()}


def in_words(found: Mapping[str, Mapping[str, float]]) -> tuple[tuple[tuple[str, str], ...], str]:
    """What each kind lost, from its perplexities `dense` and `after`; and the warning of `uneven`."""
    ratios = {kind: own["after"] / own["dense"] for kind, own in found.items()}
    words = "{dense:,.2f} dense, {after:,.2f} after, {ratio:.2f} times"
    return tuple((kind, words.format(**own, ratio=ratios[kind])) for kind, own in found.items()), uneven(ratios)


def uneven(ratios: Mapping[str, float]) -> str:
    """A warning on the kind that lost more than `UNEVEN` allows, from perplexities times dense, or an empty text."""
    worst = max(ratios, key=ratios.__getitem__, default="")
    excess = ratios[worst] / math.exp(fmean(map(math.log, ratios.values()))) if ratios else 0.0
    return LOST.format(worst, ratios[worst], excess) if excess > UNEVEN else ""
