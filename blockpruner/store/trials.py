"""The trial store: exact facts (mask, row) -> loss, kept for ever and shared by every run and search.

Decides when a number may be reused: the store's fingerprint holds calibration content, model identity, dtype,
metric and SCORE_VERSION, never device, batch size or who asked. On disk it is a folder for each fingerprint with one
log (`store.journal`) for each writing process. The store knows nothing of searches.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blockpruner.core.blocks import Mask, format_mask
from blockpruner.core.errors import InputError
from blockpruner.store.files import write_json, writer
from blockpruner.store.journal import Journal
from blockpruner.store.provenance import fingerprint
from blockpruner.versions import SCORE_VERSION

TRIALS_VARIABLE = "BLOCKPRUNER_TRIALS"
"""Environment variable: the absolute path of a trial store that several workspaces share."""


def store_fields(calibration: str, model: str, dtype: str, metric: str) -> dict[str, Any]:
    """What a trial's value depends on; its `provenance.fingerprint` names the store."""
    return {
        "calibration": calibration,
        "model": model,
        "dtype": dtype,
        "metric": metric,
        "score_version": SCORE_VERSION,
    }


def trial_key(mask: Mask, base: Mask | None = None) -> str:
    """What a trial is of: a mask, or a unit within what a base leaves ("mha.3,mlp.1|mha.7")."""
    return format_mask(mask) if base is None else f"{format_mask(base)}|{format_mask(mask)}"


def trials_root() -> Path:
    """The folder of all stores: data/trials, or where BLOCKPRUNER_TRIALS points."""
    return Path(os.environ.get(TRIALS_VARIABLE) or "data/trials")


@dataclass
class TrialStore:
    """The loss of every row (float64, of one metric) by `trial_key`; rows are indices into the calibration set."""

    fields: Mapping[str, Any]
    """As from `store_fields`."""
    rows: int
    """The number of calibration rows."""
    root: Path | None = None
    """The folder of all stores; None keeps the facts in memory only."""
    problems: list[str] = field(default_factory=list)
    """One line for each file or line that was found and not trusted."""
    _facts: dict[str, list[float]] = field(default_factory=dict)
    _units: Counter[str] = field(default_factory=Counter)
    _log: Journal | None = None

    def __post_init__(self) -> None:
        self.fingerprint = fingerprint(self.fields)
        if self.root is None:
            return
        directory = self.root / self.fingerprint
        if not (directory / "fingerprint.json").exists():
            write_json(directory / "fingerprint.json", dict(self.fields) | {"rows": self.rows})
        header = {"fingerprint": self.fingerprint, "rows": self.rows}
        for path in sorted(directory.glob("*.jsonl")):
            for unit in Journal(path, header).read(self._is_unit, self.problems):
                self._remember(unit["trial"], unit["start"], unit["loss"])
        self._log = Journal(directory / f"{writer()}-{time.time_ns()}.jsonl", header)

    def get(self, key: str) -> list[float] | None:
        """Loss of every row, NaN where unknown; None if nothing is known."""
        return self._facts.get(key)

    def known(self, key: str, start: int, stop: int) -> bool:
        return not self.unknown(key, start, stop)

    def unknown(self, key: str, start: int, stop: int) -> list[range]:
        """The runs of consecutive rows within [start, stop) that are not known, in order."""
        values = self.get(key)
        runs: list[range] = []
        for row in range(start, stop):
            if values is not None and not math.isnan(values[row]):
                continue
            if runs and runs[-1].stop == row:
                runs[-1] = range(runs[-1].start, row + 1)
            else:
                runs.append(range(row, row + 1))
        return runs

    def units(self, key: str) -> int:
        """In how many units the rows of a trial were recorded."""
        return self._units[key]

    def put(self, key: str, start: int, loss: Iterable[float]) -> None:
        """Record rows [start, start + len(loss)) of a trial; on return they are on disk."""
        values = [float(v) for v in loss]
        self._remember(key, start, values)
        if self._log is not None:
            self._log.append({"trial": key, "start": start, "loss": values})

    def close(self) -> None:
        if self._log is not None:
            self._log.close()

    def _remember(self, key: str, start: int, values: list[float]) -> None:
        row = self._facts.setdefault(key, [math.nan] * self.rows)
        row[start : start + len(values)] = values
        self._units[key] += 1

    def _is_unit(self, entry: Mapping[str, Any]) -> bool:
        """Whether a line is losses of some of the store's rows."""
        trial, start, loss = (entry.get(key) for key in ("trial", "start", "loss"))
        return (
            isinstance(trial, str)
            and isinstance(start, int)
            and isinstance(loss, list)
            and all(isinstance(value, float) for value in loss)
            and 0 <= start <= self.rows - len(loss)
        )


def require_rows(rows: int) -> None:
    if rows < 1:
        raise InputError("the calibration set has no row; raise calibration.num_samples or lower calibration.seq_len")
