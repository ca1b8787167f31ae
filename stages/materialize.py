"""materialize <target>: checkpoints without the removed weights, verified, at data/checkpoints/<target>/<format>."""

from __future__ import annotations

from blockpruner.checkpoints.registry import EXPORTS
from blockpruner.core.progress import observer
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.model.models import set_threads
from blockpruner.params import load_params, load_run
from blockpruner.store.plans import load_plan
from stages import DATA, run


def main(name: str) -> None:
    params, plan = load_params(), load_plan(DATA / "plans" / name / "plan.json")
    settings, dense = load_run(plan.run), DATA / "models" / plan.run
    model = settings.model
    rows = CalibrationSet.load(DATA / "calibration" / plan.run / "rows.parquet").rows
    set_threads(params.runtime.threads)  # SliceGPT's result depends on them
    for form in settings.export:
        export = EXPORTS[form]
        export.write(
            dense,
            plan,
            DATA / "checkpoints" / name / form,
            rows=rows,
            dtype=model.dtype,
            device=params.runtime.device,
            trust_remote_code=model.trust_remote_code,
        )
        observer().note(
            f"{name}: {export.title} for {', '.join(export.engines)} written and verified in a fresh process"
        )


if __name__ == "__main__":
    run("materialize", main)
