"""Where a result came from: fingerprints of inputs, and the record of a stage's run.

Decides what a fingerprint is and what a record holds. A record carries time and argv; it lies in a folder of its own
(`data/provenance/`), on which no stage depends.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from blockpruner.store.files import write_json

PACKAGES = ("torch", "transformers", "peft", "datasets", "lm-eval", "pyarrow", "numpy", "dvc", "prefect")


def fingerprint(value: Mapping[str, Any]) -> str:
    """16 hex digits of the SHA-256 of `value` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def model_identity(directory: Path) -> str:
    """SHA-256 over config, weights and code of a checkpoint directory: names and contents, in sorted order."""
    digest = hashlib.sha256()
    for path in sorted([directory / "config.json", *directory.glob("*.safetensors"), *directory.glob("*.py")]):
        digest.update(f"{path.name}:{file_sha256(path)}\n".encode())
    return digest.hexdigest()


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def commit() -> str | None:
    """The repository's commit, with "+" if the working tree differs from it; None outside of a repository."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def machine() -> str:
    """Processor model and number of cores: the label of a measurement."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        if lines:
            name = f"{len(lines)} x {lines[0].partition(':')[2].strip()}"
    return name


def record(path: Path, inputs: Mapping[str, Any], seconds: float) -> None:
    """Write the record of one stage's run."""
    write_json(
        path,
        {
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": round(seconds, 3),
            "argv": sys.argv,
            "commit": commit(),
            "versions": versions(),
            "machine": machine(),
            "inputs": dict(inputs),
        },
    )
