"""Stages of the DAG: each reads settings and inputs, calls one library function and writes its output.

Decides the places of files (see dvc.yaml) and how a stage begins and ends. A user's error ends in one line without a
traceback. DVC hashes settings when a stage ends, so a stage whose settings or modules changed while it ran refuses to
finish. A stage that finishes leaves a record in data/provenance/, of the commit and the files that it began with; no
stage depends on it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from blockpruner import versions
from blockpruner.core.errors import InputError
from blockpruner.params import load_params
from blockpruner.store import provenance
from blockpruner.store.provenance import file_sha256

DATA = Path("data")
CACHE = DATA / "cache"
TIMINGS = DATA / "timings"
"""What no two runs agree on: speeds, dates, what a search had to compute. DVC and git have none of it, so that outputs
are functions of their inputs."""

PINS = Path("runs/pins.json")

CODE = (Path(__file__).parent, Path(versions.__file__).parent)
"""Folders whose modules a stage may load."""


def run(stage: str, main: Callable[[str], object]) -> None:
    """Run a stage for an item (a run or a target; none for the report), named by hand or by DVC: `<stage>@<item>`."""
    item = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DVC_STAGE", "").rpartition(":")[2].partition("@")[2]
    name = f"{stage} {item}".rstrip()
    started = time.monotonic()
    try:
        modules = _hashes(path for folder in CODE for path in folder.rglob("*.py"))
        settings = _settings(stage, item)
        files = [Path("params.yaml"), *sorted(Path("runs").glob("*.yaml"))]
        digests = {str(path): digest for path, digest in _hashes(files).items()}
        inputs, commit = {"stage": stage, "item": item, "sha256": digests}, provenance.commit()
        main(item)
        _require_same(settings, _settings(stage, item))
        _require_same(modules, _hashes(_loaded()))
        path = DATA / "provenance" / f"{stage}{'@' if item else ''}{item}.json"
        provenance.record(path, inputs, commit, time.monotonic() - started)
    except InputError as error:
        print(f"error in stage {name}: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"stage {name} interrupted; what is finished is kept: run again to go on", file=sys.stderr)
        sys.exit(130)


def _settings(stage: str, item: str) -> dict[Path, Any]:
    """The settings that the pipeline says a stage depends on, by file; none for a stage outside the DAG."""
    pipeline = _values(Path("dvc.yaml"))
    found: dict[Path, Any] = {}
    for entry in pipeline.get("stages", {}).values():
        definition = entry.get("do", entry)
        if definition["cmd"].split()[2] != f"stages.{stage}":
            continue
        name = load_params().target(item).run if "do" in entry else item
        for file, keys in (pair for dependency in definition["params"] for pair in dependency.items()):
            path = Path(file.replace("${item.run}", name))
            if path.suffix == ".yaml":
                found[path] = {key: value for key, value in _values(path).items() if keys is None or key in keys}
    return found


def _values(path: Path) -> dict[str, Any]:
    """What a YAML file holds; nothing if the file is absent or damaged, which the stage itself reports."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _hashes(paths: Iterable[Path]) -> dict[Path, str]:
    """Digests of the files, "" for a file that is gone."""
    return {path: file_sha256(path) if path.exists() else "" for path in paths}


def _loaded() -> Iterator[Path]:
    """Files of the project's modules that this process has loaded, versions.py among them."""
    for module in list(sys.modules.values()):
        path = Path(getattr(module, "__file__", None) or "")
        if any(folder in path.parents for folder in CODE):
            yield path


def _require_same(before: dict[Path, Any], after: dict[Path, Any]) -> None:
    for path, value in after.items():
        if before.get(path) != value:
            raise InputError(f"{os.path.relpath(path)} changed while running: run again")
