"""The work of scoring as values: what is asked of a scorer, what it gives back, and what a scorer is.

Decides the unit of work, of logging and of loss: (mask, row range). How a unit is computed is the scorer's affair:
the engine in memory, streamed from disk, or on many workers. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from blockpruner.blocks import Mask

Rows = Sequence[Sequence[int]]
"""Token rows; rows of different lengths are padded on the right within a batch."""


@dataclass(frozen=True)
class Task:
    """Masks to be scored on the same rows [span.start, span.stop), a batch."""

    span: range
    masks: tuple[Mask, ...]


@dataclass(frozen=True)
class Unit:
    """Rows [start, start + len(nll)) of one mask; mean NLL of each, nats per token."""

    mask: Mask
    start: int
    nll: tuple[float, ...]


class Scorer(Protocol):
    """Computes units, in whatever order and wherever; the same values to rounding."""

    def row_batches(self, rows: Rows, span: range) -> list[range]:
        """The rows of `span` grouped into batches."""

    def run(self, tasks: Sequence[Task], rows: Rows) -> Iterator[Unit]:
        """Yield every unit of the tasks as soon as it is known; a unit may come in several parts of its rows."""

    def close(self) -> None:
        """Give back workers and files."""
