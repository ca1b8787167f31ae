"""The results store: what an evaluation found, by the content of what was evaluated.

Decides what an entry is: <fingerprint of its key>.json with key and value. A task has also
<fingerprint>.parquet with its items; the JSON holds its digest and is written last. All runs share
the store, and it is safe to delete. What goes into a key is decided in `suite`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from blockpruner.core.errors import InputError
from blockpruner.store.files import read_json, read_table, set_aside, write_sealed_json, write_table
from blockpruner.store.provenance import file_sha256, fingerprint

ITEMS = pa.schema(
    [
        pa.field("task", pa.string(), nullable=False),
        pa.field("item", pa.int32(), nullable=False),
        pa.field("gold", pa.int32()),
        pa.field("loglikelihoods", pa.list_(pa.float64()), nullable=False),
        pa.field("acc", pa.float64()),
        pa.field("acc_norm", pa.float64()),
        pa.field("prompt_hash", pa.string(), nullable=False),
        pa.field("exact_match", pa.float64()),
        pa.field("response", pa.string()),
        pa.field("p_gold", pa.float64()),
    ]
)
"""One row per item of a task. Null is what the task does not have.

    item             its number in the split
    gold             index of the right choice
    loglikelihoods   log p of each choice given the context, or of the last word; nats
    acc, exact_match 0 or 1
    acc_norm         0 or 1, by loglikelihood per character of the choice
    prompt_hash      SHA-256 of the first choice's context
    response         what was generated
    p_gold           `benchmarks.Benchmark.confidence`
"""


@dataclass(frozen=True)
class Stored:
    """A result: JSON values, and the items of a task in the schema ITEMS."""

    value: dict[str, Any]
    items: pa.Table | None = None
    made: Mapping[str, str] = field(default_factory=dict)
    """Where and when it was computed, as from `provenance.made`; empty for what needs no device."""


class ResultsStore:
    """Entries in one folder. An entry that cannot be trusted is set aside and reported to
    `note`."""

    def __init__(self, directory: Path, note: Callable[[str], object]) -> None:
        self._directory = directory
        self._note = note

    def load(self, key: Mapping[str, Any]) -> Stored | None:
        path, items = self._paths(key)
        if not path.exists():
            return None
        try:
            entry = read_json(path, sealed=True)
            if entry["key"] != dict(key):
                raise InputError(f"{path} is not the result of this evaluation")
            if entry["items_sha256"] is None:
                return Stored(entry["value"], made=entry["made"])
            if not items.exists() or file_sha256(items) != entry["items_sha256"]:
                raise InputError(f"{items} is not the table that {path.name} names")
            return Stored(entry["value"], read_table(items, ITEMS)[0], entry["made"])
        except InputError as error:
            aside = [set_aside(file).name for file in (path, items) if file.exists()]
            self._note(f"{error}; set aside as {', '.join(aside)} and computed again")
            return None

    def save(self, key: Mapping[str, Any], result: Stored) -> None:
        """Write an entry; raises StorageError and leaves none if that fails."""
        path, items = self._paths(key)
        if result.items is not None:
            write_table(items, result.items)
        digest = None if result.items is None else file_sha256(items)
        content = {
            "key": dict(key),
            "value": result.value,
            "items_sha256": digest,
            "made": dict(result.made),
        }
        write_sealed_json(path, content)

    def _paths(self, key: Mapping[str, Any]) -> tuple[Path, Path]:
        name = fingerprint(key)
        return self._directory / f"{name}.json", self._directory / f"{name}.parquet"
