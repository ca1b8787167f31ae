"""The work of scoring as values: what is asked of a scorer, what it gives back, and what a scorer is.

Decides the unit of work, of logging and of loss: (mask, row range). How a unit is computed is the scorer's affair:
the engine in memory, streamed from disk, or on many workers. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from blockpruner.core.blocks import DENSE, Mask

Rows = Sequence[Sequence[int]]
"""Token rows; rows of different lengths are padded on the right within a batch. A negative number is a token that is
given but not scored: the bitwise complement of its id."""


LOGITS_BYTES = 64 * 2**20
"""Upper bound of the logits held at once; the head runs over as many tokens as fit."""


def live_numbers(hidden: int, inner: int) -> int:
    """How many numbers live at once for a token within a block, of a model of these widths."""
    return 12 * hidden + 4 * inner


@dataclass(frozen=True)
class Task:
    """Masks to be scored on the same rows [span.start, span.stop), a batch.

    loss: what is computed, a name of `losses` or `activations`; base: for an influence, what is removed already: the
    unit that is asked about is then mask - base.
    """

    span: range
    masks: tuple[Mask, ...]
    loss: str = "perplexity"
    base: Mask = DENSE


@dataclass(frozen=True)
class Unit:
    """Rows [start, start + len(loss)) of one mask; the loss of each, a mean over its tokens."""

    mask: Mask
    start: int
    loss: tuple[float, ...]


class Scorer(Protocol):
    """Computes units, in whatever order and wherever; the same values to rounding."""

    def row_batches(self, rows: Rows, span: range) -> list[range]:
        """The rows of `span` grouped into batches."""

    def run(self, tasks: Sequence[Task], rows: Rows) -> Iterator[Unit]:
        """Yield every unit of the tasks as soon as it is known; a unit may come in several parts of its rows."""

    def close(self) -> None:
        """Give back workers and files."""
