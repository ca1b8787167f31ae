"""What a run file names (method, metric, formats, tasks), checked against the registries when the
file is read."""

from blockpruner.checkpoints.registry import require_exports
from blockpruner.config.sections import Run, Target, score_of
from blockpruner.core.errors import InputError
from blockpruner.evaluation.benchmarks import BENCHMARKS
from blockpruner.methods.recipes import compensation, recipe, searches
from blockpruner.methods.registry import check_score, kind_of_method
from blockpruner.scoring.settings import Score


def check_run(run: Run) -> None:
    """Refuse names that no registry has, and sections that do not fit together; raises InputError
    that names the value, the valid ones and the fix."""
    recipe(run.score.method)  # refuses a name that is neither a recipe nor a method
    _check_unit(run.score)
    for score in searches(run.score).values():
        require_exports(run.export, check_score(score), run.model.dtype)
        check_compensation(score, compensation(run.compensate.method, run.score.method))
    for task in run.evaluate.zero_shot.tasks:
        BENCHMARKS[task]


def _check_unit(score: Score) -> None:
    """Refuse a unit that the user names and a search of the recipe replaces; raises InputError."""
    units = {search.unit for search in searches(score).values()}
    if "unit" in score.model_fields_set and units != {score.unit}:
        raise InputError(
            f"score.unit: {score.unit} does not fit method: {score.method}, whose units are"
            f" {', '.join(sorted(units))}; leave the unit out, or name a search, as in method:"
            " greedy",
            rule="unit-of-recipe",
            key="score.unit",
            value=score.unit,
        )


def check_target(run: Run, target: Target) -> None:
    """Refuse keys of a target that do not fit its run; raises InputError."""
    method = target.method or run.score.method
    compensate = target.compensate or compensation(run.compensate.method, method)
    for score in searches(score_of(run, target.method)).values():
        check_score(score)
        check_compensation(score, compensate)
    if target.train and run.train is None:
        raise InputError(
            f"train: true needs a train section in runs/{target.run}.yaml; add one (train: {{}} is"
            " the paper's recipe), or set train: false",
            rule="no-recipe-of-training",
            key="train",
            value=True,
        )


def check_compensation(score: Score, method: str) -> None:
    """Refuse compensation after a method that does more than take parts out; raises InputError."""
    if method != "none" and not kind_of_method(score.method).keeps_weights:
        raise InputError(
            f"compensate: {method} is for methods that take parts out, and score.method:"
            f" {score.method} changes weights; set compensate: none, or another score.method",
            rule="compensates-no-holes",
            key="compensate",
            value=method,
        )
