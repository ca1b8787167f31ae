"""Objectives: the number that a search minimises, taken from the trial store, and from the model only where it must.

Decides what a score is made of (a metric over the calibration rows) and which trials must be computed. A search calls
an `Objective`; it knows neither store nor model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from blockpruner.core.blocks import DENSE, Mask, format_mask
from blockpruner.core.progress import Observer, SilentObserver
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.scoring.metrics import NLL, Metric
from blockpruner.scoring.work import Scorer, Span, Task
from blockpruner.store.trials import SIXTEEN_BITS, TrialStore, trial_key


@dataclass(frozen=True)
class MaskScore:
    """What a mask was scored, on some or all of the calibration rows."""

    mask: Mask
    row_loss: tuple[float, ...]
    """Of each of the first rows, or of the `drawn` ones, a mean over its tokens."""
    rows_total: int
    drawn: tuple[int, ...] | None = None
    """The rows that were scored, ascending, where they are not the first ones."""

    @property
    def loss(self) -> float:
        """The mean over the rows, NaN without any."""
        return math.fsum(self.row_loss) / len(self.row_loss) if self.row_loss else math.nan

    def rise_over(self, other: MaskScore, most: int | None = None) -> float:
        """How much more the loss is than another mask's, on the first rows that both were scored on.

        Args:
            most: no more rows than this.
        """
        rows = min(self.rows_used, other.rows_used, most or self.rows_used)
        return (math.fsum(self.row_loss[:rows]) - math.fsum(other.row_loss[:rows])) / rows

    @property
    def perplexity(self) -> float:
        """exp(mean over rows of the row's mean NLL), as in the public code of arXiv 2406.10594; the loss must be the
        NLL."""
        return math.exp(self.loss)

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
    units_reused: int = 0
    rows_computed: int = 0
    """Pairs of a mask and a row."""
    trials_computed: int = 0
    """Masks with all rows."""
    trials_reused: int = 0
    tokens: int = 0
    """Of what was computed; so are the seconds."""
    seconds: float = 0.0


class Objective:
    """A metric of a masked model on the calibration set.

    Args:
        store: holds this metric's trials.
        scorer: asked only for what the store does not know; its owner closes it.
        metric: a loss scores a mask; an influence scores what a mask removes beyond a base.
        whole: whether a call is all that a step of a search asks for, so that its end is known.
        wide: a model in 16 bits is computed in float32, row by row. Then no environment moves a loss by more than
            rounding.
    """

    def __init__(
        self,
        calibration: CalibrationSet,
        store: TrialStore,
        scorer: Scorer,
        observer: Observer | None = None,
        metric: Metric = NLL,
        whole: bool = True,
        wide: bool = False,
    ) -> None:
        self.metric = metric
        self._whole = whole
        self._wide = wide
        self._calibration = calibration
        self._store = store
        self._scorer = scorer
        self._observer = observer or SilentObserver()
        self._asked: set[str] = set()
        self.counts = Counts()

    @property
    def rows(self) -> int:
        return len(self._calibration.rows)

    @property
    def is_narrow(self) -> bool:
        """Whether the model is computed in 16 bits."""
        return self._store.fields.get("dtype") in SIXTEEN_BITS

    def __call__(
        self, masks: Sequence[Mask], rows: int | Sequence[int] | None = None, base: Mask = DENSE
    ) -> list[MaskScore]:
        """Score masks, in the order given; compute what the store lacks.

        Args:
            rows: how many of the first rows, or which ones, ascending; None is all.
            base: what is removed before an influence is taken; the base itself has no influence, so no rows.
        """
        wanted = range(self.rows) if rows is None else range(rows) if isinstance(rows, int) else rows
        end = wanted[-1] + 1 if wanted else 0
        keys = {mask: self._key(mask, base) for mask in masks if not self.metric.influence or mask != base}
        for key in keys.values():
            if key not in self._asked:
                self._asked.add(key)
                self.counts.units_reused += self._store.units(key)
                self.counts.trials_reused += self._store.known(key, 0, self.rows)
        compared = () if self._wide else keys.values()
        missing, origins = self._missing(keys, wanted), self._store.origins(compared, end)
        if missing or len(origins) > 1:
            before = self._store.batches_on(str(self._scorer.placement().get("device")))
            self._scorer.limit_batches(self._calibration.rows, before)
        if len(origins) > 1 or (origins and missing):  # these facts are compared with each other
            self._require_one_origin(keys.values(), origins)
            missing = self._missing(keys, wanted)
        while missing:
            self._compute(missing, base)
            missing = {}
            if len(origins := self._store.origins(compared, end)) > 1:  # a batch was halved on the way
                self._require_one_origin(keys.values(), origins)
                missing = self._missing(keys, wanted)
        return [self._score(mask, keys.get(mask), wanted) for mask in masks]

    def _missing(self, keys: Mapping[Mask, str], rows: Sequence[int]) -> dict[Span, list[Mask]]:
        """The masks by the rows that are to be computed, shorter rows first, so that batches need few pads."""
        missing: dict[Span, list[Mask]] = {}
        by_length = sorted(rows, key=lambda row: (len(self._calibration.rows[row]), row))
        for mask, key in keys.items():
            lacking = [row for row in by_length if not self._store.known(key, row, row + 1)]
            if lacking:
                missing.setdefault(span_of(lacking), []).append(mask)
        return missing

    def _require_one_origin(self, keys: Iterable[str], origins: Iterable[str]) -> None:
        """Forget what another environment computed where it would be compared with what this one computes."""
        here = self._store.computed_by(self._placement())
        forgotten = self._store.keep_only(keys, here)
        if forgotten:
            places = "; ".join(place for place in origins if place != here)
            self._observer.note(
                f"{forgotten} losses in 16 bits were computed elsewhere ({places}) and are not mixed with those of "
                f"here ({here}): they are computed again"
            )

    def _placement(self) -> dict[str, str]:
        """Where it is computed, and in which batches: rows of different lengths are batched by length."""
        here = dict(self._scorer.placement())
        if "batch" in here and len({len(row) for row in self._calibration.rows}) > 1:
            here["batch"] += ", by length"
        return here

    def _key(self, mask: Mask, base: Mask) -> str:
        return trial_key(mask - base, base) if self.metric.influence else trial_key(mask, wide=self._wide)

    def _score(self, mask: Mask, key: str | None, rows: Sequence[int]) -> MaskScore:
        values = None if key is None else self._store.get(key)
        loss = () if values is None else tuple(values[row] for row in rows)
        assert not any(map(math.isnan, loss))
        return MaskScore(mask, loss, self.rows, None if list(rows) == list(range(len(rows))) else tuple(rows))

    def _compute(self, missing: dict[Span, list[Mask]], base: Mask) -> None:
        rows = self._calibration.rows
        batches: dict[Span, list[Mask]] = {}
        for span, masks in missing.items():
            alone = (span[i : i + 1] for i in range(len(span)))  # a state takes twice the memory, and ties are few
            for batch in alone if self._wide else self._scorer.row_batches(rows, span):
                batches.setdefault(batch, []).extend(masks)
        given = base if self.metric.influence else DENSE
        tasks = [Task(batch, tuple(masks), self.metric, given, self._wide) for batch, masks in batches.items()]
        done, total = 0, sum(len(task.masks) * len(task.span) for task in tasks)
        common = frozenset.intersection(*(mask for task in tasks for mask in task.masks))
        last_done = time.monotonic()
        for scored in self._scorer.run(tasks, rows):
            self._store.computed_by(self._placement())  # batches are smaller once the device's memory ran out
            key, count = self._key(scored.mask, base), len(scored.loss)
            self._store.put(key, scored.span, scored.loss)
            now = time.monotonic()
            done += count
            self.counts.units_computed += 1
            self.counts.rows_computed += count
            self.counts.trials_computed += self._store.known(key, 0, self.rows)
            self.counts.tokens += sum(len(rows[row]) for row in scored.span)
            self.counts.seconds += now - last_done
            last_done = now
            candidate = format_mask(scored.mask - common or scored.mask) or "dense"
            self._observer.advance(done, total if self._whole else None, f"candidate {candidate}")


def span_of(rows: Sequence[int]) -> Span:
    """A range where the rows follow each other."""
    run = range(rows[0], rows[0] + len(rows))
    return run if list(rows) == list(run) else tuple(rows)
