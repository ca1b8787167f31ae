"""What a search can minimise: METRICS, one row each, with its words and its function.

A loss is a fact about a mask. An influence is a fact about a unit, given what a base mask has
removed already. The functions are in `losses` and `influences`. No torch here.
"""

import math
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from blockpruner.core.registry import Registry


@dataclass(frozen=True)
class Metric:
    """A number that a search minimises; lower means a better mask, or a less important unit."""

    name: str
    """As in `score.metric` of a run file."""
    function: str | Callable[..., Any]
    """A `losses.Loss` or an `influences.Influence`; text, "module:function", is imported when it is
    first used."""
    title: str
    formula: str
    """The formula, and the paper that it is from."""
    influence: bool = False
    """Computed from the hidden states of one forward pass of the model as it is, without removing
    the unit."""
    reference: bool = False
    """Compares with the logits of the dense model."""
    version: int = 0
    """Raise it when the function gives other numbers; no number of before is used again."""

    @property
    def compute(self) -> Callable[..., Any]:
        return (
            pkgutil.resolve_name(self.function) if isinstance(self.function, str) else self.function
        )


def perplexity(nll: float) -> float:
    """exp(nll), infinite where no number is so large."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


LOSSES, INFLUENCES = "blockpruner.scoring.losses:", "blockpruner.scoring.influences:"

NLL = Metric(
    "perplexity",
    LOSSES + "token_nll",
    "perplexity",
    "the mean of -log p(token), the logarithm of perplexity (arXiv 2406.10594)",
)
"""Its trials are stored under "perplexity", as they always were."""

METRICS = Registry(
    "score.metric",
    Metric,
    [
        NLL,
        Metric(
            "kl",
            LOSSES + "token_kl",
            "KL divergence",
            "KL(p || q) from the dense model's distribution p to the pruned model's q",
            reference=True,
        ),
        Metric(
            "js",
            LOSSES + "token_js",
            "JS divergence",
            "KL(p || m) / 2 + KL(q || m) / 2, m = (p + q) / 2 (FinerCut, arXiv 2405.18218)",
            reference=True,
        ),
        Metric(
            "block_influence",
            INFLUENCES + "block_influence",
            "Block Influence",
            "1 - the mean of cos(x, x + f) (ShortGPT, arXiv 2403.03853)",
            influence=True,
        ),
        Metric(
            "relative_magnitude",
            INFLUENCES + "relative_magnitude",
            "relative magnitude",
            "the mean of |f| / |x + f| (weight subcloning, arXiv 2312.09299)",
            influence=True,
        ),
        Metric(
            "relative_magnitude_frobenius",
            INFLUENCES + "relative_magnitude_frobenius",
            "relative magnitude (Frobenius)",
            "|F| / |X + F| over all tokens of a row",
            influence=True,
        ),
    ],
)
