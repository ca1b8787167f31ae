"""The trial store: exact facts (mask, row) -> loss, kept for ever and shared by every run, search and calibration set.

Decides when a number may be reused. A store is of one model, dtype and metric and of one SCORE_VERSION; a row is known
by its content, so a larger calibration set finds what a smaller one scored. On disk a store is a folder with one log
(`store.journal`) for each writing process, which names its rows and its environment (versions, device, attention
kernel, batch shape). In 16 bits these move a loss by as much as two candidates differ, so facts of different
environments are never compared with each other. The store knows nothing of searches.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from blockpruner.core.blocks import Mask, format_mask
from blockpruner.core.errors import InputError
from blockpruner.store.files import write_json, writer
from blockpruner.store.journal import Journal
from blockpruner.store.provenance import environment, fingerprint
from blockpruner.versions import SCORE_VERSION

TRIALS_VARIABLE = "BLOCKPRUNER_TRIALS"
"""Environment variable: the absolute path of a trial store that several workspaces share."""

SYNC_SECONDS = 1.0
"""A cut of power loses the trials of at most this time."""

SIXTEEN_BITS = ("bfloat16", "float16")


def store_fields(calibration: str, model: str, dtype: str, metric: str) -> dict[str, Any]:
    """What the trials of a search depend on. All but the calibration names their store."""
    return {
        "calibration": calibration,
        "model": model,
        "dtype": dtype,
        "metric": metric,
        "score_version": SCORE_VERSION,
    }


def trial_key(mask: Mask, base: Mask | None = None, wide: bool = False) -> str:
    """What a trial is of: a mask, or a unit within what a base leaves ("mha.3,mlp.1|mha.7").

    Args:
        wide: computed in float32 with the weights of a model in 16 bits ("float32 mha.3,mlp.1").
    """
    if wide:
        return f"float32 {format_mask(mask)}"
    return format_mask(mask) if base is None else f"{format_mask(base)}|{format_mask(mask)}"


def trials_root() -> Path:
    """The folder of all stores: data/trials, or where BLOCKPRUNER_TRIALS points."""
    return Path(os.environ.get(TRIALS_VARIABLE) or "data/trials")


def batch_words(tokens: int) -> str:
    """How an environment names its batches."""
    return f"{tokens} tokens to a batch"


def batch_tokens(facts: Mapping[str, Any]) -> int | None:
    """The number in an environment's `batch_words`."""
    found = re.match(r"\d+(?= tokens)", str(facts.get("batch", "")))
    return int(found[0]) if found else None


def origin(facts: Mapping[str, Any]) -> str:
    """The part of an environment that moves a loss in 16 bits, in words."""
    if not facts:
        return "an unknown environment"
    versions = [f"{name} {'.'.join(facts[name].split('.')[:2])}" for name in ("torch", "transformers") if name in facts]
    if facts.get("device") == "cpu" and "processor" in facts:
        facts = {**facts, "device_name": re.sub(r"^\d+ x ", "", facts["processor"])}
    return ", ".join([*versions, *(str(facts[key]) for key in ("device_name", "attention", "batch") if key in facts)])


@dataclass
class TrialStore:
    """The loss of every row (float64, of one metric) by `trial_key`."""

    fields: Mapping[str, Any]
    """As from `store_fields`; the model is the `Identity.before`, as in older stores and in searches."""
    rows: Sequence[str]
    """The calibration set's `row_keys`, in order. Facts are asked for and recorded by position in it."""
    root: Path | None = None
    """The folder of all stores; None keeps the facts in memory only."""
    model: str | None = None
    """The model's `Identity.now`, which names the store; None: it is the one in `fields`."""
    problems: list[str] = field(default_factory=list)
    """One line for each file or line that was found and not trusted."""
    _facts: dict[str, list[float]] = field(default_factory=dict)
    _origins: dict[str, list[str | None]] = field(default_factory=dict)
    _units: Counter[str] = field(default_factory=Counter)
    _batches: dict[str, int | None] = field(default_factory=dict)
    _placement: Mapping[str, str] = field(default_factory=dict)
    _origin: str = ""
    _log: Journal | None = None

    def __post_init__(self) -> None:
        before = {**self.fields, "calibration": "by row"}
        facts = before | ({} if self.model is None else {"model": self.model})
        self.fingerprint = fingerprint(facts)
        self._origin = self._origin_of({})
        self._places: dict[str, list[int]] = {}
        for place, row in enumerate(self.rows):
            self._places.setdefault(row, []).append(place)
        if self.root is None:
            return
        if not (self._directory / "fingerprint.json").exists():
            write_json(self._directory / "fingerprint.json", facts)
        self._read(self.root / fingerprint(self.fields), by_number=True)  # as stores were before rows had keys
        for name in dict.fromkeys((fingerprint(before), self.fingerprint)):
            self._read(self.root / name, by_number=False)

    @property
    def _directory(self) -> Path:
        assert self.root is not None
        return self.root / self.fingerprint

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

    def units(self, key: str) -> int:
        """In how many units the rows of a trial were recorded."""
        return self._units[key]

    def origins(self, keys: Iterable[str], rows: int) -> Counter[str]:
        """Where the known facts of the first `rows` rows were computed, with their numbers; one "" in 32 or 64 bits."""
        return Counter(place for key in keys for place in self._origins.get(key, ())[:rows] if place is not None)

    def keep_only(self, keys: Iterable[str], place: str) -> int:
        """Forget the facts of these trials that were computed elsewhere; return how many. On disk they stay."""
        forgotten = 0
        for key in keys:
            for row, found in enumerate(self._origins.get(key, ())):
                if found is not None and found != place:
                    self._facts[key][row], self._origins[key][row] = math.nan, None
                    forgotten += 1
        return forgotten

    def computed_by(self, placement: Mapping[str, str]) -> str:
        """Say where the facts to come are computed (`Scorer.placement`); return its `origin`."""
        if placement != self._placement:
            self.close()
            self._log, self._placement = None, dict(placement)
            self._environment = environment(**placement)
            self._origin = self._origin_of(self._environment)
            self._batches[str(placement.get("device"))] = batch_tokens(placement)
        return self._origin

    def batches_on(self, device: str) -> int | None:
        """The tokens to a batch in which this kind of device last computed 16-bit facts; a resumed run takes no more.

        They are those of the latest log, whatever the size of the card: in 16 bits, a batch's shape moves a loss.
        """
        return self._batches.get(device) if self.fields.get("dtype") in SIXTEEN_BITS else None

    def put(self, key: str, rows: Sequence[int], loss: Iterable[float]) -> None:
        """Record some rows of a trial; a kill after the return does not lose them."""
        values = [float(v) for v in loss]
        self._remember(key, [self.rows[row] for row in rows], values, self._origin)
        if self.root is None:
            return
        if self._log is None:
            header: dict[str, Any] = {"fingerprint": self.fingerprint, "rows": list(self.rows)}
            if self._placement:
                header["environment"] = self._environment
            self._log = Journal(self._directory / f"{writer()}-{time.time_ns()}.jsonl", header, SYNC_SECONDS)
        where = {"start": rows[0]} if list(rows) == list(range(rows[0], rows[0] + len(rows))) else {"rows": list(rows)}
        self._log.append({"trial": key, **where, "loss": values})

    def close(self) -> None:
        if self._log is not None:
            self._log.close()

    def _origin_of(self, facts: Mapping[str, Any]) -> str:
        return origin(facts) if self.fields.get("dtype") in SIXTEEN_BITS else ""

    def _read(self, directory: Path, by_number: bool) -> None:
        """Take over the facts of a folder's logs. Of two facts of the same row the later log's is kept."""
        for path in sorted(directory.glob("*.jsonl"), key=lambda path: (_started(path), path.name)):
            journal = Journal(path, {"fingerprint": directory.name} | ({"rows": len(self.rows)} if by_number else {}))
            header = journal.first() or {}
            facts = header.get("environment", {})
            self._batches[str(facts.get("device"))] = batch_tokens(facts)
            rows: Sequence[str] = self.rows if by_number else header.get("rows", ())
            if not by_number and header.get("fingerprint") == directory.name and self._places.keys().isdisjoint(rows):
                continue
            place = self._origin_of(facts)
            for unit in journal.read(partial(_is_unit, rows=len(rows)), self.problems):
                self._remember(unit["trial"], [rows[row] for row in _rows_of(unit)], unit["loss"], place)

    def _remember(self, key: str, rows: Sequence[str], values: Sequence[float], place: str) -> None:
        """Keep the values of rows by their keys; a row that stands twice in the set is known at both places."""
        known = [(at, value) for row, value in zip(rows, values, strict=True) for at in self._places.get(row, ())]
        if known:
            facts = self._facts.setdefault(key, [math.nan] * len(self.rows))
            origins = self._origins.setdefault(key, [None] * len(self.rows))
            for at, value in known:
                facts[at], origins[at] = value, place
            self._units[key] += 1


def _started(path: Path) -> int:
    """When a log was begun, in nanoseconds; 0 for a name that does not tell."""
    number = path.stem.rpartition("-")[2]
    return int(number) if number.isdecimal() else 0


def _rows_of(entry: Mapping[str, Any]) -> Sequence[int]:
    """The numbers of a line's rows in its log: from a first one on, or one by one."""
    if "rows" in entry:
        rows: Sequence[int] = entry["rows"]
        return rows
    return range(entry["start"], entry["start"] + len(entry["loss"]))


def _is_unit(entry: Mapping[str, Any], rows: int) -> bool:
    """Whether a line is losses of some of a log's rows."""
    trial, start, loss = (entry.get(key) for key in ("trial", "start", "loss"))
    numbers = entry.get("rows", [start])
    return (
        isinstance(trial, str)
        and isinstance(loss, list)
        and all(isinstance(value, float) for value in loss)
        and isinstance(numbers, list)
        and all(isinstance(number, int) for number in numbers)
        and len(_rows_of(entry)) == len(loss)
        and all(0 <= row < rows for row in _rows_of(entry))
    )


def require_rows(rows: int) -> None:
    if rows < 1:
        raise InputError("the calibration set has no row; raise calibration.num_samples or lower calibration.seq_len")
