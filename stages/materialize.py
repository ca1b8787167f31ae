"""materialize <target>: checkpoints without the removed weights, verified, at data/checkpoints/<target>/<format>."""

from __future__ import annotations

from dataclasses import replace

from blockpruner.checkpoints.registry import EXPORTS, require_families
from blockpruner.core.plan import Plan
from blockpruner.core.progress import observer
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.methods.apply import Pruning
from blockpruner.methods.healed import find_healed
from blockpruner.model.models import set_threads
from blockpruner.params import load_params
from blockpruner.store.files import read_json
from blockpruner.store.manifest import REPORT_FILE
from blockpruner.store.plans import load_plan
from stages import DATA, run, sections


def pruning_of(plan: Plan) -> Pruning:
    """The model of a plan, before it is healed."""
    runtime, model = load_params().runtime, sections(plan.run).model
    set_threads(runtime.threads)  # SliceGPT's result depends on them
    rows = CalibrationSet.load(DATA / "calibration" / plan.run / "rows.parquet")
    return Pruning(DATA / "models" / plan.run, plan, rows, model.dtype, runtime.device, model.trust_remote_code)


def main(name: str) -> None:
    pruning = pruning_of(load_plan(DATA / "plans" / name / "plan.json"))
    exports = sections(pruning.plan.run).export
    require_families(exports, read_json(pruning.dense / "config.json")["model_type"])
    healed = find_healed((DATA / stage / name for stage in ("recovered", "compensated")), pruning.identity)
    for form in exports:
        export = EXPORTS[form]
        place = DATA / "checkpoints" / name / form
        export.write(replace(pruning, healed=healed), place)
        report = place / REPORT_FILE  # a format of another package may have none
        seen = read_json(report) if report.exists() else {}
        checked = f"checked by {seen['engine']}" if seen.get("ok") else "unchecked"
        observer().note(f"{name}: {export.title} for {', '.join(export.engines)}, {checked}")


if __name__ == "__main__":
    run("materialize", main)
