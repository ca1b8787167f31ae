"""score <run>: search far enough for every target of the run; tables at data/scores/<run>, trials in data/trials."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blockpruner.core.progress import observer
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.inputs.checkpoints import checkpoint_identity
from blockpruner.methods.planning import Bench
from blockpruner.methods.score import score_run
from blockpruner.params import load_params, load_run
from blockpruner.scoring.scorers import LazyScorer, make_scorer
from blockpruner.scoring.work import Scorer
from blockpruner.store.files import read_json
from blockpruner.store.trials import trials_root
from stages import DATA, run


def main(name: str) -> None:
    params, settings = load_params(), load_run(name)
    checkpoint, dtype, watch = DATA / "models" / name, settings.model.dtype, observer()
    runtime, remote = params.runtime, getattr(settings.model, "trust_remote_code", False)
    calibration, out = CalibrationSet.load(DATA / "calibration" / name / "rows.parquet"), DATA / "scores" / name

    def scorer() -> Scorer:
        return make_scorer(checkpoint, dtype, runtime, trust_remote_code=remote, note=watch.note, advance=watch.advance)

    def bench() -> Bench:
        from blockpruner.methods.laco.merging import ModelBench
        from blockpruner.model.models import load_model, set_threads

        set_threads(runtime.threads)
        model = load_model(checkpoint, dtype, runtime.device, remote, runtime.attention)
        return ModelBench(model, calibration.rows, watch.advance)

    def latency() -> Mapping[str, Any]:
        from blockpruner.evaluation.latency import kept_latency

        return kept_latency(
            out, trials_root(), checkpoint, dtype, settings.score.latency.model_dump(), runtime, remote, watch
        )

    with LazyScorer(scorer) as lazy:  # torch is loaded only when something must be computed
        score_run(
            out, trials_root(),
            calibration=calibration,
            model_identity=checkpoint_identity(checkpoint),
            dtype=dtype,
            config=read_json(checkpoint / "config.json"),
            score=settings.score.model_dump(exclude_none=True, exclude={"latency"}),
            budgets=params.budgets_of(name),
            scorer=lazy, make_bench=bench, latency=latency,
            observer=watch, metrics=DATA / "metrics" / name / "score.json",
        )  # fmt: skip


if __name__ == "__main__":
    run("score", main)
