"""study_speed <run>: generation of the models of a study and of the dense one in turns, at data/studies/<run>/speed."""

from __future__ import annotations

from blockpruner.core.progress import observer
from blockpruner.paper.evaluation import time_study
from blockpruner.paper.experiments import study_of
from blockpruner.params import load_run
from stages import DATA, STUDIES, run
from stages.study_evaluate import CURVES, MAIN, candidates, dense


def main(name: str) -> None:
    settings = load_run(name)
    asked = {MAIN: settings.evaluate.speed, CURVES: study_of(settings).speed}
    time_study(
        dense(name, settings),
        candidates(name, settings),
        STUDIES / name / "speed",
        DATA / "evaluations",
        settings={name: speed for name, speed in asked.items() if speed is not None},
        observer=observer(),
    )


if __name__ == "__main__":
    run("study_speed", main)
