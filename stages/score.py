"""score <run>: search far enough for every target of the run; tables at data/scores/<run>, trials in data/trials.

What was computed, and how long it took, is at data/timings/<run>-search.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blockpruner.checkpoints.registry import require_families
from blockpruner.core.progress import observer
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.methods.score import headline, open_material, score_run
from blockpruner.params import load_params, load_run
from blockpruner.store.files import read_json, write_json
from blockpruner.store.trials import trials_root
from stages import DATA, TIMINGS, run


def main(name: str) -> None:
    params, settings, watch = load_params(), load_run(name), observer()
    checkpoint, folder = DATA / "models" / name, DATA / "scores" / name
    require_families(settings.export, read_json(checkpoint / "config.json")["model_type"])
    calibration = CalibrationSet.load(DATA / "calibration" / name / "rows.parquet")

    def latency() -> Mapping[str, Any]:
        from blockpruner.evaluation.latency import kept_latency  # loads torch

        timed = settings.score.latency
        return kept_latency(folder, trials_root(), checkpoint, settings.model, timed, params.runtime, watch)

    with open_material(checkpoint, settings.model, params.runtime, trials_root(), watch) as material:
        counts = score_run(material, calibration, settings.score, params.budgets_of(name), folder, latency)
    write_json(TIMINGS / f"{name}-search.json", counts)
    write_json(DATA / "metrics" / name / "score.json", headline(counts))


if __name__ == "__main__":
    run("score", main)
