"""score <run>: search far enough for every target of the run; tables at data/scores/<run>/<method>.

What was computed, and how long it took, is at data/timings/<run>-search.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blockpruner.core.progress import observer
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.methods.score import headline, open_material, score_run
from blockpruner.params import load_params
from blockpruner.scoring.settings import Latency
from blockpruner.store.files import write_json
from blockpruner.store.trials import trials_root
from stages import DATA, TIMINGS, renew_report, run, sections


def main(name: str) -> None:
    runtime, settings, watch = load_params().runtime, sections(name), observer()
    checkpoint, folder, model = DATA / "models" / name, DATA / "scores" / name, settings.model
    calibration = CalibrationSet.load(DATA / "calibration" / name / "rows.parquet")
    figures = {}
    with open_material(checkpoint, model, runtime, trials_root(), watch) as material:
        for number, (method, asked) in enumerate(settings.score.items()):
            place = folder / method

            def latency(place: Path = place, timed: Latency = asked.score.latency) -> Mapping[str, Any]:
                from blockpruner.evaluation.latency import kept_latency  # loads torch

                return kept_latency(place, trials_root(), checkpoint, model, timed, runtime, watch)

            counts = score_run(material, calibration, asked.score, asked.budgets, place, latency)
            write_json(TIMINGS / f"{name}{f'-{method}' if number else ''}-search.json", counts)
            figures[method] = headline(counts)
    write_json(DATA / "metrics" / name / "score.json", figures)
    renew_report()


if __name__ == "__main__":
    run("score", main)
