"""What pruning costs by kind of text, and when one kind has lost too much.

Decides the rule, for every door: the choice among proposals, report, model card and commands.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from blockpruner.scoring.metrics import perplexity

UNEVEN = 1.2
"""One kind lost too much if its perplexity, times the dense model's, is more than so many times the
geometric mean of all kinds."""
LOST = (
    "The kind {!r} lost most: its perplexity is {:.2f} times the dense model's, {:.2f} times the"
    " mean of all kinds. If the model is for it, raise its share among the texts, or give more"
    " of it."
)
ALL = "all kinds"
"""What the line on all kinds is called."""

TIE = 1.02
"""Of models whose worst kinds lost about as much, within 2 %, the one with the lower mean is
better."""


@dataclass(frozen=True)
class Loss:
    """What a model has lost: its perplexity divided by the dense model's, for each kind of text."""

    kinds: Mapping[str, float]

    @property
    def mean(self) -> float:
        """The geometric mean of all kinds."""
        return math.exp(fmean(map(math.log, self.kinds.values())))

    @property
    def worst_kind(self) -> str:
        return max(self.kinds, key=self.kinds.__getitem__)

    @property
    def worst(self) -> float:
        return self.kinds[self.worst_kind]

    def __str__(self) -> str:
        """As in "mean 1.12 times the dense model's perplexity, worst 1.20 (Python)"."""
        words = f"mean {self.mean:.2f} times the dense model's perplexity"
        return (
            f"{words}, worst {self.worst:.2f} ({self.worst_kind})" if len(self.kinds) > 1 else words
        )

    @classmethod
    def of(cls, kinds: Mapping[str, Mapping[str, float]]) -> "Loss":
        """From the perplexities `dense` and `after` of each kind, as a plan has them."""
        return cls({kind: own["after"] / own["dense"] for kind, own in kinds.items()})


def best_loss(found: Mapping[str, Loss]) -> str:
    """The name of the model that lost least: by its worst kind, and by the mean where these are
    within `TIE`."""
    least = min(loss.worst for loss in found.values())
    near = [name for name, loss in found.items() if loss.worst <= TIE * least]
    return min(near, key=lambda name: found[name].mean)


def rows_by_kind(row_nll: Sequence[float], kinds: Sequence[str]) -> dict[str, list[float]]:
    """The mean NLL of each row, by its kind; nothing where rows have no kinds."""
    found: dict[str, list[float]] = {}
    for nll, kind in zip(row_nll, kinds, strict=False):
        found.setdefault(kind, []).append(nll)
    return found


def perplexities(row_nll: Sequence[float], kinds: Sequence[str]) -> dict[str, float]:
    return {kind: perplexity(fmean(own)) for kind, own in rows_by_kind(row_nll, kinds).items()}


def in_words(found: Mapping[str, Mapping[str, float]]) -> tuple[tuple[tuple[str, str], ...], str]:
    """What each kind lost, from its perplexities `dense` and `after`, and all of them; and the
    warning of `uneven`."""
    loss, words = Loss.of(found), "{dense:,.2f} dense, {after:,.2f} after, {ratio:.2f} times"
    lost = [(kind, words.format(**own, ratio=loss.kinds[kind])) for kind, own in found.items()]
    return tuple([*lost, (ALL, str(loss))] if len(lost) > 1 else lost), uneven(loss.kinds)


def uneven(ratios: Mapping[str, float]) -> str:
    """A warning on the kind that lost more than `UNEVEN` allows, from perplexities times dense, or
    an empty text."""
    if not ratios:
        return ""
    loss = Loss(ratios)
    excess = loss.worst / loss.mean
    return LOST.format(loss.worst_kind, loss.worst, excess) if excess > UNEVEN else ""
