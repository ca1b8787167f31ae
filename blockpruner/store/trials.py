"""The trial store: exact facts (mask, row) -> loss, kept for ever and shared by every run and search.

Decides when a number may be reused: the store's fingerprint holds calibration content, model identity, dtype,
metric and SCORE_VERSION, never device, batch size or who asked. On disk it is a folder per fingerprint with one
append-only log per writing process, each line checksummed and synced, so that a kill loses at most the unit
being computed. It knows nothing of searches.
"""

from __future__ import annotations

import json
import math
import os
import socket
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from blockpruner.core.blocks import Mask, format_mask
from blockpruner.core.errors import InputError
from blockpruner.store.files import set_aside, storage_error, write_json
from blockpruner.store.provenance import fingerprint
from blockpruner.versions import SCORE_VERSION

TRIALS_VARIABLE = "BLOCKPRUNER_TRIALS"


def store_fingerprint(calibration: str, model: str, dtype: str, metric: str) -> dict[str, Any]:
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
    """data/trials, or the absolute path in BLOCKPRUNER_TRIALS, so that worktrees can share one store."""
    return Path(os.environ.get(TRIALS_VARIABLE) or "data/trials")


@dataclass
class TrialStore:
    """Per-row loss (float64, of one metric) by `trial_key`; rows are indices into the calibration set.

    Args:
        fields: as from `store_fingerprint`.
        rows: number of calibration rows.
        root: folder of all stores; None keeps the facts in memory only.
        problems: one line for each file or line that was found and not trusted.
    """

    fields: Mapping[str, Any]
    rows: int
    root: Path | None = None
    problems: list[str] = field(default_factory=list)
    _facts: dict[str, list[float]] = field(default_factory=dict)
    _units: Counter[str] = field(default_factory=Counter)
    _log: TextIO | None = None

    def __post_init__(self) -> None:
        self.fingerprint = fingerprint(self.fields)
        if self.root is None:
            return
        directory = self.root / self.fingerprint
        if not (directory / "fingerprint.json").exists():
            write_json(directory / "fingerprint.json", dict(self.fields) | {"rows": self.rows})
        for path in sorted(directory.glob("*.jsonl")):
            self._read(path)

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
        if self.root is None:
            return
        try:
            stream = self._open()
            stream.write(checksummed({"trial": key, "start": start, "loss": values}))
            stream.flush()
            os.fsync(stream.fileno())
        except OSError as error:
            log, self._log = self._log, None
            with suppress(OSError):  # closing writes the rest of the line again, which fails again
                if log is not None:
                    log.close()
            raise storage_error(self.root / self.fingerprint, error) from error

    def close(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None

    def _remember(self, key: str, start: int, values: list[float]) -> None:
        row = self._facts.setdefault(key, [math.nan] * self.rows)
        row[start : start + len(values)] = values
        self._units[key] += 1

    def _open(self) -> TextIO:
        if self._log is None:
            assert self.root is not None
            name = f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}.jsonl"
            self._log = open(self.root / self.fingerprint / name, "x", encoding="utf-8")  # noqa: SIM115
            self._log.write(checksummed({"fingerprint": self.fingerprint, "rows": self.rows}))
        return self._log

    def _read(self, path: Path) -> None:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        header = parse_checksummed(lines[0]) if lines else None
        if header is None or header.get("fingerprint") != self.fingerprint or header.get("rows") != self.rows:
            if len(lines) <= 1 and header is None:
                return  # its writer was stopped (or is) before the first line was whole: it holds no fact
            kept = set_aside(path)
            self.problems.append(
                f"{path} is not of store {self.fingerprint} (header {lines[0].strip()[:120] if lines else ''!r}); "
                f"set aside as {kept.name}, its trials are computed again"
            )
            return
        for number, line in enumerate(lines[1:], start=2):
            entry = parse_checksummed(line)
            if entry is not None and _is_unit(entry, self.rows):
                self._remember(entry["trial"], entry["start"], entry["loss"])
            elif number < len(lines):  # a torn last line is the unit that a kill interrupted
                self.problems.append(f"{path}, line {number}: damaged, or no trial; it is computed again")


def checksummed(value: Mapping[str, Any]) -> str:
    """A line of a log: the CRC-32 of the JSON text, then the text."""
    text = json.dumps(value, separators=(",", ":"))
    return f"{zlib.crc32(text.encode()):08x} {text}\n"


def parse_checksummed(line: str) -> dict[str, Any] | None:
    """What `checksummed` wrote, or None if the line is not whole."""
    checksum, _, text = line.rstrip("\n").partition(" ")
    if not line.endswith("\n") or checksum != f"{zlib.crc32(text.encode()):08x}":
        return None
    value = json.loads(text)
    return value if isinstance(value, dict) else None


def _is_unit(entry: Mapping[str, Any], rows: int) -> bool:
    """Whether a line is losses of some of the store's rows."""
    trial, start, loss = (entry.get(key) for key in ("trial", "start", "loss"))
    return (
        isinstance(trial, str)
        and isinstance(start, int)
        and isinstance(loss, list)
        and all(isinstance(value, float) for value in loss)
        and 0 <= start <= rows - len(loss)
    )


def require_rows(rows: int) -> None:
    if rows < 1:
        raise InputError("the calibration set has no row; raise calibration.num_samples or lower calibration.seq_len")
