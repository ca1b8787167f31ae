"""The searches of a study, one after the other: their traces, what they cost, and the plans that they lead to.

Decides what a study hands on to evaluation and report (a folder for each search: `rows.parquet`, `search.json` and a
plan for each budget). Which searches there are is decided by `experiments`; trials are shared by all of them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from blockpruner.core.blocks import format_mask
from blockpruner.core.errors import UnreachableError
from blockpruner.core.plan import Plan
from blockpruner.core.settings import TaskAnswers, Texts
from blockpruner.inputs.calibration import CalibrationSet, draw_rows
from blockpruner.inputs.settings import Calibration
from blockpruner.methods.commit import commit_run
from blockpruner.methods.kind import Material
from blockpruner.methods.registry import model_facts
from blockpruner.methods.score import score_run
from blockpruner.paper.experiments import Variant
from blockpruner.search.iteration import removals
from blockpruner.search.trace import Current, read_trace, trace_directory
from blockpruner.store.files import read_json, replace_directory, write_json, write_sealed_json
from blockpruner.store.plans import load_plan, save_plan
from blockpruner.store.provenance import fingerprint

DENSE = "dense"
"""The dense model's name among a study's results."""


@dataclass(frozen=True)
class StudyTexts:
    """The texts that were fetched for a study."""

    tokenizer: Callable[[], Any]
    samples: Callable[[Texts], Sequence[str]]
    """Of a source of calibration, compensation or training."""
    evaluated: Callable[[], Sequence[str]]
    """The held-out texts on which models are evaluated."""


@dataclass(frozen=True)
class Setting:
    """What the searches of a study have in common."""

    run: str
    material: Material
    texts: StudyTexts


@dataclass(frozen=True)
class SearchRecord:
    """What is known of a search when it is over.

    order: all its removals, as text, beyond the last budget too; perplexities: on its calibration rows, of the dense
    model and after each removal; first: the loss of every unit scored on all rows in its first iteration, in its
    metric; all empty where it removes no blocks. rows, tokens: of its calibration set. cost: seconds, trials computed,
    trials that its longest start asked for, the first two of all starts together. refused: why no model of the method
    meets a budget; it has no plans then.
    """

    variant: str
    order: tuple[str, ...]
    perplexities: tuple[float, ...]
    first: Mapping[str, float]
    rows: int
    tokens: int
    cost: Mapping[str, float]
    refused: str = ""

    @classmethod
    def load(cls, folder: Path) -> SearchRecord:
        fields = read_json(folder / "search.json")
        return cls(**fields | {key: tuple(fields[key]) for key in ("order", "perplexities")})


def search_all(variants: Sequence[Variant], scores: Path, plans: Path, setting: Setting) -> None:
    """Make every search far enough for its budgets, and write what it leads to at `plans`/<slug>.

    A method whose budgets cannot be met is recorded with the reason, and the others go on.

    Args:
        scores: of the traces, a folder for each search; what is there is not computed again.
    """

    @cache
    def rows_of(wanted: Calibration) -> CalibrationSet:
        assert not isinstance(wanted.data, TaskAnswers)
        note, texts = setting.material.observer.note, setting.texts
        return draw_rows(texts.samples(wanted.data), texts.tokenizer(), wanted, texts.evaluated(), note)

    for number, variant in enumerate(variants, 1):
        calibration, folder = rows_of(variant.calibration), scores / variant.slug
        wanted = f"{variant.name}, to {', '.join(variant.budgets)}"
        setting.material.observer.note(f"search {number} of {len(variants)}: {wanted}")
        write: Callable[[Path], object]
        try:
            counts = score_run(setting.material, calibration, variant.score, variant.budgets, folder)
        except UnreachableError as error:
            setting.material.observer.note(f"warning: {variant.name} is left out: {error}")
            write = partial(_refuse, variant=variant, calibration=calibration, reason=str(error))
        else:
            cost = _add_cost(folder, counts)
            write = partial(_write, variant=variant, calibration=calibration, cost=cost, scores=folder, setting=setting)
        replace_directory(plans / variant.slug, write)
    for path in set(plans.iterdir()) - {plans / variant.slug for variant in variants}:
        shutil.rmtree(path)


def _add_cost(folder: Path, now: Mapping[str, Any]) -> dict[str, float]:
    """What all starts of a search took together; a start that computed nothing adds nothing."""
    path = folder / "cost.json"
    before = read_json(path) if path.exists() else {"seconds": 0.0, "computed": 0, "asked": 0}
    worked = now["rows_computed"] > 0 or not path.exists()
    cost = {
        "seconds": before["seconds"] + (now["wall_seconds"] if worked else 0.0),
        "computed": before["computed"] + now["trials_computed"],
        "asked": max(before["asked"], now["trials_computed"] + now["trials_reused"]),
    }
    write_json(path, cost)
    return cost


def _write(
    directory: Path,
    variant: Variant,
    calibration: CalibrationSet,
    cost: Mapping[str, float],
    scores: Path,
    setting: Setting,
) -> None:
    calibration.save(directory / "rows.parquet", variant.calibration.data.source)
    for budget in variant.budgets:
        plan, _ = commit_run(scores, setting.material.config, budget, f"{variant.name}, {budget}", setting.run)
        save_plan(plan, directory / f"{budget}.json")
    current = Current.load(scores)
    order: tuple[str, ...] = ()
    perplexities: tuple[float, ...] = ()
    first: dict[str, float] = {}
    if current.nested:
        trace = read_trace(trace_directory(scores, current, variant.budgets[0]), current.search)
        units, losses = removals(trace, True)
        order, perplexities = tuple(map(format_mask, units)), tuple(losses)
        first = {
            format_mask(added): score.loss
            for added, score in zip(trace[0].added, trace[0].scores, strict=True)
            if added is not None and score.is_complete and score.row_loss
        }
    found = SearchRecord(variant.name, order, perplexities, first, len(calibration.rows), calibration.tokens, cost)
    write_sealed_json(directory / "search.json", vars(found))


def _refuse(directory: Path, variant: Variant, calibration: CalibrationSet, reason: str) -> None:
    calibration.save(directory / "rows.parquet", variant.calibration.data.source)
    cost = {"seconds": 0.0, "computed": 0, "asked": 0}
    found = SearchRecord(variant.name, (), (), {}, len(calibration.rows), calibration.tokens, cost, reason)
    write_sealed_json(directory / "search.json", vars(found))


def load_plans(folder: Path, variant: Variant) -> dict[str, Plan]:
    """The plans of one search by budget; none of one that was refused."""
    if SearchRecord.load(folder / variant.slug).refused:
        return {}
    return {budget: load_plan(folder / variant.slug / f"{budget}.json") for budget in variant.budgets}


def candidate_facts(plan: Plan, rows: str, healed: str | None = None) -> dict[str, Any]:
    """All that a model of a study depends on, apart from the dense one.

    Args:
        rows, healed: digests of its calibration set and of its healed weights.
    """
    return model_facts(plan, rows) | ({"healed": healed} if healed else {})


def model_name(plan: Plan, rows: str, healed: str | None = None) -> str:
    """Of a pruned model among a study's results, the same for all searches that lead to it."""
    return fingerprint(candidate_facts(plan, rows, healed))
