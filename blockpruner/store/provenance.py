"""Where a result came from: fingerprints of inputs, and the record of a stage's run.

Decides what a fingerprint is and what a record holds. A record carries time and argv; it lies in a
folder of its own (`data/provenance/`), on which no stage depends.
"""

import hashlib
import json
import platform
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
    found = {"python": platform.python_version()}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def environment(**facts: str) -> dict[str, str]:
    """Where a number is made: versions of the packages that compute (none is imported for it),
    processor, and `facts` that only the caller knows, as `models.placement`: the device, its name,
    the attention kernel."""
    return versions(COMPUTING) | {"processor": machine()} | facts


def made(**facts: str) -> dict[str, str]:
    """Where and when a result is made: its `environment`, the commit and the time. No key or
    fingerprint holds it."""
    return {"when": _now(), "commit": commit() or ""} | environment(**facts)


def commit() -> str | None:
    """The repository's commit, with "+" if code or settings differ from it; None outside of a
    repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        root = git("rev-parse", "--show-toplevel")
        dirty = git("-C", root, "status", "--porcelain", "--", *CODE_AND_SETTINGS)
        return git("rev-parse", "HEAD") + ("+" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def computing() -> dict[str, str]:
    """The versions of the packages that compute a loss, without their last part."""
    return {name: ".".join(version(name).split(".")[:2]) for name in ("torch", "transformers")}


def machine() -> str:
    """Processor model and number of cores: the label of a measurement."""
    return f"{len(_processors())} x {processor()}" if _processors() else processor()


def processor() -> str:
    return next(iter(_processors()), platform.processor() or platform.machine())


@cache
def _processors() -> tuple[str, ...]:
    """The model of each core, where the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return tuple(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def record(path: Path, inputs: Mapping[str, Any], at: str | None, seconds: float) -> None:
    """Write the record of one stage's run; `at` is the `commit` when it began."""
    run = {"finished": _now(), "seconds": round(seconds, 3), "argv": sys.argv, "commit": at}
    write_json(path, run | {"versions": versions(), "machine": machine(), "inputs": dict(inputs)})
