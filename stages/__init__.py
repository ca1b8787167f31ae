"""Stages of the DAG: each reads settings and inputs, calls one library function and writes its output.

Decides the places of files (see dvc.yaml) and how a stage begins and ends. A user's error ends in one line without a
traceback. A stage whose settings changed while it ran refuses to finish. A stage that finishes leaves a record in
data/provenance/, of the commit and the files that it began with; no stage depends on it.
"""

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, cast

from blockpruner.core.errors import InputError
from blockpruner.core.plan import Plan
from blockpruner.params import load_params, load_sections
from blockpruner.settings import Sections, Target
from blockpruner.store import provenance
from blockpruner.store.files import explained, write_json
from blockpruner.store.plans import load_plan
from blockpruner.store.provenance import file_sha256

DATA = Path("data")
CACHE = DATA / "cache"
SETTINGS = DATA / "settings"
PINS = Path("runs/pins.json")

T = TypeVar("T")

_GIVEN: list[tuple[str, Any, Callable[[], Any]]] = []
"""The settings that the running stage has read: where they are from, what they were, and how they are read again."""


def run(stage: str, main: Callable[[str], object]) -> None:
    """Run a stage for an item (a run or a target; none for the report), named by hand or by DVC: `<stage>@<item>`."""
    item = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DVC_STAGE", "").rpartition(":")[2].partition("@")[2]
    name = f"{stage} {item}".rstrip()
    started = time.monotonic()
    _GIVEN.clear()
    try:
        files = [path for path in (Path("params.yaml"), *sorted(Path("runs").glob("*.yaml"))) if path.exists()]
        digests = {str(path): file_sha256(path) for path in files}
        inputs: dict[str, Any] = {"stage": stage, "item": item, "sha256": digests}
        commit = provenance.commit()
        main(item)
        inputs["settings"] = sorted({where for where, _, _ in _GIVEN})
        for where, given, again in _GIVEN:
            if again() != given:
                raise InputError(f"{where} changed while running: run again", rule="settings-changed", key=where)
        path = DATA / "provenance" / f"{stage}{'@' if item else ''}{item}.json"
        provenance.record(path, inputs, commit, time.monotonic() - started)
    except Exception as raised:
        error = explained(raised, DATA / "provenance")
        if not error.rule.startswith(("settings-", "unforeseen")):  # which the next run, or version, mends
            _leave_reason(stage, item, str(error))
        print(f"error in stage {name}: {error}{_advice(error)}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"stage {name} interrupted; what is finished is kept: run again to go on", file=sys.stderr)
        sys.exit(130)


def _advice(error: InputError) -> str:
    """How a file of the DAG is made again; nothing of other files."""
    path = Path(str(error.value))
    if not path.is_relative_to(DATA):
        return ""
    if error.rule == "missing-file":
        return "; run `dvc repro`, which makes it"
    return "; delete it and run `dvc repro`" if error.rule == "damaged-file" and path.exists() else ""


def _leave_reason(stage: str, item: str, reason: str) -> None:
    """Write why a target, or each of a run, was not measured, where its evidence belongs; `tables` shows it."""
    if stage in ("clean", "report", "tables"):
        return
    from blockpruner.reporting.paper.evidence import FAILED  # loads much

    with suppress(InputError):
        targets = load_params().targets
        for name in (name for name, target in targets.items() if item in (name, target.run)):
            write_json(DATA / "evidence" / name / FAILED, {"stage": stage, "reason": reason})


class _Read:
    """The sections of a run; a stage depends in dvc.yaml on the file of each that it reads."""

    def __init__(self, run: str) -> None:
        self.run, self.values = run, load_sections(run)

    def __getattr__(self, section: str) -> Any:
        path = SETTINGS / self.run / f"{section}.json"
        given = self.values.text(section)
        if not path.exists() or path.read_text(encoding="utf-8") != given:
            message = f"{path} is not what runs/{self.run}.yaml and params.yaml ask for"
            raise InputError(f"{message}; run `dvc repro settings@{self.run}`", rule="settings-stale", key=section)
        _GIVEN.append((str(path), given, lambda: load_sections(self.run).text(section)))
        return getattr(self.values, section)


def sections(run: str) -> Sections:
    """The settings of a run. A section is checked against its file when it is read and when the stage ends."""
    return cast(Sections, _Read(run))


def kept_plan(name: str) -> Plan:
    """The plan of a target that the stage compensate keeps."""
    return load_plan(DATA / "compensated" / name / "plan.json")


def given(where: str, read: Callable[[], T]) -> T:
    """A value of a file of settings, which is checked again when the stage ends."""
    found = read()
    _GIVEN.append((where, found, read))
    return found


def target(name: str) -> Target:
    return given(f"params.yaml: targets.{name}", lambda: load_params().target(name))
