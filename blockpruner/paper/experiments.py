"""The experiments of the paper as data: which searches a study makes, how far each goes, and which are compared.

Decides what the tables and figures of arXiv 2406.10594 are made of. A method or a factor is added in one place, here;
how a search runs is decided by `search`, what is measured of its models by `evaluation`, how it looks by `reporting`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from blockpruner.core.errors import InputError
from blockpruner.core.settings import Budgets, Calibration, Run, Score, Study

Kind = Literal["block", "layer", "width"]
DATA_VARIABLE = "BLOCKPRUNER_DATA"
"""Environment variable: a folder of benchmark data. A study takes WikiText-2 from it, which no package holds."""

BLOCKPRUNER = "BlockPruner"


@dataclass(frozen=True)
class Method:
    """kind: of its budgets; score: what it changes in the run's `score` section; use: the parts of a study that it
    takes part in: "main", "metric", "curve", "partial", "high", "seeds"."""

    kind: Kind
    score: Mapping[str, Any]
    use: tuple[str, ...]


METHODS: dict[str, Method] = {
    BLOCKPRUNER: Method("block", {}, ("main", "metric", "curve", "partial", "high", "seeds")),
    "SliceGPT": Method("width", {"method": "slicegpt"}, ("main",)),
    "LaCo": Method("layer", {"method": "laco"}, ("main",)),
    "Relative Magnitude": Method(
        "layer", {"method": "one_shot", "unit": "layer", "metric": "relative_magnitude"}, ("main", "curve", "seeds")
    ),
    "Relative Magnitude, Frobenius": Method(
        "layer", {"method": "one_shot", "unit": "layer", "metric": "relative_magnitude_frobenius"}, ("main",)
    ),
    "ShortGPT": Method(
        "layer", {"method": "one_shot", "unit": "layer", "metric": "block_influence"}, ("main", "curve", "seeds")
    ),
    "one-shot perplexity": Method("block", {"method": "one_shot"}, ("main",)),
    "greedy layers (SLEB)": Method("layer", {"unit": "layer"}, ("main", "high", "seeds")),
    "BlockPruner by JS": Method("block", {"metric": "js"}, ("metric",)),
    "BlockPruner by BI": Method("block", {"metric": "block_influence"}, ("main", "partial")),
    "BlockPruner by RM": Method("block", {"metric": "relative_magnitude"}, ("main", "partial")),
    "MHA only": Method("block", {"candidates": "mha"}, ("partial",)),
    "MLP only": Method("block", {"candidates": "mlp"}, ("partial",)),
    "random": Method("block", {"method": "random"}, ("main",)),
}
"""By the names that tables show. The run's own `score` section says how BlockPruner searches."""

TIMED = (BLOCKPRUNER, "MHA only", "MLP only")
"""Of these, every budget is timed: the paper's open question is the balance of the two kinds of block."""

TABLE6 = (BLOCKPRUNER, "SliceGPT", "ShortGPT")
"""Its methods."""

ACCELERATED = ("acceleration", "confidence", "floor", "slack", "audit")


@dataclass(frozen=True)
class Variant:
    """One search of a study.

    name: unique, a folder's name after `slug`; method: a key of METHODS; factor: what else is varied: "" (nothing),
    "seed" or "calibration", and level: which seed or set; score, calibration: the whole sections; budgets: in order;
    measured: of those, the budgets whose models are evaluated in full ("main"), and timed.
    """

    name: str
    method: str
    kind: Kind
    score: Score
    calibration: Calibration
    budgets: tuple[str, ...]
    factor: Literal["", "seed", "calibration"] = ""
    level: str = ""
    main: str | None = None
    timed: tuple[str, ...] = field(default_factory=tuple)

    @property
    def raced(self) -> str | None:
        """The budget whose model is timed in the setting of Table 6."""
        return self.main if self.name in TABLE6 else None

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


def variants(run: Run) -> tuple[Variant, ...]:
    """All searches of a run's study, BlockPruner first, since others can reuse its trials.

    Raises:
        InputError: no study section, an unknown method, or a calibration that does not fit.
    """
    study = study_of(run)
    names = METHODS if study.methods is None else study.methods
    for name in (*names, *study.options, *study.samples):
        if name not in METHODS:
            raise InputError(f"study names the method {name!r}, which is unknown; valid: {', '.join(METHODS)}")
    found = [_method(run, study, name) for name in METHODS if name in names]
    found = [variant for variant in found if variant.budgets]
    for seed in study.seeds:
        found += [
            _varied(run, v, "seed", str(seed), {"seed": seed}, v.main)
            for v in found
            if not v.factor and v.main is not None and "seeds" in METHODS[v.method].use
        ]
    if BLOCKPRUNER in names:
        for level, change in study.calibrations.items():
            found.append(_varied(run, found[0], "calibration", level, change, study.sensitivity))
    return tuple(found)


def study_of(run: Run) -> Study:
    if run.study is None:
        raise InputError(
            "the run has no study section, so there is nothing to tabulate; add one, as runs/llama2-7b.yaml"
        )
    return run.study


def budget_of(budgets: Budgets, kind: Kind) -> str | None:
    found: str | None = getattr(budgets, kind)
    return found


def _method(run: Run, study: Study, name: str) -> Variant:
    row = METHODS[name]
    by_use = {
        "main": [budget_of(study.main, row.kind)],
        "metric": study.metric,
        "partial": study.partial,
        "curve": study.curve,
        "high": [budget_of(budgets, row.kind) for budgets in study.high],
    }
    wanted = [budget for use, budgets in by_use.items() if use in row.use for budget in budgets if budget is not None]
    if name == BLOCKPRUNER:
        wanted.append(study.sensitivity)
    budgets, main = tuple(dict.fromkeys(wanted)), budget_of(study.main, row.kind) if "main" in row.use else None
    change = {"num_samples": study.samples[name]} if name in study.samples else {}
    timed = budgets if name in TIMED else ()
    return Variant(
        name, name, row.kind, _score(run, study, name), _calibration(run, change), budgets, main=main, timed=timed
    )


def _score(run: Run, study: Study, name: str) -> Score:
    """The run's `score` section with a method's changes; acceleration only where the search has steps to accelerate."""
    change = dict(METHODS[name].score)
    own = run.score.model_dump(exclude_unset=True)
    if change.get("method", "greedy") != "greedy" or change.get("metric") in ("block_influence", "relative_magnitude"):
        own = {key: value for key, value in own.items() if key not in (*ACCELERATED, "options")}
    if name in study.options:
        change["options"] = study.options[name]
    return Score.model_validate({**own, **change})


def _calibration(run: Run, change: Mapping[str, Any]) -> Calibration:
    return Calibration.model_validate({**run.calibration.model_dump(), **change})


def _varied(
    run: Run,
    of: Variant,
    factor: Literal["seed", "calibration"],
    level: str,
    change: Mapping[str, Any],
    budget: str | None,
) -> Variant:
    name = f"{of.method}, seed {level}" if factor == "seed" else f"{of.method}, {level}"
    assert budget is not None
    return Variant(name, of.method, of.kind, of.score, _calibration(run, change), (budget,), factor=factor, level=level)
