"""Built targets as runs of an experiment tracker: Trackio, where BLOCKPRUNER_TRACKIO names a project of it.

`python -m flows.tracking PROJECT` records what is built already. Decides what such a run holds, and that the same is
recorded once. Trackio decides where its runs are (TRACKIO_DIR, TRACKIO_SERVER_URL, TRACKIO_SPACE_ID).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from blockpruner.core.errors import InputError, missing
from blockpruner.params import load_params, load_run
from blockpruner.store.files import read_json, write_json
from blockpruner.store.plans import load_plan
from blockpruner.store.provenance import fingerprint

VARIABLE = "BLOCKPRUNER_TRACKIO"
METRICS, EVIDENCE, PLANS, RECORDS = (Path("data") / name for name in ("metrics", "evidence", "plans", "provenance"))


def figures(name: str) -> dict[str, Any]:
    """The metrics of a model, and its speed-ups, which are no metrics: git keeps no timings."""
    path = EVIDENCE / name / "speed.json"
    speed = read_json(path)["speed"] if path.exists() else None
    speedups = {key: round(value, 4) for key, value in (speed or {}).items() if key.startswith("speedup")}
    return {**read_json(METRICS / f"{name}.json"), **speedups}


def project() -> str:
    """The tracker's project, "" for none; raises MissingPackageError if the tracker is not installed."""
    found = os.environ.get(VARIABLE, "")
    if found and find_spec("trackio") is None:
        raise missing("trackio", "trackio")
    return found


def facts_of(target: str) -> tuple[dict[str, Any], dict[str, float]]:
    """The settings of a target, and what was measured of it; the dense model's figures are `dense/<name>`."""
    plan = load_plan(PLANS / target / "plan.json")
    made = {"target": target, "budget": plan.budget, "compensate": plan.compensate, "recover": plan.recover}
    settings = load_run(plan.run).model_dump(mode="json", exclude_none=True)
    found = {f"dense/{key}": value for key, value in figures(f"{plan.run}-dense").items()} | figures(target)
    found["ratio"] = plan.ratio
    settings |= {"run": plan.run, "removed": ", ".join(plan.order)} | made
    return settings, {key: value for key, value in found.items() if value is not None}


def track(name: str, targets: Sequence[str]) -> None:
    """Record targets in a project of Trackio, a run for each; one that is recorded as it is now is passed over."""
    import trackio

    for target in targets:
        settings, found = facts_of(target)
        digest, record = fingerprint({"settings": settings, "figures": found}), RECORDS / f"tracked@{target}.json"
        if record.exists() and read_json(record) == {"project": name, "digest": digest}:
            continue
        trackio.init(
            name, f"{target}-{digest[:6]}", settings["run"], config=settings, auto_log_gpu=False, auto_log_cpu=False
        )
        trackio.log(found)
        trackio.finish()
        write_json(record, {"project": name, "digest": digest})


def main() -> int:
    os.environ[VARIABLE] = " ".join(sys.argv[1:])
    try:
        built = [name for name in load_params().targets if (METRICS / f"{name}.json").exists()]
        track(project() or sys.exit(__doc__), built)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
