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

PerplexitiesByKind = Mapping[str, Mapping[str, float]]
"""The perplexities `dense` and `after` of each kind, as a plan has them."""


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
        mean = f"mean {self.mean:.2f} times the dense model's perplexity"
        if len(self.kinds) == 1:
            return mean
        return f"{mean}, worst {self.worst:.2f} ({self.worst_kind})"

    @classmethod
    def of(cls, perplexities: PerplexitiesByKind) -> "Loss":
        ratios = {kind: pair["after"] / pair["dense"] for kind, pair in perplexities.items()}
        return cls(ratios)


def best_loss(losses: Mapping[str, Loss]) -> str:
    """The name of the model that lost least by its worst kind. Of models within `TIE` of it, the
    one with the lowest mean."""
    least_worst = min(loss.worst for loss in losses.values())
    tied = [name for name, loss in losses.items() if loss.worst <= TIE * least_worst]
    return min(tied, key=lambda name: losses[name].mean)


def rows_by_kind(row_nll: Sequence[float], kinds: Sequence[str]) -> dict[str, list[float]]:
    """The mean NLL of each row, by its kind; nothing where rows have no kinds."""
    rows: dict[str, list[float]] = {}
    # Rows of a single kind have no kinds at all, and zip ends at once.
    for nll, kind in zip(row_nll, kinds, strict=False):
        rows.setdefault(kind, []).append(nll)
    return rows


def perplexities(row_nll: Sequence[float], kinds: Sequence[str]) -> dict[str, float]:
    rows = rows_by_kind(row_nll, kinds)
    return {kind: perplexity(fmean(losses)) for kind, losses in rows.items()}


def in_words(perplexities: PerplexitiesByKind) -> tuple[tuple[tuple[str, str], ...], str]:
    """A label and a text for each kind and for all of them, and the warning of `uneven`."""
    loss = Loss.of(perplexities)
    lines = []
    for kind, pair in perplexities.items():
        ratio = loss.kinds[kind]
        text = f"{pair['dense']:,.2f} dense, {pair['after']:,.2f} after, {ratio:.2f} times"
        lines.append((kind, text))
    if len(lines) > 1:
        lines.append((ALL, str(loss)))
    return tuple(lines), uneven(loss.kinds)


def uneven(ratios: Mapping[str, float]) -> str:
    """A warning on the kind that lost more than `UNEVEN` allows, from perplexities times dense, or
    an empty text."""
    if not ratios:
        return ""
    loss = Loss(ratios)
    excess = loss.worst / loss.mean
    if excess <= UNEVEN:
        return ""
    return LOST.format(loss.worst_kind, loss.worst, excess)
