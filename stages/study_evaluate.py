"""study_evaluate <run>: perplexity and tasks of every model of a study, at data/studies/<run>/results."""

from __future__ import annotations

from blockpruner.core.progress import observer
from blockpruner.evaluation.suite import Checkpoint
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.methods.healed import FILE
from blockpruner.model.models import set_threads
from blockpruner.paper.evaluation import Candidate, evaluate_study
from blockpruner.paper.experiments import cures, study_of, variants
from blockpruner.paper.healing import healed_of
from blockpruner.paper.studies import load_plans
from blockpruner.params import load_params, load_run
from blockpruner.settings import Run
from stages import DATA, STUDIES, run

MAIN, CURVES = "main", "timed"
"""Settings in which models are timed: that of Table 6, and that of the curves."""


def candidates(name: str, settings: Run) -> list[Candidate]:
    found, plans, healed, cured = [], STUDIES / name / "plans", STUDIES / name / "healed", cures(settings)
    mended = {(cure.variant.slug, cure.budget) for cure in cured}
    for variant in variants(settings):
        rows = CalibrationSet.load(plans / variant.slug / "rows.parquet")
        for budget, plan in load_plans(plans, variant).items():
            timed = {MAIN: budget == variant.raced, CURVES: budget in variant.timed}
            main = budget == variant.main or (variant.slug, budget) in mended
            found.append(Candidate(plan, rows, main, frozenset(key for key in timed if timed[key])))
    for cure in cured:
        rows = CalibrationSet.load(plans / cure.variant.slug / "rows.parquet")
        base, facts = load_plans(plans, cure.variant).get(cure.budget), healed_of(healed, cure)
        if base is not None and facts is not None and facts["digest"] is not None:
            weights = healed / cure.slug / FILE
            found.append(Candidate(cure.of(base), rows, True, healed=facts["digest"], weights=weights))
    return found


def dense(name: str, settings: Run) -> Checkpoint:
    runtime, model = load_params().runtime, settings.model
    set_threads(runtime.threads)
    return Checkpoint(STUDIES / name / "model", model.dtype, runtime.device, model.trust_remote_code)


def main(name: str) -> None:
    settings = load_run(name)
    evaluate_study(
        dense(name, settings),
        candidates(name, settings),
        STUDIES / name / "sources",
        STUDIES / name / "results",
        DATA / "evaluations",
        settings=settings.evaluate,
        study=study_of(settings),
        observer=observer(),
    )


if __name__ == "__main__":
    run("study_evaluate", main)
