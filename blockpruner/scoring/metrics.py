"""What a search can minimise: METRICS, one row each.

Decides names and kinds. A loss is a fact about a mask; an influence is a fact about a unit within what a base mask
leaves, from one forward pass. How they are computed is decided in `losses` and `activations`. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass

from blockpruner.core.errors import InputError


@dataclass(frozen=True)
class Metric:
    """name: as in a run file; loss: what is computed and stored, which metrics may share; unit: what it is counted in;
    influence: whether it is of a unit, by the states around it, and not of what the model says without it;
    reference: whether it compares with what the dense model says."""

    name: str
    loss: str
    unit: str
    influence: bool = False
    reference: bool = False
    answers: bool = False


def metric_of(name: str) -> Metric:
    """The row of a metric; raises InputError that names the valid ones."""
    if name not in METRICS:
        raise InputError(f"score.metric {name!r} is unknown; valid: {', '.join(METRICS)}")
    return METRICS[name]


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("perplexity", "perplexity", "nats per token"),
        Metric("answer_likelihood", "perplexity", "nats per token of the right answer", answers=True),
        Metric("kl", "kl", "nats per token", reference=True),
        Metric("js", "js", "nats per token", reference=True),
        Metric("block_influence", "block_influence", "1 - cosine", influence=True),
        Metric("relative_magnitude", "relative_magnitude", "ratio of norms", influence=True),
        Metric("relative_magnitude_frobenius", "relative_magnitude_frobenius", "ratio of norms", influence=True),
    )
}
"""Lower is better for a mask of a loss, and less important for a unit of an influence.

answer_likelihood is perplexity over the answers of multiple-choice items, which are the only scored tokens of such
calibration rows, so the two share a store.
"""

PERPLEXITY = METRICS["perplexity"]
