"""Which files a checkpoint is: the manifest (name and SHA-256 of every file), and the identity that
follows from it.

Decides when two checkpoints are the same, and whether one still is what was written. The manifest
is recorded when a model is fetched and when an export is verified. Layout and version of
transformers in a config do not enter it.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from blockpruner.core.errors import InputError
from blockpruner.store.files import read_checked
from blockpruner.store.provenance import file_sha256

SOURCE_FILE = "blockpruner_source.json"
REPORT_FILE = "verification.json"
CARD_FILE = "README.md"
BESIDE = (SOURCE_FILE, REPORT_FILE, CARD_FILE)
"""Files about a checkpoint, which are no part of it. A person may edit the card."""

Manifest = Mapping[str, str]

SETTLED = 2.0
"""Seconds after its last change from which on a file has another time if it changes again."""

_KNOWN: dict[str, str] = {}
"""SHA-256 of weights by device, inode, size and times: each process reads a shard of gigabytes
once. It is not kept on disk: `cp -p` into a file gives it its old time of modification, and a disk
may lose bits without any new time."""


def digests(paths: Mapping[str, Path]) -> dict[str, str]:
    """The `content_sha256` of files by name; a thread reads each of a few at a time."""
    with ThreadPoolExecutor() as pool:
        return dict(zip(paths, pool.map(content_sha256, paths.values()), strict=True))


def _weights_sha256(path: Path) -> str:
    found = path.stat()
    stamp = f"{found.st_dev}-{found.st_ino}-{found.st_size}-{found.st_mtime_ns}-{found.st_ctime_ns}"
    digest = _KNOWN.get(stamp) or file_sha256(path)
    if time.time() - found.st_ctime > SETTLED:
        _KNOWN[stamp] = digest
    return digest


def content_sha256(path: Path) -> str:
    """SHA-256 of a file; of a config: of its fields, whatever their layout, without the version of
    transformers."""
    if path.name.endswith("config.json"):
        with suppress(ValueError, RecursionError):  # it is no JSON
            return fields_sha256(json.loads(path.read_text(encoding="utf-8")))
    return _weights_sha256(path) if path.suffix == ".safetensors" else file_sha256(path)


def fields_sha256(config: Any) -> str:
    """As `content_sha256`, of a config's fields."""
    content = json.dumps(_without_version(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()


def _without_version(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {
        key: _without_version(part) for key, part in value.items() if key != "transformers_version"
    }


def manifest(directory: Path) -> dict[str, str]:
    """Every file of a checkpoint directory, also in folders, with its digest; hidden files are
    none."""
    names = {
        path.relative_to(directory): path for path in sorted(directory.rglob("*")) if path.is_file()
    }
    shown = {
        name.as_posix(): path
        for name, path in names.items()
        if not any(part[0] == "." for part in name.parts)
    }
    return digests({name: path for name, path in shown.items() if name not in BESIDE})


def model_identity(files: Manifest) -> str:
    """SHA-256 over what a forward pass depends on: config, weights and code."""
    ends = (".safetensors", ".safetensors.index.json", ".py")
    return _digest(files, [name for name in files if name == "config.json" or name.endswith(ends)])


def weights_identity(files: Manifest) -> str:
    """SHA-256 over the files of weights alone."""
    return _digest(files, [name for name in files if name.endswith(".safetensors")])


def _digest(files: Manifest, names: Iterable[str]) -> str:
    return hashlib.sha256(
        "".join(f"{name}:{files[name]}\n" for name in sorted(names)).encode()
    ).hexdigest()


class EngineReport(BaseModel):
    """What readers need of an engine's report."""

    ok: bool | None
    engine: str
    unchecked: str = ""
    manifest: dict[str, str]


def require_verified(directory: Path) -> dict[str, str]:
    """The manifest of an export; raises InputError unless its files are those that were
    verified."""
    files = manifest(directory)
    known = read_checked(directory / REPORT_FILE, EngineReport, sealed=True)["manifest"]
    changed = sorted(
        name for name in known.keys() | files.keys() if known.get(name) != files.get(name)
    )
    if changed:
        raise InputError(
            f"{directory} is not what was verified: {', '.join(changed[:5])} changed, or came or"
            " went since; move files of your own elsewhere, or export it again (its stage"
            " materialize)"
        )
    return files
