"""Objectives: the number that a search minimises, asked of the trial store first and of the model only if needed.

Decides what a score is made of (perplexity over the calibration rows) and which trials must be computed. A
search sees only `Objective.__call__`; it knows neither store nor model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blockpruner.blocks import Mask, format_mask
from blockpruner.calibration import CalibrationSet
from blockpruner.progress import Observer, SilentObserver
from blockpruner.trials import TrialStore

if TYPE_CHECKING:  # torch is loaded only when something must be computed
    from blockpruner.scoring.engine import Engine


@dataclass(frozen=True)
class Score:
    """row_nll: each row's mean NLL in nats per token; nll: their mean; perplexity: exp(nll)."""

    mask: Mask
    row_nll: tuple[float, ...]
    rows_total: int

    @property
    def nll(self) -> float:
        return math.fsum(self.row_nll) / len(self.row_nll)

    @property
    def perplexity(self) -> float:
        """PPL = exp(mean over rows of the row's mean NLL), as the public code of arXiv 2406.10594 computes it."""
        return math.exp(self.nll)

    @property
    def rows_used(self) -> int:
        return len(self.row_nll)


@dataclass
class Counts:
    """Work of one process: units are (mask, row batch), trials are masks with all rows."""

    units_computed: int = 0
    units_reused: int = 0
    trials_computed: int = 0
    trials_reused: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Objective:
    """Perplexity of a masked model on the calibration set.

    Args:
        make_engine: loads the model; called once, when the first missing trial is asked for.
    """

    def __init__(
        self,
        calibration: CalibrationSet,
        store: TrialStore,
        make_engine: Callable[[], Engine],
        observer: Observer | None = None,
    ) -> None:
        self._calibration = calibration
        self._store = store
        self._make_engine = make_engine
        self._engine: Engine | None = None
        self._observer = observer or SilentObserver()
        self.counts = Counts()

    def missing(self, masks: Sequence[Mask]) -> list[Mask]:
        """Masks of which some row is not in the store."""
        rows = len(self._calibration.rows)
        return [mask for mask in masks if not self._store.known(mask, 0, rows)]

    def __call__(self, masks: Sequence[Mask]) -> list[Score]:
        """Score masks on all rows, in the order given; computes exactly what the store does not know."""
        missing = self.missing(masks)
        self.counts.trials_reused += len(masks) - len(missing)
        self.counts.units_reused += sum(self._store.units(mask) for mask in set(masks) - set(missing))
        if missing:
            self._compute(missing)
        total = len(self._calibration.rows)
        scores = []
        for mask in masks:
            values = self._store.get(mask)
            assert values is not None and not any(math.isnan(v) for v in values)
            scores.append(Score(mask, tuple(values), total))
        return scores

    def _compute(self, missing: Sequence[Mask]) -> None:
        if self._engine is None:
            self._engine = self._make_engine()
        rows = self._calibration.rows
        batches = self._engine.row_batches(rows)
        done, total, last_done = 0, len(missing) * len(batches), time.monotonic()
        common = frozenset.intersection(*missing)
        for span in batches:
            wanted = [mask for mask in missing if not self._store.known(mask, span.start, span.stop)]
            self.counts.units_reused += len(missing) - len(wanted)
            done += len(missing) - len(wanted)
            tokens = sum(len(rows[i]) for i in span)
            for unit in self._engine.score(wanted, rows, span):
                self._store.put(unit.mask, unit.start, unit.nll)
                done += 1
                now = time.monotonic()
                self.counts.units_computed += 1
                self.counts.tokens += tokens
                self.counts.seconds += now - last_done
                last_done = now
                self._observer.advance(
                    done, total, f"candidate {format_mask(unit.mask - common or unit.mask) or 'dense'}"
                )
        self.counts.trials_computed += len(missing)
