"""Objectives: the number that a search minimises, asked of the trial store first and of the model only if needed.

Decides what a score is made of (a metric over the calibration rows) and which trials must be computed. A search sees
only `Objective.__call__`; it knows neither store nor model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from blockpruner.core.blocks import DENSE, Mask, format_mask
from blockpruner.core.progress import Observer, SilentObserver
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.scoring.metrics import PERPLEXITY, Metric
from blockpruner.scoring.work import Scorer, Task
from blockpruner.store.trials import TrialStore, trial_key


@dataclass(frozen=True)
class Score:
    """row_loss: each row's own loss, a mean over its tokens, of the first rows of rows_total; loss: their mean, NaN
    where nothing was asked."""

    mask: Mask
    row_loss: tuple[float, ...]
    rows_total: int

    @property
    def loss(self) -> float:
        return math.fsum(self.row_loss) / len(self.row_loss) if self.row_loss else math.nan

    @property
    def perplexity(self) -> float:
        """exp(mean over rows of the row's mean NLL), as the public code of arXiv 2406.10594 computes it; of a score
        whose loss is the NLL."""
        return math.exp(self.loss)

    @property
    def rows_used(self) -> int:
        return len(self.row_loss)

    @property
    def is_complete(self) -> bool:
        return self.rows_used == self.rows_total


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
    iterations: int = 0


class Objective:
    """A metric of a masked model on the calibration set.

    Args:
        store: of this metric's trials.
        scorer: asked only for what the store does not know; its owner closes it.
        metric: a loss is of a mask; an influence is of what a mask has beyond a base.
    """

    def __init__(
        self,
        calibration: CalibrationSet,
        store: TrialStore,
        scorer: Scorer,
        observer: Observer | None = None,
        metric: Metric = PERPLEXITY,
    ) -> None:
        self.metric = metric
        self._calibration = calibration
        self._store = store
        self._scorer = scorer
        self._observer = observer or SilentObserver()
        self._asked: set[str] = set()
        self.counts = Counts()

    @property
    def rows(self) -> int:
        return len(self._calibration.rows)

    def __call__(self, masks: Sequence[Mask], rows: int | None = None, base: Mask = DENSE) -> list[Score]:
        """Score masks on the first `rows` rows (all, if None), in the order given; computes exactly what the store
        does not know.

        Args:
            base: of an influence, what each mask is held against; the base itself has no influence, and no row.
        """
        rows = self.rows if rows is None else rows
        keys = {mask: self._key(mask, base) for mask in masks if not self.metric.influence or mask != base}
        for key in keys.values():
            if key not in self._asked:
                self._asked.add(key)
                self.counts.units_reused += self._store.units(key)
                self.counts.trials_reused += self._store.known(key, 0, self.rows)
        missing: dict[range, list[Mask]] = {}
        for mask, key in keys.items():
            for span in self._store.unknown(key, 0, rows):
                missing.setdefault(span, []).append(mask)
        if missing:
            self._compute(missing, base)
        return [self._score(mask, keys.get(mask), rows) for mask in masks]

    def _key(self, mask: Mask, base: Mask) -> str:
        return trial_key(mask - base, base) if self.metric.influence else trial_key(mask)

    def _score(self, mask: Mask, key: str | None, rows: int) -> Score:
        if key is None:
            return Score(mask, (), self.rows)
        values = self._store.get(key)
        assert values is not None and self._store.known(key, 0, rows)
        return Score(mask, tuple(values[:rows]), self.rows)

    def _compute(self, missing: dict[range, list[Mask]], base: Mask) -> None:
        rows = self._calibration.rows
        batches: dict[range, list[Mask]] = {}
        for span, masks in missing.items():
            for batch in self._scorer.row_batches(rows, span):
                batches.setdefault(batch, []).extend(masks)
        loss, given = self.metric.loss, base if self.metric.influence else DENSE
        tasks = [Task(batch, tuple(masks), loss, given) for batch, masks in batches.items()]
        done, total = 0, sum(len(task.masks) * len(task.span) for task in tasks)
        common = frozenset.intersection(*(mask for task in tasks for mask in task.masks))
        last_done = time.monotonic()
        for unit in self._scorer.run(tasks, rows):
            key = self._key(unit.mask, base)
            self._store.put(key, unit.start, unit.loss)
            now = time.monotonic()
            done += len(unit.loss)
            self.counts.units_computed += 1
            self.counts.rows_computed += len(unit.loss)
            self.counts.trials_computed += self._store.known(key, 0, self.rows)
            self.counts.tokens += sum(len(row) for row in rows[unit.start : unit.start + len(unit.loss)])
            self.counts.seconds += now - last_done
            last_done = now
            self._observer.advance(done, total, f"candidate {format_mask(unit.mask - common or unit.mask) or 'dense'}")
