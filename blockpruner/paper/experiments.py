"""The experiments of the paper as data: which searches a study makes, how far each goes, and which are compared.

Decides what the tables and figures of arXiv 2406.10594 are made of. A method or a factor is added in one place, here;
how a search runs is decided by `search`, what is measured of its models by `evaluation`, how it looks by `reporting`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

from blockpruner.core.errors import InputError
from blockpruner.core.plan import Plan
from blockpruner.inputs.settings import Calibration
from blockpruner.reporting.formats import slug
from blockpruner.scoring.settings import Score
from blockpruner.search.registry import SEARCHES
from blockpruner.settings import Run
from blockpruner.study import Budgets, Study

Kind = Literal["block", "layer", "width"]
DATA_VARIABLE = "BLOCKPRUNER_DATA"
"""Environment variable: a folder of benchmark data. A study takes WikiText-2 from it, which no package holds."""

BLOCKPRUNER, GREEDY_LAYERS, PRICED, FLOATING, SWAP = (
    "blockpruner",
    "greedy-layers",
    "blockpruner-per-parameter",
    "floating-search",
    "swap-from-blockpruner",
)

Use = Literal["main", "metric", "js", "curve", "partial", "high", "race", "seeds", "timed"]
"""A part of a study: the budgets of `Study` by that name, the seeds, and the timing of every budget (the paper's open
question is the balance of the two kinds of block)."""


@dataclass(frozen=True)
class PaperMethod:
    """A method that a study can search by. The run's own `score` section tells how BlockPruner searches."""

    title: str
    """Its name in tables and figures."""
    kind: Kind
    """Of its budgets."""
    use: tuple[Use, ...]
    score: Mapping[str, Any]
    """What it changes in the run's `score` section."""
    published: tuple[str, ...] = ()
    """Names of its rows in data/paper."""


BI, RM = "block_influence", "relative_magnitude"
EVERY: tuple[Use, ...] = ("main", "metric", "curve", "partial", "high", "race", "seeds", "timed")
METHODS: Mapping[str, PaperMethod] = {
    BLOCKPRUNER: PaperMethod("BlockPruner", "block", EVERY, {}, ("blockpruner", "ppl", "block")),
    "slicegpt": PaperMethod("SliceGPT", "width", ("main", "race", "timed"), {"method": "slicegpt"}, ("slicegpt",)),
    "laco": PaperMethod("LaCo", "layer", ("main", "timed"), {"method": "laco"}, ("laco",)),
    "relative-magnitude": PaperMethod(
        "Relative Magnitude", "layer", ("main", "curve", "seeds", "timed"),
        {"method": "one_shot", "unit": "layer", "metric": RM}, (RM,),
    ),
    "relative-magnitude-frobenius": PaperMethod(
        "Relative Magnitude, Frobenius", "layer", ("main",),
        {"method": "one_shot", "unit": "layer", "metric": f"{RM}_frobenius"}, (RM,),
    ),
    "shortgpt": PaperMethod(
        "ShortGPT", "layer", ("main", "curve", "race", "seeds", "timed"),
        {"method": "one_shot", "unit": "layer", "metric": BI}, ("shortgpt",),
    ),
    "one-shot-perplexity": PaperMethod(
        "one-shot perplexity", "block", ("main", "timed"), {"method": "one_shot"}, ("one_shot_ppl",)
    ),
    GREEDY_LAYERS: PaperMethod(
        "greedy layers", "layer", ("main", "high", "seeds", "timed"), {"unit": "layer"}, ("layer_greedy_ppl", "layer")
    ),
    PRICED: PaperMethod(
        "BlockPruner per parameter", "block", ("main", "timed"), {"options": {"per": "parameters"}}
    ),
    FLOATING: PaperMethod("floating search", "block", ("main", "seeds", "timed"), {"method": "floating"}),
    SWAP: PaperMethod("swap from BlockPruner", "block", ("main", "timed"), {"method": "swap"}),
    "blockpruner-by-js": PaperMethod("BlockPruner by JS", "block", ("js",), {"metric": "js"}, ("js",)),
    "blockpruner-by-bi": PaperMethod("BlockPruner by BI", "block", ("main", "partial"), {"metric": BI}),
    "blockpruner-by-rm": PaperMethod("BlockPruner by RM", "block", ("main", "partial"), {"metric": RM}),
    "mha-only": PaperMethod("MHA only", "block", ("partial", "timed"), {"candidates": "mha"}),
    "mlp-only": PaperMethod("MLP only", "block", ("partial", "timed"), {"candidates": "mlp"}),
    "angular-distance": PaperMethod(
        "angular distance", "layer", ("main", "timed"),
        {"method": "contiguous", "unit": "layer", "metric": "angular_distance"},
    ),
    "taylor": PaperMethod(
        "Taylor", "layer", ("main", "timed"), {"method": "one_shot", "unit": "layer", "metric": "taylor"}
    ),
    "random": PaperMethod("random", "block", ("main",), {"method": "random"}),
}  # fmt: skip
"""By slug, as run files name them: the title in lower case with hyphens."""

ACCELERATED = ("acceleration", "confidence", "floor", "slack", "audit")


@dataclass(frozen=True)
class Variant:
    """One search of a study."""

    name: str
    """Its method's title, and what else is varied."""
    method: str
    """A key of METHODS."""
    kind: Kind
    score: Score
    calibration: Calibration
    budgets: tuple[str, ...]
    """In the order in which they are searched for."""
    factor: Literal["", "seed", "calibration"] = ""
    """What else is varied."""
    level: str = ""
    """Which seed or calibration set."""
    main: str | None = None
    """The budget whose model is evaluated in full."""
    timed: tuple[str, ...] = ()
    """The budgets whose models are timed."""
    raced: str | None = None
    """The budget whose model stands in Table 6."""

    @property
    def slug(self) -> str:
        """The name of its folders."""
        return slug(self.name)


def variants(run: Run) -> tuple[Variant, ...]:
    """List all searches of a run's study, BlockPruner first, since others can reuse its trials.

    Raises:
        InputError: no study section, an unknown method, or a calibration that does not fit.
    """
    study = study_of(run)
    names = METHODS if study.methods is None else study.methods
    for name in (*names, *study.options, *study.samples, *study.rows):
        if name not in METHODS:
            raise InputError(f"study names the method {name!r}, which is unknown; valid: {', '.join(METHODS)}")
    found = [_base(run, study, name) for name in METHODS if name in names]
    found = [variant for variant in found if variant.budgets]

    def varied(of: Variant, factor: Literal["seed", "calibration"], level: str, change: Any, budget: str) -> Variant:
        return replace(
            of, name=f"{of.name}, {'seed ' if factor == 'seed' else ''}{level}", factor=factor, level=level,
            calibration=_calibration(run, change), budgets=(budget,), main=None, timed=(), raced=None,
        )  # fmt: skip

    repeated = [(v, v.main) for v in found if v.main is not None and "seeds" in METHODS[v.method].use]
    more = [varied(v, "seed", str(seed), {"seed": seed}, main) for seed in study.seeds for v, main in repeated]
    if BLOCKPRUNER in names:
        levels = study.calibrations.items()
        more += [varied(found[0], "calibration", level, change, study.sensitivity) for level, change in levels]
    return (*found, *more)


@dataclass(frozen=True)
class Cure:
    """A model of a search that is healed."""

    variant: Variant
    budget: str
    compensate: str
    train: bool

    def of(self, plan: Plan) -> Plan:
        """The plan of the healed model, from that of the plain one."""
        return replace(plan, compensate=self.compensate, train=self.train)

    @property
    def slug(self) -> str:
        """Its folder's name."""
        return slug(f"{self.variant.slug} {self.budget} {self.compensate}{' trained' * self.train}")


def cures(run: Run) -> tuple[Cure, ...]:
    """List the models of a run's study that are healed; one that is trained comes after the one that is not.

    Raises:
        InputError: a method without such a search, one that removes no blocks, or training without its settings.
    """
    study, found = study_of(run), {variant.slug: variant for variant in variants(run)}
    made = dict[str, Cure]()
    for wanted in study.heal:
        if wanted.train and run.train is None:
            raise InputError("study.heal trains models, and the run has no train section; add one, or train: false")
        for method, budget in product(wanted.methods, wanted.budgets):
            variant = found.get(method)
            if variant is None or variant.score.method not in SEARCHES:
                valid = ", ".join(v.slug for v in found.values() if v.score.method in SEARCHES and not v.factor)
                raise InputError(
                    f"study.heal names {method}, and the study has no such search of blocks; valid: {valid}"
                )
            for is_trained in (False, True)[: 1 + wanted.train]:
                cure = Cure(variant, budget, wanted.compensate, is_trained)
                made[cure.slug] = cure
    return tuple(made.values())


def study_of(run: Run) -> Study:
    if run.study is None:
        raise InputError(
            "the run has no study section, so there is nothing to tabulate; add one, as runs/llama2-7b.yaml"
        )
    return run.study


def _base(run: Run, study: Study, name: str) -> Variant:
    """Make a method's search with nothing else varied."""
    row = METHODS[name]

    def own(budgets: Budgets) -> str | None:
        found: str | None = getattr(budgets, row.kind)
        return found

    by_use: Mapping[Use, Sequence[str | None]] = {
        "main": [own(study.main)],
        "metric": study.metric,
        "js": study.metric if study.js is None else study.js,
        "partial": study.partial,
        "curve": study.curve,
        "high": list(map(own, study.high)),
        "race": [own(study.race or study.main)],
    }
    wanted = [budget for use, budgets in by_use.items() if use in row.use for budget in budgets if budget is not None]
    if name == BLOCKPRUNER:
        wanted.append(study.sensitivity)
    wanted += [budget for healing in study.heal if name in healing.methods for budget in healing.budgets]
    budgets, main = tuple(dict.fromkeys(wanted)), own(study.main) if "main" in row.use else None
    return Variant(
        name=row.title, method=name, kind=row.kind, score=_score(run, study, name),
        calibration=_calibration(run, _drawn(study, name)),
        budgets=budgets, main=main, timed=budgets if "timed" in row.use else (),
        raced=own(study.race or study.main) if "race" in row.use else None,
    )  # fmt: skip


def _score(run: Run, study: Study, name: str) -> Score:
    """Change the run's `score` section for a method; acceleration stays where the search has steps to leave out."""
    change = dict(METHODS[name].score)
    own = run.score.model_dump(exclude_unset=True)
    method = change.get("method", "greedy")
    if method != "greedy":
        own.pop("options", None)
    is_accelerated = method in SEARCHES and SEARCHES[method].accelerated
    if not is_accelerated or change.get("metric") in (BI, RM):
        own = {key: value for key, value in own.items() if key not in (*ACCELERATED, "options")}
    if name in study.options:
        change["options"] = study.options[name]
    return Score.model_validate({**own, **change})


def _drawn(study: Study, name: str) -> Mapping[str, Any]:
    """What a method changes in the run's `calibration` section."""
    if name in study.rows:
        return {"num_rows": study.rows[name], "packing": "joined", "split": "all", "score": "all"}
    return {"num_samples": study.samples[name]} if name in study.samples else {}


def _calibration(run: Run, change: Mapping[str, Any]) -> Calibration:
    return Calibration.model_validate({**run.calibration.model_dump(exclude_unset=True), **change})
