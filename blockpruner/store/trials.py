"""The trial store: exact facts (mask, row) -> loss, kept for ever and shared by every run, search
and calibration set.

Decides when a number may be reused. A store is of one model, dtype, metric and SCORE_VERSION. A row
is known by its content, so a larger calibration set finds what a smaller one scored. In bf16 and
fp16 a store is of one `Origin`, too: there the device moves a loss by as much as two candidates
differ. On disk a store is a folder with one log (`store.journal`) for each writing process. The
store knows nothing of searches.
"""

from __future__ import annotations

import math
import os
import secrets
import time
from collections import defaultdict
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
"""Where losses are computed, as far as that moves one in bf16 or fp16: versions, device, attention
kernel, batch shape."""


def store_fields(calibration: str, model: str, dtype: str, metric: str) -> dict[str, Any]:
    """What the trials of a search depend on, without their origin. Each field except the
    calibration enters the fingerprint of the store."""
    return {
        "calibration": calibration,
        "model": model,
        "dtype": dtype,
        "metric": metric,
        "score_version": SCORE_VERSION,
    }


def trial_key(mask: Mask, base: Mask | None = None) -> str:
    """The name of a trial: a mask, or a unit removed beside a base ("mha.3,mlp.1|mha.7")."""
    if base is None:
        return format_mask(mask)
    return f"{format_mask(base)}|{format_mask(mask)}"


def trials_root() -> Path:
    """The folder of all stores: data/trials, or where BLOCKPRUNER_TRIALS points."""
    return Path(os.environ.get(TRIALS_VARIABLE) or "data/trials")


@dataclass
class TrialStore:
    """The loss of every row (float64, of one metric) by `trial_key`."""

    fields: Mapping[str, Any]
    """As from `store_fields`; in bf16 and fp16 with the "origin" (`of`)."""
    rows: Sequence[str]
    """The calibration set's `row_keys`, in order. Facts are read and recorded by position in it."""
    root: Path | None = None
    """The folder of all stores; None keeps the facts in memory only."""
    problems: list[str] = field(default_factory=list)
    """One line for each file or line that was read and not trusted."""
    seconds: dict[str, float] = field(default_factory=dict)
    """How long each trial took, whoever computed it; none for one from an iteration table."""
    _facts: dict[str, list[float]] = field(default_factory=dict)
    _store_by_origin: dict[str, TrialStore] = field(default_factory=dict)
    _log: Journal | None = None

    def __post_init__(self) -> None:
        self._identity = dict(self.fields)
        # All calibration sets share the store: a row is known by its content.
        self._identity.pop("calibration", None)
        self.fingerprint = fingerprint(self._identity)
        # A row may occur twice in a set.
        self._positions_by_row = defaultdict[str, list[int]](list)
        for position, row in enumerate(self.rows):
            self._positions_by_row[row].append(position)
        if self.root is not None:
            logs = sorted(self._directory.glob("*.jsonl"))
            for log in logs:
                self._read(log)

    @property
    def _directory(self) -> Path:
        assert self.root is not None
        return self.root / self.fingerprint

    @property
    def origin(self) -> Origin:
        """Where these losses come from; empty in fp32 and fp64, where it does not matter."""
        return dict(self.fields.get("origin", {}))

    @property
    def is_narrow(self) -> bool:
        """Whether its losses are computed in bf16 or fp16."""
        return self.fields.get("dtype") in SIXTEEN_BITS

    def of(self, origin: Origin) -> TrialStore:
        """The store of the losses of one origin; in fp32 and fp64 it is this one."""
        if not self.is_narrow or self.origin == origin:
            return self
        name = fingerprint(origin)
        if name not in self._store_by_origin:
            fields = dict(self.fields)
            fields["origin"] = dict(origin)
            store = TrialStore(fields, self.rows, self.root)
            self._store_by_origin[name] = store
        return self._store_by_origin[name]

    def get(self, key: str) -> list[float] | None:
        """Loss of every row, NaN where unknown; None if nothing is known."""
        return self._facts.get(key)

    def known(self, key: str, start: int, stop: int) -> bool:
        """Whether all rows of [start, stop) are known."""
        if start >= stop:
            return True
        if key not in self._facts:
            return False
        losses = self._facts[key][start:stop]
        return not any(map(math.isnan, losses))

    @property
    def trials(self) -> int:
        """How many trials are known, on all rows or on some."""
        return len(self._facts)

    def put(
        self, key: str, rows: Sequence[int], loss: Iterable[float], seconds: float | None = None
    ) -> None:
        """Record some rows of a trial, and what they took; a kill after the return does not lose
        them."""
        losses = list(map(float, loss))
        row_keys = [self.rows[row] for row in rows]
        self._remember(key, row_keys, losses, seconds)
        if self.root is None:
            return
        if self._log is None:
            self._log = self._new_log()
        entry: dict[str, Any] = {"trial": key}
        start = rows[0]
        consecutive = range(start, start + len(rows))
        # Most trials are of consecutive rows: one number names them.
        if list(rows) == list(consecutive):
            entry["start"] = start
        else:
            entry["rows"] = list(rows)
        entry["loss"] = losses
        entry["seconds"] = seconds
        self._log.append(entry)

    def _new_log(self) -> Journal:
        description = self._directory / "fingerprint.json"
        if not description.exists():
            write_json(description, self._identity)
        # Names in the order of time, also of processes that begin at once.
        name = f"{time.time_ns()}-{secrets.token_hex(4)}.jsonl"
        header = {
            "fingerprint": self.fingerprint,
            "rows": list(self.rows),
        }
        return Journal(self._directory / name, header, SYNC_SECONDS)

    def close(self) -> None:
        for store in self._store_by_origin.values():
            store.close()
        if self._log is not None:
            self._log.close()

    def _read(self, path: Path) -> None:
        """Read the facts of a log. Of two facts of the same row the later log's stays."""
        journal = Journal(path, {"fingerprint": self.fingerprint})
        header = journal.read_header() or {}
        rows: Sequence[str] = header.get("rows", ())
        # A shared store has logs of many calibration sets: those without a row of this one are not
        # parsed.
        is_sound = header.get("fingerprint") == self.fingerprint
        is_foreign = self._positions_by_row.keys().isdisjoint(rows)
        if is_sound and is_foreign:
            return
        for entry in journal.read(self.problems):
            losses = entry["loss"]
            numbers = entry.get("rows")
            if numbers is None:
                start = entry["start"]
                numbers = range(start, start + len(losses))
            row_keys = [rows[number] for number in numbers]
            seconds = entry.get("seconds")
            self._remember(entry["trial"], row_keys, losses, seconds)

    def _remember(
        self, key: str, row_keys: list[str], losses: list[float], seconds: float | None
    ) -> None:
        """Keep the losses of those rows that are in this set."""
        if self._positions_by_row.keys().isdisjoint(row_keys):
            return
        unknown = [math.nan] * len(self.rows)
        facts = self._facts.setdefault(key, unknown)
        for row, loss in zip(row_keys, losses, strict=True):
            positions = self._positions_by_row.get(row, ())
            for position in positions:
                facts[position] = loss
        if seconds is not None:
            self.seconds.setdefault(key, 0.0)
            self.seconds[key] += seconds


def require_rows(rows: int) -> None:
    if rows < 1:
        raise InputError(
            "the calibration set has no row; raise calibration.num_samples or lower"
            " calibration.seq_len"
        )
