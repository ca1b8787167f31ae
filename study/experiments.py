"""Experiments: many pruned models of one run, measured on the same held-out rows in one process.

Decides what a point is (one row of POINTS) and when it is known already. A kill loses no more than
one point, and no loss of a search. What is asked is decided by studies, and what is made of it by
`answers`.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any, Self

import pyarrow as pa
from transformers import PreTrainedModel

from blockpruner import pipeline, splits
from blockpruner.config.sections import Run
from blockpruner.core.blocks import BlockKind
from blockpruner.core.plan import Plan
from blockpruner.core.progress import Observer
from blockpruner.core.settings import Runtime, merged, read_settings
from blockpruner.evaluation.benchmarks import BENCHMARKS
from blockpruner.evaluation.perplexity import HeldOut, held_out, measure_perplexity
from blockpruner.evaluation.store import ResultsStore, Stored
from blockpruner.evaluation.suite import Checkpoint, InMemory
from blockpruner.evaluation.zero_shot import evaluate
from blockpruner.healing import choice
from blockpruner.healing.choice import Healing
from blockpruner.healing.settings import Train
from blockpruner.inputs.settings import Calibration
from blockpruner.inputs.texts import kind_of, read_texts
from blockpruner.methods.apply import Pruning
from blockpruner.methods.healed import find_healed
from blockpruner.methods.kind import Material
from blockpruner.methods.recipes import searches
from blockpruner.methods.registry import kind_of_method, model_facts
from blockpruner.methods.score import open_material, taken
from blockpruner.model.models import placement
from blockpruner.scoring.settings import Score
from blockpruner.splits import Pool, Rows
from blockpruner.store.files import read_json
from blockpruner.store.provenance import fingerprint, made
from blockpruner.versions import PLAN_VERSION, SCORE_VERSION, SEARCH_VERSION, WEIGHTS_VERSION
from study.points import POINTS
from study.studies import Experiment, Heal, score_of_method

Compute = Callable[[], dict[str, Any]]

BATCH = 8
"""Held-out rows that are computed at once."""

DENSE_POINT: Mapping[str, Any] = {
    "calibration": "",
    "method": "dense",
    "budget": "0",
    "heal": "",
    "seed": 0,
    "plan": "",
    "ratio": 0.0,
    "mha": 0,
    "mlp": 0,
}


@dataclass(frozen=True)
class Bench:
    """What all points of a run have in common."""

    run: Run
    dense: Checkpoint
    sources: Path
    """Folder of the texts and the tasks' items, as the stage `fetch` wrote them."""
    data: Path
    """Folder of the trial stores, of earlier results and of states of training."""
    observer: Observer

    @cached_property
    def texts(self) -> dict[str, list[str]]:
        return {path.stem: read_texts(path) for path in self.sources.glob("*.parquet")}

    @cached_property
    def heldout(self) -> HeldOut:
        settings = self.run.evaluate.perplexity
        return held_out(self.dense.tokenizer, self.texts["perplexity"], settings)

    @cached_property
    def store(self) -> ResultsStore:
        return ResultsStore(self.data / "evaluations", self.observer.note)

    def cached(self, key: Mapping[str, Any], compute: Compute) -> dict[str, Any]:
        """A result by its key, from the store or computed now."""
        stored = self.store.load(key)
        if stored is None:
            stored = replace(Stored(compute()), made=made(**placement(self.dense.model)))
            self.store.save(key, stored)
        return stored.value

    def key(self, tasks: bool) -> dict[str, Any]:
        """What decides the measurement of a model."""
        items = None
        if tasks:
            settings = self.run.evaluate.zero_shot.model_dump(mode="json")
            items = {**settings, "harness": version("lm-eval")}
        key = {"kind": "point", "batch": BATCH, "rows": self.heldout.digest, "tasks": items}
        return {**key, **self.dense.key}

    def measure(self, model: PreTrainedModel, tasks: bool) -> dict[str, Any]:
        """The NLL of each held-out row, and of each item of a task the score and the p of the right
        answer."""

        def advance(done: int, total: int) -> None:
            self.observer.advance(done, total, "rows")

        perplexity = measure_perplexity(model, self.heldout.rows, advance, BATCH)
        items = self._items(model) if tasks else {}
        return {"nll": list(perplexity.row_nll), "items": json.dumps(items)}

    def _items(self, model: PreTrainedModel) -> dict[str, Any]:
        settings = self.run.evaluate.zero_shot
        folder, tokenizer = self.sources / "tasks", self.dense.tokenizer
        values = {}
        for task in settings.tasks:
            result = evaluate(
                model,
                tokenizer,
                task,
                folder,
                settings.limit,
                advance=lambda *_: None,
                bos=settings.bos,
            )
            scores = result.items[BENCHMARKS[task].metric].to_pylist()
            p_gold = result.items["p_gold"].to_pylist()
            values[task] = {
                "score": [round(score, 5) for score in scores],
                "p_gold": [round(p, 5) for p in p_gold],
            }
        return values

    def rows(
        self, calibration: Calibration, kind: str | None, train: Train | None, judged: bool
    ) -> Rows:
        """The rows of a draw; `kind` is the only kind of text that the search sees. Fits see all
        kinds."""
        texts = self.texts["calibration"]
        fit = self.texts.get("compensate", texts)
        if kind is not None:
            texts = [text for text in texts if getattr(kind_of(text), "name", "") == kind]
        heldout = self.heldout.documents
        pool = Pool(texts, fit, self.texts.get("train"), evaluated=heldout)
        return splits.calibrate(
            calibration,
            self.run.compensate.model_copy(update={"seed": calibration.seed}),
            train,
            pool,
            self.dense.tokenizer,
            read_json(self.dense.directory / "config.json"),
            self.observer.note,
            judged=judged,
        )

    def train(
        self, healing: Healing, pruning: Pruning, settings: Train, rows: Rows
    ) -> PreTrainedModel:
        """The model of a plan, trained."""
        # Weights are large, so they go as soon as the model is loaded.
        with TemporaryDirectory(dir=self.data) as folder:
            compensated, trained = Path(folder, "before"), Path(folder, "after")
            choice.keep(compensated, healing, pruning, settings.data)
            pruning = replace(pruning, healed=find_healed([compensated], pruning.identity))
            adapters = self.data / "adapters"
            pipeline.train(pruning, settings, rows, adapters, trained, self.observer)
            healed = find_healed([trained, compensated], pruning.identity)
            return InMemory(self.dense, healing.plan, rows.search, healed).model


def measured(
    experiment: Experiment,
    run: Run,
    dense: Checkpoint,
    sources: Path,
    data: Path,
    runtime: Runtime,
    observer: Observer,
) -> tuple[pa.Table, dict[str, str]]:
    """Measure every point of an experiment, in the schema POINTS; what is known is not computed
    again. With it come facts about the held-out rows: their kinds of text as JSON, and their
    digest. Raises InputError for settings, texts or budgets that do not fit together. `sources` and
    `data` are as in `Bench`."""
    bench = Bench(run, dense, sources, data, observer)
    # All settings are checked before anything is computed.
    scores = {
        name: score_of_method(run, name, fields) for name, fields in experiment.methods.items()
    }
    observer.begin("dense model", 0.0)
    dense_result = bench.cached(
        bench.key(experiment.tasks), lambda: bench.measure(dense.model, experiment.tasks)
    )
    observer.end(f"perplexity {_perplexity(dense_result):.2f}")
    points = [{**DENSE_POINT, **dense_result}]
    # Points are taken one by one: a kill loses one at most, since each is stored.
    with open_material(dense.directory, run.model, runtime, data / "trials", observer) as material:
        points += _points(experiment, scores, bench, material)
    kinds = bench.heldout.kinds or ("",) * len(bench.heldout.rows)
    facts = {"kinds": json.dumps(kinds), "digest": bench.heldout.digest}
    return pa.Table.from_pylist(points, POINTS), facts


def _perplexity(row: Mapping[str, Any]) -> float:
    return math.exp(math.fsum(row["nll"]) / len(row["nll"]))


@dataclass(frozen=True)
class DrawSearch:
    """A method's search on one draw of calibration rows."""

    bench: Bench
    material: Material
    score: Score
    calibration: Calibration
    kind: str | None
    """The only kind of text that it sees."""
    rows: Rows
    folder: Path
    """Where its steps are."""
    counts: Mapping[str, Any]
    """What it took, as `taken` reads it."""

    @classmethod
    def run(
        cls,
        bench: Bench,
        material: Material,
        score: Score,
        changes: Mapping[str, Any],
        budgets: Sequence[str],
    ) -> Self:
        """Search as far as the budgets go; `changes` are to the run's calibration."""
        settings = merged(bench.run.calibration.model_dump(mode="json"), changes)
        kind = settings.pop("kind", None)
        calibration = read_settings(Calibration, settings)
        judged = len(searches(score)) > 1
        rows = bench.rows(calibration, kind, None, judged)
        identity = {
            "model": material.identity,
            "rows": rows.search.digest,
            "score": score.model_dump(),
        }
        folder = bench.data / "experiments" / fingerprint(identity)
        counts = pipeline.score(material, rows, score, budgets, folder)
        # A search that finds its losses in the trial store takes no time: the counts of the first
        # time are kept.
        key = {
            "kind": "search",
            "folder": folder.name,
            "budgets": list(budgets),
            "version": [SCORE_VERSION, SEARCH_VERSION, PLAN_VERSION],
        }
        counts = bench.cached(key, lambda: counts)
        return cls(bench, material, score, calibration, kind, rows, folder, counts)

    def can_compensate(self) -> bool:
        methods = [search.method for search in searches(self.score).values()]
        return all(kind_of_method(method).keeps_weights for method in methods)

    def point(self, budget: str, heal: Heal, tasks: bool) -> dict[str, Any]:
        """Commit to a budget, heal and measure: the columns of a point that the experiment does not
        decide."""
        bench, rows = self.bench, self.rows
        config = self.material.config
        proposals = pipeline.commit(
            self.folder,
            self.score,
            config,
            budget,
            rows,
            target="",
            run="",
            compensate=heal.compensate,
        )
        train = self._training(heal)
        if train is not None:
            judged = len(searches(self.score)) > 1
            rows = bench.rows(self.calibration, self.kind, train, judged)

        def compute() -> dict[str, Any]:
            start = monotonic()
            healing = pipeline.heal(lambda: bench.dense.model, proposals, rows, bench.observer)
            model = self._healed_model(healing, train, rows)
            seconds = round(monotonic() - start, 1)
            result = bench.measure(model, tasks)
            return {"chosen": healing.name, "heal_seconds": seconds, **result}

        facts = _weight_facts(proposals, heal, train, rows)
        result = bench.cached({**bench.key(tasks), **facts}, compute)
        plans = {proposal.name: proposal.plan for proposal in proposals}
        plan = plans[result.pop("chosen")]
        return {**self._plan_columns(plan), **result}

    def _training(self, heal: Heal) -> Train | None:
        if heal.train is None:
            return None
        settings = (self.bench.run.train or Train()).model_dump(mode="json")
        changes = {**heal.train, "seed": self.calibration.seed}
        return read_settings(Train, merged(settings, changes))

    def _healed_model(self, healing: Healing, train: Train | None, rows: Rows) -> PreTrainedModel:
        dense = self.bench.dense
        if train is None:
            return choice.model_of(dense.model, healing, rows.search)
        pruning = Pruning(
            dense.directory,
            healing.plan,
            rows.search,
            dense.dtype,
            dense.device,
            dense.trust_remote_code,
        )
        return self.bench.train(healing, pruning, train, rows)

    def _plan_columns(self, plan: Plan) -> dict[str, Any]:
        costs: dict[str, Any] = taken(self.counts, plan)
        # Losses that were known take no time, so the seconds would be too few.
        if costs["trials_computed"] < costs["trials_asked"]:
            costs["seconds"] = None
        return {
            "plan": " ".join(sorted(plan.removed)) or fingerprint(model_facts(plan, "")),
            "ratio": plan.ratio,
            "mha": plan.blocks[BlockKind.MHA],
            "mlp": plan.blocks[BlockKind.MLP],
            "search_ppl": plan.calibration["perplexity"],
            **costs,
        }


def _weight_facts(
    proposals: Sequence[pipeline.Proposal], heal: Heal, train: Train | None, rows: Rows
) -> dict[str, Any]:
    """What decides the weights of a healed model, for the key of its measurement."""
    digest = rows.search.digest
    plans = {proposal.name: model_facts(proposal.plan, digest) for proposal in proposals}
    facts: dict[str, Any] = {"plans": plans}
    is_compensated = heal.compensate != "none"
    # Plain models depend on no version of healing: raising it leaves their results valid.
    if is_compensated or train:
        facts["heal"] = heal.compensate
        facts["version"] = WEIGHTS_VERSION
    if is_compensated:
        facts["fit"] = [rows.fit.digest, rows.tuning.digest]
    # Several proposals are judged by rows that no search has seen.
    if len(proposals) > 1:
        facts["judge"] = rows.judge.digest
    if train is not None:
        facts["train"] = train.model_dump(mode="json", exclude={"data"})
        facts["trained"] = [rows.train.digest, rows.validation.digest]
    return facts


def _points(
    experiment: Experiment, scores: Mapping[str, Score], bench: Bench, material: Material
) -> Iterator[dict[str, Any]]:
    observer = bench.observer
    draws = list(product(experiment.calibrations.items(), experiment.seeds, scores.items()))
    for index, ((calibration, changes), seed, (method, score)) in enumerate(draws):
        names = [calibration, method]
        if len(experiment.seeds) > 1:
            names.append(f"draw {seed}")
        title = ", ".join(filter(None, names))
        observer.note(f"{index + 1} of {len(draws)}: {title}")
        changes = {**changes, "seed": seed}
        search = DrawSearch.run(bench, material, score, changes, experiment.budgets)
        columns = {"calibration": calibration, "method": method, "seed": seed}
        for step, budget in enumerate(experiment.budgets):
            progress = (index + step / len(experiment.budgets)) / len(draws)
            for name, heal in experiment.heal.items():
                observer.begin(f"{title}, {budget}, {name}", progress)
                # A method that changes weights cannot be refitted: there is no such point.
                if heal.compensate != "none" and not search.can_compensate():
                    continue
                point = search.point(budget, heal, experiment.tasks)
                yield {**columns, "budget": budget, "heal": name, **point}
                perplexity = _perplexity(point)
                observer.end(f"{point['ratio']:.1%} removed, perplexity {perplexity:.2f}")
