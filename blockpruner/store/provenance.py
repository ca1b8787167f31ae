"""Where a result came from: fingerprints of inputs, and the record of a stage's run.

Decides what a fingerprint is and what a record holds. A record carries time and argv; it lies in a
folder of its own (`data/provenance/`), on which no stage depends.
"""

import hashlib
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from blockpruner.store.files import write_json

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "datasets",
    "lm-eval",
    "pyarrow",
    "numpy",
    "dvc",
    "prefect",
)
COMPUTING = ("torch", "transformers", "lm-eval", "peft")
"""The packages of `environment`: those whose version may move a number."""

CODE_AND_SETTINGS = (
    "blockpruner",
    "study",
    "stages",
    "flows",
    "pyproject.toml",
    "dvc.yaml",
    "params.yaml",
    "runs/*.yaml",
)
"""What a commit answers for. Locks, metrics and pins are not in it: a run itself writes them."""


def fingerprint(value: Mapping[str, Any]) -> str:
    """16 hex digits of the SHA-256 of `value` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    result = {"python": platform.python_version()}
    for package in packages:
        # Extras need not be installed.
        with suppress(PackageNotFoundError):
            result[package] = version(package)
    return result


def environment(**facts: str) -> dict[str, str]:
    """Where a number is made: versions of the packages that compute (none is imported for it),
    processor, and `facts` that only the caller has, as `models.placement`: the device, its name,
    the attention kernel."""
    return versions(COMPUTING) | {"processor": machine()} | facts


def made(**facts: str) -> dict[str, str]:
    """Where and when a result is made: its `environment`, the commit and the time. It enters no key
    or fingerprint."""
    return {"when": _now(), "commit": commit() or "", **environment(**facts)}


def commit() -> str | None:
    """The repository's commit, with "+" if code or settings differ from it; None outside of a
    repository."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        return result.stdout.strip()

    try:
        root = git("rev-parse", "--show-toplevel")
        # Run from the root, since `commit` may be called in any folder of the repository.
        changes = git("-C", root, "status", "--porcelain", "--", *CODE_AND_SETTINGS)
        suffix = "+" if changes else ""
        return git("rev-parse", "HEAD") + suffix
    except (OSError, subprocess.CalledProcessError):
        return None


def computing() -> dict[str, str]:
    """The major and minor versions of the packages that compute a loss."""
    result = {}
    for name in ("torch", "transformers"):
        major, minor, *_ = version(name).split(".")
        result[name] = f"{major}.{minor}"
    return result


def machine() -> str:
    """Processor model and number of cores: the label of a measurement."""
    cores = len(_core_models())
    return f"{cores} x {processor()}" if cores else processor()


def processor() -> str:
    models = _core_models()
    return models[0] if models else platform.processor() or platform.machine()


@cache
def _core_models() -> list[str]:
    """The processor model of each core; empty on a system without /proc."""
    # `platform.processor` is empty or "x86_64" on Linux.
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    return [name.strip() for name in re.findall(r"^model name.*?:(.*)$", text, re.MULTILINE)]


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def record(path: Path, inputs: Mapping[str, Any], at: str | None, seconds: float) -> None:
    """Write the record of one stage's run; `at` is the `commit` when it began."""
    fields = {
        "finished": _now(),
        "seconds": round(seconds, 3),
        "argv": sys.argv,
        "commit": at,
        "versions": versions(),
        "machine": machine(),
        "inputs": dict(inputs),
    }
    write_json(path, fields)
