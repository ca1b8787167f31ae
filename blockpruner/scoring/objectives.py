"""Objectives: the number that a search minimises, asked of the trial store first and of the model only if needed.

Decides what a score is made of (perplexity over the calibration rows) and which trials must be computed. A
search sees only `Objective.__call__`; it knows neither store nor model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from blockpruner.blocks import Mask, format_mask
from blockpruner.calibration import CalibrationSet
from blockpruner.progress import Observer, SilentObserver
from blockpruner.scoring.work import Scorer, Task
from blockpruner.trials import TrialStore


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
    """Work of one process: units are (mask, row batch), rows are (mask, row), trials are masks with all rows.

    Reused is what was known before this process asked; `tokens` and `seconds` are of the units computed.
    """

    units_computed: int = 0
    units_reused: int = 0
    rows_computed: int = 0
    trials_computed: int = 0
    trials_reused: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Objective:
    """Perplexity of a masked model on the calibration set.

    Args:
        make_scorer: loads the model; called once, when the first missing unit is asked for.
    """

    def __init__(
        self,
        calibration: CalibrationSet,
        store: TrialStore,
        make_scorer: Callable[[], Scorer],
        observer: Observer | None = None,
    ) -> None:
        self._calibration = calibration
        self._store = store
        self._make_scorer = make_scorer
        self._scorer: Scorer | None = None
        self._observer = observer or SilentObserver()
        self._asked: set[Mask] = set()
        self.counts = Counts()

    @property
    def rows(self) -> int:
        return len(self._calibration.rows)

    def __call__(self, masks: Sequence[Mask], rows: int | None = None) -> list[Score]:
        """Score masks on the first `rows` rows (all, if None), in the order given; computes exactly what the store
        does not know."""
        rows = self.rows if rows is None else rows
        for mask in dict.fromkeys(masks):
            if mask not in self._asked:
                self._asked.add(mask)
                self.counts.units_reused += self._store.units(mask)
                self.counts.trials_reused += self._store.known(mask, 0, self.rows)
        missing: dict[range, list[Mask]] = {}
        for mask in dict.fromkeys(masks):
            for span in self._store.unknown(mask, 0, rows):
                missing.setdefault(span, []).append(mask)
        if missing:
            self._compute(missing)
        scores = []
        for mask in masks:
            values = self._store.get(mask)
            assert values is not None and self._store.known(mask, 0, rows)
            scores.append(Score(mask, tuple(values[:rows]), self.rows))
        return scores

    def close(self) -> None:
        if self._scorer is not None:
            self._scorer.close()

    def _compute(self, missing: dict[range, list[Mask]]) -> None:
        if self._scorer is None:
            self._scorer = self._make_scorer()
        rows = self._calibration.rows
        batches: dict[range, list[Mask]] = {}
        for span, masks in missing.items():
            for batch in self._scorer.row_batches(rows, span):
                batches.setdefault(batch, []).extend(masks)
        tasks = [Task(batch, tuple(masks)) for batch, masks in batches.items()]
        done, total = 0, sum(len(task.masks) * len(task.span) for task in tasks)
        common = frozenset.intersection(*(mask for task in tasks for mask in task.masks))
        last_done = time.monotonic()
        for unit in self._scorer.run(tasks, rows):
            self._store.put(unit.mask, unit.start, unit.nll)
            now = time.monotonic()
            done += len(unit.nll)
            self.counts.units_computed += 1
            self.counts.rows_computed += len(unit.nll)
            self.counts.trials_computed += self._store.known(unit.mask, 0, self.rows)
            self.counts.tokens += sum(len(row) for row in rows[unit.start : unit.start + len(unit.nll)])
            self.counts.seconds += now - last_done
            last_done = now
            self._observer.advance(done, total, f"candidate {format_mask(unit.mask - common or unit.mask) or 'dense'}")
