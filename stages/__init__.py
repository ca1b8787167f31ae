"""Stages of the DAG: each reads settings and inputs, calls one library function and writes its
output.

Decides the places of files (see dvc.yaml) and how a stage begins and ends. A user's error ends in
one line without a traceback, and leaves its reason in data/provenance/failed/ until the stage
succeeds. A stage whose settings changed while it ran refuses to finish. A stage that finishes
leaves a record in data/provenance/, of the commit and the files that it began with; no stage
depends on it.
"""

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, cast

from blockpruner.config.dag import require_current
from blockpruner.config.params import load_params, load_sections
from blockpruner.config.sections import Scored, Sections, Target
from blockpruner.core.errors import InputError
from blockpruner.core.plan import Plan
from blockpruner.core.settings import Runtime
from blockpruner.store import provenance
from blockpruner.store.files import explained, read_json, write_json
from blockpruner.store.plans import load_plan
from blockpruner.store.provenance import file_sha256

DATA = Path("data")
CACHE = DATA / "cache"
SETTINGS = DATA / "settings"
FAILED = DATA / "provenance" / "failed"
PINS = Path("runs/pins.json")

T = TypeVar("T")

_SETTINGS_READ: list[tuple[str, Any, Callable[[], Any]]] = []
"""The settings that the running stage has read: their file, their value, and how to read them
again."""


def run(stage: str, main: Callable[[str], object]) -> None:
    """Run a stage for an item (a run or a target; none for the report), named by hand or by DVC:
    `<stage>@<item>`."""
    item = os.environ.get("DVC_STAGE", "").rpartition(":")[2].partition("@")[2]
    if len(sys.argv) > 1:
        item = sys.argv[1]
    name = f"{stage} {item}".rstrip()
    entry = f"{stage}{'@' if item else ''}{item}.json"
    started = time.monotonic()
    _SETTINGS_READ.clear()
    try:
        files = [Path("params.yaml"), *sorted(Path("runs").glob("*.yaml"))]
        digests = {str(path): file_sha256(path) for path in files if path.exists()}
        inputs: dict[str, Any] = {"stage": stage, "item": item, "sha256": digests}
        commit = provenance.commit()
        # A stale dag.yaml would give the stage another run, or other searches.
        require_current()
        main(item)
        inputs["settings"] = sorted({file for file, _, _ in _SETTINGS_READ})
        # DVC records the settings as they are now: results of others must not be filed under them.
        for file, value, read in _SETTINGS_READ:
            if read() != value:
                raise InputError(
                    f"{file} changed while running: run again", rule="settings-changed", key=file
                )
        provenance.record(DATA / "provenance" / entry, inputs, commit, time.monotonic() - started)
        (FAILED / entry).unlink(missing_ok=True)
    except Exception as raised:
        error = explained(raised, DATA / "provenance")
        # a full disk must not hide the reason, which is printed too
        with suppress(InputError, OSError):
            write_json(FAILED / entry, {"reason": str(error)})
        print(f"error in stage {name}: {error}{_advice(error)}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        print(
            f"stage {name} interrupted; what is finished is kept: run again to go on",
            file=sys.stderr,
        )
        sys.exit(130)


def _advice(error: InputError) -> str:
    """How a file of the DAG is made again; nothing of other files."""
    path = Path(str(error.value))
    # Files of the user are for the user to mend.
    if not path.is_relative_to(DATA):
        return ""
    if error.rule == "missing-file":
        return "; run `dvc repro`, which makes it"
    if error.rule == "damaged-file" and path.exists():
        return "; delete it and run `dvc repro`"
    return ""


def failures() -> list[str]:
    """A line for each stage that failed when it ran last. For people: no output holds it."""
    return [
        f"{path.stem} failed: {read_json(path)['reason']}" for path in sorted(FAILED.glob("*.json"))
    ]


def resolved(run: str, section: str) -> Sections:
    """The settings of a run, of which one section's file is checked now and when the stage ends."""
    path = SETTINGS / run / f"{section}.json"
    values = load_sections(run)
    text = values.texts()[section]
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        message = f"{path} is not what runs/{run}.yaml and params.yaml ask for"
        raise InputError(
            f"{message}; run `dvc repro settings@{run}`", rule="settings-stale", key=section
        )
    _SETTINGS_READ.append((str(path), text, lambda: load_sections(run).texts()[section]))
    return values


class _Read:
    """The sections of a run; a stage depends in dvc.yaml on the file of each that it reads."""

    def __init__(self, run: str) -> None:
        self.run = run

    def __getattr__(self, section: str) -> Any:
        return getattr(resolved(self.run, section), section)


def sections(run: str) -> Sections:
    """The settings of a run. A section is checked against its file when it is read and when the
    stage ends."""
    return cast(Sections, _Read(run))


def searched(run: str, method: str) -> Scored:
    """The searches of one method of a run."""
    return resolved(run, f"searches/{method}").searches[method]


def runtime() -> Runtime:
    """The runtime of a stage whose results the machine moves; refused on another machine than
    dag.yaml names."""
    from blockpruner.model.models import set_threads  # loads torch

    require_current(machine=True)
    settings = load_params().runtime
    set_threads(settings.threads)  # SliceGPT's result depends on them
    return settings


def write_manifest(group: str, name: str, *paths: Path) -> None:
    """Write what `tables` and `report` depend on: the digests of a model's evidence, and of
    `paths`, which they read, too."""
    files = sorted((DATA / "evidence" / name).iterdir())
    digests = {path.relative_to(DATA).as_posix(): file_sha256(path) for path in (*files, *paths)}
    write_json(DATA / "manifests" / group / f"{name}.json", digests)


def kept_plan(name: str) -> Plan:
    """The plan of a target that the stage compensate keeps."""
    return load_plan(DATA / "compensated" / name / "plan.json")


def checked(file: str, read: Callable[[], T]) -> T:
    """A value of a file of settings, which is checked again when the stage ends."""
    value = read()
    _SETTINGS_READ.append((file, value, read))
    return value


def target(name: str) -> Target:
    return checked(f"params.yaml: targets.{name}", lambda: load_params().target(name))
