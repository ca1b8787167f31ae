"""study_evaluate <run>: perplexity and tasks of every model of a study, at data/studies/<run>/results."""

from __future__ import annotations

from blockpruner.core.progress import observer
from blockpruner.core.settings import Run
from blockpruner.evaluation.suite import Checkpoint
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.model.models import set_threads
from blockpruner.paper.evaluation import Candidate, evaluate_study
from blockpruner.paper.experiments import study_of, variants
from blockpruner.paper.studies import load_plans
from blockpruner.params import load_params, load_run
from stages import DATA, STUDIES, run

MAIN, CURVES = "main", "timed"
"""Settings in which models are timed: that of Table 6, and that of the curves."""


def candidates(name: str, settings: Run) -> list[Candidate]:
    found, plans = [], STUDIES / name / "plans"
    for variant in variants(settings):
        rows = CalibrationSet.load(plans / variant.slug / "rows.parquet")
        for budget, plan in load_plans(plans, variant).items():
            timed = {MAIN: budget == variant.raced, CURVES: budget in variant.timed}
            found.append(Candidate(plan, rows, budget == variant.main, frozenset(key for key in timed if timed[key])))
    return found


def dense(name: str, settings: Run) -> Checkpoint:
    runtime = load_params().runtime
    set_threads(runtime.threads)
    remote = getattr(settings.model, "trust_remote_code", False)
    return Checkpoint(STUDIES / name / "model", settings.model.dtype, runtime.device, remote)


def main(name: str) -> None:
    settings = load_run(name)
    study, evaluate = study_of(settings), settings.evaluate
    evaluate_study(
        dense(name, settings),
        candidates(name, settings),
        STUDIES / name / "sources",
        STUDIES / name / "results",
        DATA / "evaluations",
        perplexity=evaluate.perplexity.model_dump(),
        tasks=dict.fromkeys(evaluate.zero_shot.tasks, evaluate.zero_shot.limit),
        main_tasks=dict.fromkeys(study.tasks, study.tasks_limit),
        wikitext=study.wikitext.model_dump() if study.wikitext else None,
        observer=observer(),
    )


if __name__ == "__main__":
    run("study_evaluate", main)
