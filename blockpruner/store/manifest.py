"""The manifest of a checkpoint (name and SHA-256 of every file), and the identity that follows from
it.

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
HEALED_PLAN, COMPENSATE_FACTS, TRAIN_FACTS = "plan.json", "compensate.json", "train.json"
"""The plan and the facts of a healing, in the folder of its weights."""
BESIDE = (SOURCE_FILE, REPORT_FILE, CARD_FILE)
"""Files about a checkpoint, which are not in its manifest. A person may edit the card."""

Manifest = Mapping[str, str]

SETTLED = 2.0
"""Seconds after its last change from which on a file has another time if it changes again."""

_KNOWN: dict[tuple[int, ...], str] = {}
"""SHA-256 of weights by device, inode, size and times: each process reads a shard of gigabytes
once. It is not kept on disk: `cp -p` into a file gives it its old time of modification, and a disk
may lose bits without any new time."""


def digests(paths: Mapping[str, Path]) -> dict[str, str]:
    """The `content_sha256` of files by name; threads read several at a time."""
    with ThreadPoolExecutor() as pool:
        results = pool.map(content_sha256, paths.values())
        return dict(zip(paths, results, strict=True))


def _weights_sha256(path: Path) -> str:
    status = path.stat()
    stamp = (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )
    digest = _KNOWN.get(stamp) or file_sha256(path)
    if time.time() - status.st_ctime > SETTLED:
        _KNOWN[stamp] = digest
    return digest


def content_sha256(path: Path) -> str:
    """SHA-256 of a file; of a config: of its fields, whatever their layout, without the version of
    transformers."""
    if path.name.endswith("config.json"):
        # A file that is no JSON is read as bytes below.
        with suppress(ValueError, RecursionError):
            return fields_sha256(json.loads(path.read_text(encoding="utf-8")))
    if path.suffix == ".safetensors":
        return _weights_sha256(path)
    return file_sha256(path)


def fields_sha256(config: Any) -> str:
    """As `content_sha256`, of a config's fields."""
    content = json.dumps(_without_version(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()


def _without_version(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    fields = {key: _without_version(value) for key, value in config.items()}
    fields.pop("transformers_version", None)
    return fields


def manifest(directory: Path) -> dict[str, str]:
    """The digest of every file of a checkpoint directory, also in folders; hidden files are left
    out."""
    paths = {}
    for path in sorted(directory.rglob("*")):
        relative = path.relative_to(directory)
        is_hidden = any(name.startswith(".") for name in relative.parts)
        if path.is_file() and not is_hidden and str(relative) not in BESIDE:
            paths[relative.as_posix()] = path
    return digests(paths)


def model_identity(files: Manifest) -> str:
    """SHA-256 over what a forward pass depends on: config, weights and code."""
    suffixes = (".safetensors", ".safetensors.index.json", ".py")
    names = [name for name in files if name.endswith(suffixes)]
    if "config.json" in files:
        names.append("config.json")
    return _digest(files, names)


def weights_identity(files: Manifest) -> str:
    """SHA-256 over the files of weights alone."""
    names = [name for name in files if name.endswith(".safetensors")]
    return _digest(files, names)


def _digest(files: Manifest, names: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(f"{name}:{files[name]}\n".encode())
    return digest.hexdigest()


class EngineReport(BaseModel):
    """The fields of an engine's report that are read later."""

    ok: bool | None
    engine: str
    unchecked: str = ""
    manifest: dict[str, str]


def require_verified(directory: Path) -> dict[str, str]:
    """The manifest of an export; raises InputError unless its files are those that were
    verified."""
    files = manifest(directory)
    report = read_checked(directory / REPORT_FILE, EngineReport, sealed=True)
    verified = report["manifest"]
    # Files that changed, came or went.
    differences = verified.items() ^ files.items()
    changed = sorted({name for name, _ in differences})
    if changed:
        raise InputError(
            f"{directory} is not what was verified: {', '.join(changed[:5])} changed, or came or"
            " went since; move files of your own elsewhere, or export it again (its stage"
            " materialize)"
        )
    return files
