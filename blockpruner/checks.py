"""What a run file names (method, metric, formats, tasks), checked against the registries when the file is read."""

from __future__ import annotations

from blockpruner.checkpoints.registry import require_exports
from blockpruner.core.errors import InputError
from blockpruner.core.healing_settings import CompensationMethod
from blockpruner.evaluation.benchmarks import BENCHMARKS
from blockpruner.methods.registry import check_score, kind_of_method
from blockpruner.scoring.metrics import METRICS, NLL
from blockpruner.scoring.settings import Score
from blockpruner.search.registry import SEARCHES
from blockpruner.settings import Run, Target, score_of


def check_run(run: Run) -> None:
    """Refuse names that no registry has, and sections that do not fit together.

    Raises:
        InputError: names the value, the valid ones and the fix.
    """
    kind = check_score(run.score)
    require_exports(run.export, kind, run.model.dtype)
    for task in run.evaluate.zero_shot.tasks:
        BENCHMARKS[task]
    check_compensation(run.score, run.compensate.method)
    metric, source = METRICS[run.score.metric], run.calibration.data.source
    if metric.answers and source != "tasks":
        raise InputError(
            f"score.metric: {metric.name} needs the answers of items, and calibration.data.source: {source} has "
            f"texts; set calibration.data.source: tasks, or score.metric: {NLL.name}"
        )
    asks = kind.removes_blocks and SEARCHES[run.score.method].asks != "nothing"
    if asks and source == "tasks" and metric == NLL:
        raise InputError(
            f"score.metric: {metric.name} of answers given their questions is answer_likelihood; with "
            "calibration.data.source: tasks set score.metric: answer_likelihood"
        )


def check_target(run: Run, target: Target) -> None:
    """Refuse keys of a target that do not fit its run; raises InputError."""
    score = score_of(run, target.method)
    check_score(score)
    if target.recover and run.recover is None:
        raise InputError(
            f"recover: true needs a recover section in runs/{target.run}.yaml; add one (recover: {{}} is the paper's "
            "recipe), or set recover: false",
            rule="no-recipe-of-training", key="recover", value=True,
        )  # fmt: skip
    check_compensation(score, target.compensate or "none")
    if target.push and target.push.format not in run.export:
        raise InputError(
            f"push.format: {target.push.format} is not written; set it to one of {', '.join(run.export)}, or add it to "
            f"export of runs/{target.run}.yaml",
            rule="pushes-nothing", key="push.format", value=target.push.format,
        )  # fmt: skip


def check_compensation(score: Score, method: CompensationMethod) -> None:
    """Refuse compensation after a method that leaves no holes; raises InputError."""
    if method != "none" and not kind_of_method(score.method).removes_blocks:
        raise InputError(
            f"compensate: {method} is for methods that remove blocks, and score.method: {score.method} changes "
            "weights; set compensate: none, or another score.method",
            rule="compensates-no-holes", key="compensate", value=method,
        )  # fmt: skip
