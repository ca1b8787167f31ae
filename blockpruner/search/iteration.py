"""One step of a search as a value: which masks were considered, their scores, and the one
chosen."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from blockpruner.core.blocks import DENSE, Mask
from blockpruner.scoring.objectives import MaskScore
from blockpruner.scoring.stability import Stability, stability
from blockpruner.store.trials import Origin


@dataclass(frozen=True)
class Iteration:
    """One step. `scores`, `added` and `nll` run in parallel. The first mask of all is the dense
    model."""

    index: int
    scores: tuple[MaskScore, ...]
    added: tuple[Mask | None, ...]
    """The candidate; None for a mask that is not the last choice with one candidate more."""
    chosen: int
    """Which of the scores is the step's choice."""
    lazy_choice: Mask | None = None
    """In an audited iteration, the mask that had been chosen before all candidates entered."""
    nll: tuple[MaskScore | None, ...] = ()
    """What perplexity is made of. It is known for the chosen mask and the dense model, and for
    others where it is the metric; empty until the run of the search fills it in."""
    origin: Origin = field(default_factory=dict)
    """Where the losses come from, in 16 bits."""

    @property
    def losses(self) -> dict[Mask, tuple[float, ...]]:
        """The row losses of each candidate that was scored, or of whole masks where such are
        compared."""
        losses = {}
        for score, unit in zip(self.scores, self.added, strict=True):
            if score.mask and score.row_loss:
                losses[unit or score.mask] = score.row_loss
        return losses

    @property
    def removed(self) -> Mask:
        """The cumulative mask after this iteration."""
        return self.scores[self.chosen].mask

    @property
    def perplexity(self) -> float:
        """The perplexity of the model without `removed`, on the calibration set."""
        score = self.nll[self.chosen]
        assert score is not None
        return score.perplexity


def compared(index: int, scores: Sequence[MaskScore], best: MaskScore) -> Iteration:
    """A step that compares whole masks."""
    no_unit = (None,) * len(scores)
    return Iteration(index, tuple(scores), no_unit, list(scores).index(best))


def removals(trace: Sequence[Iteration], nested: bool) -> tuple[list[Mask], list[float]]:
    """What a search removed, in order, and the perplexities of the dense model and after each
    removal. A search that is not nested has no order: its answer, the last choice, is one
    removal."""
    dense = trace[0].nll[0]
    assert dense is not None and dense.mask == DENSE
    if not nested:
        return [trace[-1].removed], [dense.perplexity, trace[-1].perplexity]
    order = [iteration.added[iteration.chosen] or DENSE for iteration in trace]
    return order, [dense.perplexity, *(iteration.perplexity for iteration in trace)]


def stabilities(trace: Sequence[Iteration], price: str = "none") -> tuple[Stability | None, ...]:
    """How firmly the rows decide each iteration. One that asks for no score chooses by the earlier
    ones. Where a resource prices removals, losses alone do not decide, and nothing is known."""
    if price != "none":
        return (None,) * len(trace)
    values = []
    losses: dict[Mask, tuple[float, ...]] = {}
    for iteration in trace:
        losses = iteration.losses or losses
        chosen = iteration.added[iteration.chosen] or iteration.removed
        values.append(stability(losses, chosen))
        losses.pop(chosen, None)
    return tuple(values)
