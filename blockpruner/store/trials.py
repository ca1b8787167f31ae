"""The trial store: exact facts (mask, row) -> loss, kept for ever and shared by every run, search
and calibration set.

Decides when a number may be reused. A store is of one model, dtype and metric and of one
SCORE_VERSION; a row is known by its content, so a larger calibration set finds what a smaller one
scored. In 16 bits the place of the computation moves a loss by as much as two candidates differ, so
there a store is of one `Origin`, too; in 32 and 64 bits never. On disk a store is a folder with one
log (`store.journal`) for each writing process. The store knows nothing of searches.
"""

from __future__ import annotations

import math
import os
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blockpruner.core.blocks import Mask, format_mask
from blockpruner.core.errors import InputError
from blockpruner.store.files import write_json
from blockpruner.store.journal import Journal
from blockpruner.store.provenance import fingerprint
from blockpruner.versions import SCORE_VERSION

TRIALS_VARIABLE = "BLOCKPRUNER_TRIALS"
"""Environment variable: the absolute path of a trial store that several workspaces share."""

SYNC_SECONDS = 1.0
"""A cut of power loses the trials of at most this time."""

SIXTEEN_BITS = ("bfloat16", "float16")

Origin = Mapping[str, str | int]
"""Where losses are computed, as far as that moves one in 16 bits: versions, device, attention
kernel, batch shape."""


def store_fields(calibration: str, model: str, dtype: str, metric: str) -> dict[str, Any]:
    """What the trials of a search depend on, apart from their origin. All but the calibration names
    their store."""
    store = {"model": model, "dtype": dtype, "metric": metric, "score_version": SCORE_VERSION}
    return {"calibration": calibration, **store}


def trial_key(mask: Mask, base: Mask | None = None) -> str:
    """What a trial is of: a mask, or a unit within what a base leaves ("mha.3,mlp.1|mha.7")."""
    return format_mask(mask) if base is None else f"{format_mask(base)}|{format_mask(mask)}"


def trials_root() -> Path:
    """The folder of all stores: data/trials, or where BLOCKPRUNER_TRIALS points."""
    return Path(os.environ.get(TRIALS_VARIABLE) or "data/trials")


@dataclass
class TrialStore:
    """The loss of every row (float64, of one metric) by `trial_key`."""

    fields: Mapping[str, Any]
    """As from `store_fields`; in 16 bits with the "origin" (`of`)."""
    rows: Sequence[str]
    """The calibration set's `row_keys`, in order. Facts are asked for and recorded by position in
    it."""
    root: Path | None = None
    """The folder of all stores; None keeps the facts in memory only."""
    problems: list[str] = field(default_factory=list)
    """One line for each file or line that was found and not trusted."""
    seconds: dict[str, float] = field(default_factory=dict)
    """How long each trial took, whoever computed it; none for one that an iteration table gave."""
    _facts: dict[str, list[float]] = field(default_factory=dict)
    _of: dict[str, TrialStore] = field(default_factory=dict)
    _log: Journal | None = None

    def __post_init__(self) -> None:
        self._named_by = {
            name: value for name, value in self.fields.items() if name != "calibration"
        }
        self.fingerprint = fingerprint(self._named_by)
        self._places: dict[str, list[int]] = {}
        for place, row in enumerate(self.rows):
            self._places.setdefault(row, []).append(place)
        for path in () if self.root is None else sorted(self._directory.glob("*.jsonl")):
            self._read(path)

    @property
    def _directory(self) -> Path:
        assert self.root is not None
        return self.root / self.fingerprint

    @property
    def origin(self) -> Origin:
        """Where these losses come from; in 32 and 64 bits it is not known, and does not matter."""
        return dict(self.fields.get("origin", {}))

    @property
    def is_narrow(self) -> bool:
        """Whether its losses are computed in 16 bits."""
        return self.fields.get("dtype") in SIXTEEN_BITS

    def of(self, origin: Origin) -> TrialStore:
        """The store of the losses of one origin; in 32 and 64 bits it is this one."""
        if not self.is_narrow or self.origin == origin:
            return self
        if (name := fingerprint(origin)) not in self._of:
            self._of[name] = TrialStore(
                {**self.fields, "origin": dict(origin)}, self.rows, self.root
            )
        return self._of[name]

    def get(self, key: str) -> list[float] | None:
        """Loss of every row, NaN where unknown; None if nothing is known."""
        return self._facts.get(key)

    def known(self, key: str, start: int, stop: int) -> bool:
        """Whether all rows of [start, stop) are known."""
        values = self._facts.get(key, ())
        return start >= stop or (bool(values) and not any(map(math.isnan, values[start:stop])))

    @property
    def trials(self) -> int:
        """How many trials are known, on all rows or on some."""
        return len(self._facts)

    def put(
        self, key: str, rows: Sequence[int], loss: Iterable[float], seconds: float | None = None
    ) -> None:
        """Record some rows of a trial, and what they took; a kill after the return does not lose
        them."""
        values = [float(v) for v in loss]
        self._remember(key, [self.rows[row] for row in rows], values, seconds)
        if self.root is None:
            return
        if self._log is None:
            if not (self._directory / "fingerprint.json").exists():
                write_json(self._directory / "fingerprint.json", self._named_by)
            header = {"fingerprint": self.fingerprint, "rows": list(self.rows)}
            name = f"{time.time_ns()}-{secrets.token_hex(4)}.jsonl"
            self._log = Journal(self._directory / name, header, SYNC_SECONDS)
        where = (
            {"start": rows[0]}
            if list(rows) == list(range(rows[0], rows[0] + len(rows)))
            else {"rows": list(rows)}
        )
        self._log.append({"trial": key, **where, "loss": values, "seconds": seconds})

    def close(self) -> None:
        for store in self._of.values():
            store.close()
        if self._log is not None:
            self._log.close()

    def _read(self, path: Path) -> None:
        """Take over the facts of a log. Of two facts of the same row the later log's is kept."""
        journal = Journal(path, {"fingerprint": self.fingerprint})
        header = journal.first() or {}
        rows: Sequence[str] = header.get("rows", ())
        if header.get("fingerprint") == self.fingerprint and self._places.keys().isdisjoint(rows):
            return
        for unit in journal.read(self.problems):
            start = unit.get("start", 0)
            numbers = unit.get("rows", range(start, start + len(unit["loss"])))
            self._remember(
                unit["trial"],
                [rows[number] for number in numbers],
                unit["loss"],
                unit.get("seconds"),
            )

    def _remember(
        self, key: str, rows: Sequence[str], values: Sequence[float], seconds: float | None
    ) -> None:
        """Keep the values of rows by their keys; a row that stands twice in the set is known at
        both places."""
        known = [
            (at, value)
            for row, value in zip(rows, values, strict=True)
            for at in self._places.get(row, ())
        ]
        if known:
            facts = self._facts.setdefault(key, [math.nan] * len(self.rows))
            for at, value in known:
                facts[at] = value
            if seconds is not None:
                self.seconds[key] = self.seconds.get(key, 0.0) + seconds


def require_rows(rows: int) -> None:
    if rows < 1:
        raise InputError(
            "the calibration set has no row; raise calibration.num_samples or lower"
            " calibration.seq_len"
        )
