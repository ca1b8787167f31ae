"""What a run file names (method, metric, formats, tasks), checked against the registries when the file is read."""

from __future__ import annotations

from blockpruner.checkpoints.registry import require_exports
from blockpruner.core.errors import InputError
from blockpruner.core.settings import CompensationMethod, Run
from blockpruner.evaluation.benchmarks import BENCHMARKS
from blockpruner.methods.registry import check_score, kind_of_method
from blockpruner.scoring.metrics import METRICS, NLL
from blockpruner.search.registry import SEARCHES


def check_run(run: Run) -> None:
    """Refuse names that no registry has, and sections that do not fit together.

    Raises:
        InputError: names the value, the valid ones and the fix.
    """
    kind = check_score(run.score)
    require_exports(run.export, kind, run.model.dtype)
    for task in run.evaluate.zero_shot.tasks:
        BENCHMARKS[task]
    check_compensation(run, run.compensate.method)
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


def check_compensation(run: Run, method: CompensationMethod) -> None:
    """Refuse compensation after a method that leaves no holes; raises InputError."""
    if method != "none" and not kind_of_method(run.score.method).removes_blocks:
        raise InputError(
            f"compensate: {method} is for methods that remove blocks, and score.method: {run.score.method} changes "
            "weights; set compensate: none, or another score.method"
        )
