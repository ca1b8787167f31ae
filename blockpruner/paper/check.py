"""The paper's published answers held against this machine, without a search: the gate before a study is believed.

Decides what is published of a run (CHECKS) and when a number agrees. Table 1's model is made from the published
sequence and evaluated beside the dense one, and ShortGPT ranks the layers in one pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from blockpruner.core.blocks import parse_mask
from blockpruner.core.errors import InputError
from blockpruner.core.progress import Observer
from blockpruner.evaluation.suite import Checkpoint
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.paper.evaluation import Candidate, evaluate_study
from blockpruner.paper.experiments import BLOCKPRUNER, METHODS, Variant, study_of
from blockpruner.paper.published import read_published
from blockpruner.paper.studies import DENSE, SearchRecord, Setting, load_plans, search_all
from blockpruner.settings import Run
from blockpruner.store.files import read_json
from blockpruner.study import Study

PERPLEXITY_WITHIN, AVERAGE_WITHIN = 0.02, 1.0
"""How far a number may be from the published one: 2 % of a perplexity; one point of an average, whose standard error
over the five full test sets is about half a point."""


@dataclass(frozen=True)
class Check:
    """What the paper and its code published of a model."""

    paper: str
    """Its name in the paper."""
    given: str
    """The run file with the published sequence."""
    budget: str
    """How much of the sequence is BlockPruner's row of Table 1."""
    layers: tuple[int, ...]
    """ShortGPT's first layers, in order of removal."""


CHECKS: Mapping[str, Check] = {
    "llama2-7b": Check("Llama2-7B", "llama2-7b-official", "17blocks", (27, 25, 26, 28, 29, 24, 23)),
}
"""By run file with a study."""


@dataclass(frozen=True)
class Line:
    """One published answer, and ours."""

    what: str
    published: str
    here: str
    agrees: bool

    def __str__(self) -> str:
        return f"{self.what}: {self.here} here, {self.published} published: {'agrees' if self.agrees else 'DIFFERS'}"


def check_of(run: str) -> Check:
    if run not in CHECKS:
        raise InputError(f"nothing is published to check run {run!r} against; valid: {', '.join(CHECKS)}")
    return CHECKS[run]


def searches(check: Check, run: Run, given: Run) -> tuple[Variant, Variant]:
    """The published sequence, which is not searched for, and ShortGPT's ranking."""
    shortgpt, rows = METHODS["shortgpt"], run.calibration
    ranking = run.score.model_validate(dict(shortgpt.score))
    return (
        Variant("published sequence", BLOCKPRUNER, "block", given.score, rows, (check.budget,)),
        Variant(shortgpt.title, "shortgpt", "layer", ranking, rows, (f"{len(check.layers)}layers",)),
    )


def hold_against(
    check: Check,
    run: Run,
    given: Run,
    dense: Checkpoint,
    setting: Setting,
    sources: Path,
    out: Path,
    store: Path,
    published: Path,
    observer: Observer,
) -> list[Line]:
    """Make and evaluate the published model; its searches and results go to the folder `out`.

    Args:
        sources: as `evaluate_study` reads them.
        published: the folder of the paper's numbers.
    """
    sequence, shortgpt = searches(check, run, given)
    search_all((sequence, shortgpt), out / "scores", out / "plans", setting)
    (plan,) = load_plans(out / "plans", sequence).values()
    candidate = Candidate(plan, CalibrationSet.load(out / "plans" / sequence.slug / "rows.parquet"), main=True)
    alone = Study(main=study_of(run).main, tasks=())
    evaluate_study(
        dense, [candidate], sources, out / "results", store, settings=run.evaluate, study=alone, observer=observer
    )
    models = read_json(out / "results" / "models.json")
    theirs = {row.key: row.numbers for row in read_published(published, "table1_main") if row.model == check.paper}
    lines = [
        *_quality("dense model", models[DENSE], theirs["dense"]),
        *_quality(
            f"published sequence, {100 * plan.ratio:.2f} % removed", models[candidate.name], theirs["blockpruner"]
        ),
    ]
    order = SearchRecord.load(out / "plans" / shortgpt.slug).order[: len(check.layers)]
    layers = tuple(next(iter(parse_mask(unit))).layer for unit in order)
    return [*lines, Line("ShortGPT's layers", _listed(check.layers), _listed(layers), layers == check.layers)]


def _quality(name: str, facts: Mapping[str, Any], theirs: Mapping[str, float]) -> list[Line]:
    perplexity = facts["perplexity"]["heldout"]["perplexity"]
    average = 100 * fmean(task["value"] for task in facts["tasks"].values())
    wanted, mean = theirs["wikitext2_ppl"], theirs["avg"]
    near = abs(perplexity / wanted - 1) <= PERPLEXITY_WITHIN, abs(average - mean) <= AVERAGE_WITHIN
    return [
        Line(f"{name}: WikiText-2 perplexity", f"{wanted:.2f}", f"{perplexity:.2f}", near[0]),
        Line(f"{name}: average of the tasks, %", f"{mean:.2f}", f"{average:.2f}", near[1]),
    ]


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))


def describe_check(name: str, check: Check, published: Path) -> str:
    """What a check computes, before anything is computed."""
    theirs = {row.key: row.numbers for row in read_published(published, "table1_main") if row.model == check.paper}
    goals = [f"{theirs[key]['wikitext2_ppl']:.2f} and {theirs[key]['avg']:.2f} %" for key in ("dense", "blockpruner")]
    return (
        f"Check of {name} ({check.paper}): no search. Fetched: the model, calibration texts, WikiText-2 and the tasks. "
        f"Evaluated: the dense model, against perplexity and average of {goals[0]}, and {check.budget} of "
        f"runs/{check.given}.yaml, against {goals[1]}. Ranked in one pass: the layers by ShortGPT, against "
        f"{_listed(check.layers)}. A perplexity agrees within {PERPLEXITY_WITHIN:.0%}, an average within "
        f"{AVERAGE_WITHIN:g} point."
    )
