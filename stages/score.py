"""score <run>: search far enough for every target of the run; tables at data/scores/<run>, trials in data/trials."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockpruner.calibration import CalibrationSet
from blockpruner.params import load_params, load_run
from blockpruner.progress import observer
from blockpruner.search.run import score_run
from blockpruner.sources import checkpoint_identity
from blockpruner.tables import read_json
from blockpruner.trials import trials_root
from stages import DATA, run

if TYPE_CHECKING:  # torch is loaded only when something must be computed
    from blockpruner.scoring.engine import Engine


def main(name: str) -> None:
    params, settings = load_params(), load_run(name)
    checkpoint, dtype = DATA / "models" / name, settings.model.dtype

    def make_scorer() -> Engine:
        from blockpruner.models import load_model, set_threads
        from blockpruner.scoring.engine import Engine

        set_threads(params.runtime.threads)
        remote = getattr(settings.model, "trust_remote_code", False)
        return Engine(load_model(checkpoint, dtype, params.runtime.device, remote), params.runtime.batch_tokens)

    score_run(
        DATA / "scores" / name,
        trials_root(),
        calibration=CalibrationSet.load(DATA / "calibration" / name / "rows.parquet"),
        model_identity=checkpoint_identity(checkpoint),
        dtype=dtype,
        config=read_json(checkpoint / "config.json"),
        score=settings.score.model_dump(),
        budgets=params.budgets_of(name),
        make_scorer=make_scorer,
        observer=observer(),
        metrics=DATA / "metrics" / name / "score.json",
    )


if __name__ == "__main__":
    run("score", main)
