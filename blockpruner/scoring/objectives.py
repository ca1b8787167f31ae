"""Objectives: the number that a search minimises, taken from the trial store, and from the model
only where it must.

Decides what a score is made of (a metric over the calibration rows, of one origin) and which trials
must be computed. A search calls an `Objective`; it knows neither store nor model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TypeVar

from blockpruner.core.blocks import DENSE, Mask, format_mask
from blockpruner.core.progress import Observer, SilentObserver
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.scoring.metrics import NLL, Metric, perplexity
from blockpruner.scoring.work import Scorer, Span, Task
from blockpruner.store.trials import Origin, TrialStore, trial_key

T = TypeVar("T")


@dataclass(frozen=True)
class MaskScore:
    """What a mask was scored, on some or all of the calibration rows."""

    mask: Mask
    row_loss: tuple[float, ...]
    """The loss of each of the first rows, a mean over its tokens."""
    rows_total: int

    @property
    def loss(self) -> float:
        """The mean over the rows, NaN without any."""
        return math.fsum(self.row_loss) / len(self.row_loss) if self.row_loss else math.nan

    def rise_over(self, other: MaskScore, max_rows: int | None = None) -> float:
        """How much more the loss is than another mask's, on the first rows that both were scored
        on, at most `max_rows`."""
        rows = min(self.rows_used, other.rows_used, max_rows or self.rows_used)
        loss = math.fsum(self.row_loss[:rows])
        other_loss = math.fsum(other.row_loss[:rows])
        return (loss - other_loss) / rows

    @property
    def perplexity(self) -> float:
        """exp(mean over rows of the row's mean NLL), as in the public code of arXiv 2406.10594; the
        loss must be the NLL."""
        return perplexity(self.loss)

    @property
    def rows_used(self) -> int:
        return len(self.row_loss)

    @property
    def is_complete(self) -> bool:
        return self.rows_used == self.rows_total


@dataclass
class Counts:
    """Work of one process; what the store knew before is counted as reused."""

    iterations: int = 0
    units_computed: int = 0
    """Pairs of a mask and a batch of rows."""
    rows_computed: int = 0
    """Pairs of a mask and a row."""
    trials_computed: int = 0
    """Masks with all rows."""
    trials_reused: int = 0
    tokens: int = 0
    """The tokens of what was computed; so are the seconds."""
    seconds: float = 0.0
    spent: float = 0.0
    """The seconds of all that was asked for, also of what was known before."""
    timed: int = 0
    """Masks with all rows whose seconds are known."""
    steps: tuple[tuple[int, int, float], ...] = ()
    """After each iteration: trials timed, other trials, seconds spent."""

    @property
    def step(self) -> tuple[int, int, float]:
        return (
            self.timed,
            self.trials_computed + self.trials_reused - self.timed,
            round(self.spent, 2),
        )

    def __add__(self, other: Counts) -> Counts:
        return Counts(**{name: value + getattr(other, name) for name, value in vars(self).items()})


class OriginChangedError(Exception):
    """In 16 bits, what is computed next comes from another origin than what it would be compared
    with."""


class Objective:
    """A metric of a masked model on the calibration set, from losses of one origin. The scorer,
    which its owner closes, is asked only for what the store does not know. An influence scores what
    a mask removes beyond a base."""

    def __init__(
        self,
        calibration: CalibrationSet,
        store: TrialStore,
        scorer: Scorer,
        observer: Observer | None = None,
        metric: Metric = NLL,
    ) -> None:
        self.metric = metric
        self._calibration = calibration
        self._stores = store
        self._scorer = scorer
        self._observer = observer or SilentObserver()
        self._asked: set[str] = set()
        self.counts = Counts()

    @property
    def rows(self) -> int:
        return len(self._calibration.rows)

    @cached_property
    def _store(self) -> TrialStore:
        """The store of the origin in which the first loss is computed."""
        store = self._stores.of(self._scorer.origin()) if self._stores.is_narrow else self._stores
        while store.problems:
            self._observer.note(f"warning: {store.problems.pop(0)}")
        return store

    @property
    def origin(self) -> Origin:
        """Where its losses come from."""
        return self._store.origin

    def __call__(
        self, masks: Sequence[Mask], rows: int | None = None, base: Mask = DENSE
    ) -> list[MaskScore]:
        """Score masks, in the order given; compute what the store lacks. In 16 bits it may raise an
        OriginChangedError, see `in_one_origin`.

        Args:
            rows: how many of the first rows; None is all.
            base: what is removed before an influence is taken; the base itself has no influence, so
                no rows.
        """
        num_rows = self.rows if rows is None else rows
        keys = {}
        for mask in masks:
            if not self.metric.influence or mask != base:
                keys[mask] = self._key(mask, base)
        for key in keys.values():
            if key not in self._asked:
                self._asked.add(key)
                is_known = self._store.known(key, 0, self.rows)
                seconds = self._store.seconds
                self.counts.trials_reused += is_known
                self.counts.timed += is_known and key in seconds
                self.counts.spent += seconds.get(key, 0.0)
        missing = self._missing(keys, num_rows)
        if missing:
            self._compute(missing, base)
        losses = {}
        for mask, key in keys.items():
            stored = self._store.get(key) or []
            losses[mask] = tuple(stored[:num_rows])
        assert not any(map(math.isnan, chain.from_iterable(losses.values())))
        return [MaskScore(mask, losses.get(mask, ()), self.rows) for mask in masks]

    def _missing(self, keys: Mapping[Mask, str], rows: int) -> dict[Span, list[Mask]]:
        """The masks by the rows that are to be computed, shorter rows first, so that batches need
        few pads."""
        missing: dict[Span, list[Mask]] = {}
        by_length = sorted(range(rows), key=lambda row: (len(self._calibration.rows[row]), row))
        for mask, key in keys.items():
            lacking = [row for row in by_length if not self._store.known(key, row, row + 1)]
            if lacking:
                # A range and a tuple of the same rows would be two keys, and two batches.
                run = range(lacking[0], lacking[0] + len(lacking))
                span: Span = run if lacking == list(run) else tuple(lacking)
                missing.setdefault(span, []).append(mask)
        return missing

    def _key(self, mask: Mask, base: Mask) -> str:
        return trial_key(mask - base, base) if self.metric.influence else trial_key(mask)

    def _compute(self, missing: dict[Span, list[Mask]], base: Mask) -> None:
        rows = self._calibration.rows
        self._require_origin()
        batches: dict[Span, list[Mask]] = {}
        for span, masks in missing.items():
            for batch in self._scorer.row_batches(rows, span):
                batches.setdefault(batch, []).extend(masks)
        # A loss is of a whole mask; an influence is that of a unit beside what the base removes.
        task_base = base if self.metric.influence else DENSE
        tasks = []
        for batch, masks in batches.items():
            tasks.append(Task(batch, tuple(masks), self.metric, task_base))
        done = 0
        total = sum(len(task.masks) * len(task.span) for task in tasks)
        common = frozenset.intersection(*(mask for task in tasks for mask in task.masks))
        last_done = time.monotonic()
        for scored in self._scorer.run(tasks, rows):
            self._require_origin()  # batches are smaller once the device's memory ran out
            key = self._key(scored.mask, base)
            count = len(scored.loss)
            time_done = time.monotonic()
            seconds = time_done - last_done
            last_done = time_done
            self._store.put(key, scored.span, scored.loss, seconds)
            done += count
            self.counts.units_computed += 1
            self.counts.rows_computed += count
            is_known = self._store.known(key, 0, self.rows)
            self.counts.trials_computed += is_known
            self.counts.timed += is_known
            self.counts.tokens += sum(len(rows[row]) for row in scored.span)
            self.counts.seconds += seconds
            self.counts.spent += seconds
            candidate = format_mask(scored.mask - common or scored.mask) or "dense"
            self._observer.advance(done, total, f"candidate {candidate}")

    def _require_origin(self) -> None:
        expected = self.origin
        # Only losses in 16 bits have an origin: in 32 bits rounding decides nothing.
        if not expected:
            return
        origin = self._scorer.origin()
        if origin != expected:
            changes = []
            for name in expected:
                if origin[name] != expected[name]:
                    changes.append(f"{name} {origin[name]}, before {expected[name]}")
            raise OriginChangedError(
                f"losses in 16 bits now come from another origin ({', '.join(changes)}), and are"
                " not mixed with those before: the search begins again, over what is known of this"
                " origin"
            )


def in_one_origin(work: Callable[[], T], observer: Observer) -> T:
    """What some work over new objectives finds; it begins again where the origin of 16-bit losses
    has changed."""
    while True:
        try:
            return work()
        except OriginChangedError as change:
            observer.note(str(change))
