"""Stages of the DAG: each reads params and inputs, calls one library function and writes its output.

Decides only the places of files (see dvc.yaml) and how a stage begins and ends: errors for users without a
traceback, and a provenance record in data/provenance/, on which no stage depends.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from blockpruner.core.errors import InputError
from blockpruner.store.provenance import file_sha256, record

DATA = Path("data")
CACHE = DATA / "cache"
STUDIES = DATA / "studies"
PINS = Path("runs/pins.json")


def run(stage: str, main: Callable[[str], object]) -> None:
    """Run a stage for the item named on the command line (a run or a target; none for the report)."""
    item = sys.argv[1] if len(sys.argv) > 1 else ""
    name = f"{stage} {item}".rstrip()
    started = time.monotonic()
    try:
        main(item)
        settings = [Path("params.yaml"), *sorted(Path("runs").glob("*.yaml"))]
        inputs = {"stage": stage, "item": item, "sha256": {str(path): file_sha256(path) for path in settings}}
        record(DATA / "provenance" / f"{stage}{'@' if item else ''}{item}.json", inputs, time.monotonic() - started)
    except InputError as error:
        print(f"error in stage {name}: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"stage {name} interrupted; what is finished is kept: run again to go on", file=sys.stderr)
        sys.exit(130)
