"""Experiments: many pruned models of one run, measured on the same held-out rows in one process.

Decides what a point is (one row of POINTS) and when it is known already. A kill loses no more than
one point, and no loss of a search. What is asked is decided by studies, and what is made of it by
`reporting.answers`.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

import pyarrow as pa
from transformers import PreTrainedModel

from blockpruner import pipeline
from blockpruner.core.blocks import BlockKind
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
from blockpruner.reporting.points import POINTS
from blockpruner.scoring.settings import Score
from blockpruner.settings import Run
from blockpruner.store.files import read_json
from blockpruner.store.provenance import fingerprint, made
from blockpruner.studies import Experiment, Heal, score_of_method
from blockpruner.versions import PLAN_VERSION, SCORE_VERSION, SEARCH_VERSION, WEIGHTS_VERSION

BATCH = 8
"""Held-out rows that are computed at once."""


@dataclass(frozen=True)
class Bench:
    """What all points of a run have in common."""

    run: Run
    dense: Checkpoint
    sources: Path
    """Folder of the texts and the tasks' items, as the stage `fetch` wrote them."""
    data: Path
    """Folder of the trial stores, of results of before and of states of training."""
    observer: Observer

    @cached_property
    def texts(self) -> dict[str, list[str]]:
        return {path.stem: read_texts(path) for path in self.sources.glob("*.parquet")}

    @cached_property
    def heldout(self) -> HeldOut:
        return held_out(
            self.dense.tokenizer, self.texts["perplexity"], self.run.evaluate.perplexity
        )

    @cached_property
    def store(self) -> ResultsStore:
        return ResultsStore(self.data / "evaluations", self.observer.note)

    def kept(self, key: Mapping[str, Any], compute: Any) -> dict[str, Any]:
        """A result by its key, from the store or computed now."""
        found = self.store.load(key)
        if found is None:
            found = replace(Stored(compute()), made=made(**placement(self.dense.model)))
            self.store.save(key, found)
        return found.value

    def key(self, tasks: bool) -> dict[str, Any]:
        """What decides the measurement of a model."""
        items = (
            self.run.evaluate.zero_shot.model_dump(mode="json") | {"harness": version("lm-eval")}
            if tasks
            else None
        )
        return {
            "kind": "point",
            "batch": BATCH,
            "rows": self.heldout.digest,
            "tasks": items,
            **self.dense.key,
        }

    def measure(self, model: PreTrainedModel, tasks: bool) -> dict[str, Any]:
        """The NLL of each held-out row, and of each item of a task the score and the p of the right
        answer."""
        advance, items = self.observer.advance, self.run.evaluate.zero_shot
        found = measure_perplexity(
            model, self.heldout.rows, lambda done, total: advance(done, total, "rows"), BATCH
        )
        scores = dict[str, Any]()
        for task in items.tasks if tasks else ():
            given = self.dense.tokenizer, task, self.sources / "tasks", items.limit
            table = evaluate(model, *given, advance=lambda *_: None, bos=items.bos).items
            own = {
                "score": table[BENCHMARKS[task].metric].to_pylist(),
                "p_gold": table["p_gold"].to_pylist(),
            }
            scores[task] = {
                key: [round(value, 5) for value in values] for key, values in own.items()
            }
        return {"nll": list(found.row_nll), "items": json.dumps(scores)}

    def rows(
        self, calibration: Calibration, kind: str | None, train: Train | None, judged: bool
    ) -> pipeline.Rows:
        """The rows of a draw; `kind` is the only kind of text that the search sees. Fits see all
        kinds."""
        own = [
            text
            for text in self.texts["calibration"]
            if kind is None or getattr(kind_of(text), "name", "") == kind
        ]
        fit = self.texts.get("compensate", self.texts["calibration"])
        pool = pipeline.Pool(own, fit, self.texts.get("train"), evaluated=self.heldout.documents)
        compensate = self.run.compensate.model_copy(update={"seed": calibration.seed})
        config = read_json(self.dense.directory / "config.json")
        given = (
            calibration,
            compensate,
            train,
            pool,
            self.dense.tokenizer,
            config,
            self.observer.note,
        )
        return pipeline.calibrate(*given, judged=judged)

    def train(
        self, healing: Healing, pruning: Pruning, wanted: Train, rows: pipeline.Rows
    ) -> PreTrainedModel:
        """The model of a plan, trained."""
        with TemporaryDirectory(dir=self.data) as folder:
            before, after = Path(folder, "before"), Path(folder, "after")
            choice.keep(before, healing, pruning, wanted.data)
            pruning = replace(pruning, healed=find_healed([before], pruning.identity))
            pipeline.train(pruning, wanted, rows, self.data / "adapters", after, self.observer)
            healed = find_healed([after, before], pruning.identity)
            return InMemory(self.dense, healing.plan, rows.search, healed).model


def measured(
    wanted: Experiment,
    run: Run,
    dense: Checkpoint,
    sources: Path,
    data: Path,
    runtime: Runtime,
    observer: Observer,
) -> tuple[pa.Table, dict[str, str]]:
    """Measure every point of an experiment, in the schema POINTS; what is known is not computed
    again. With it comes what is said of the held-out rows: their kinds of text as JSON, and their
    digest. Raises InputError for settings, texts or budgets that do not fit together. `sources` and
    `data` are as in `Bench`."""
    bench = Bench(run, dense, sources, data, observer)
    scores = {name: score_of_method(run, name, fields) for name, fields in wanted.methods.items()}
    observer.begin("dense model", 0.0)
    own = bench.kept(bench.key(wanted.tasks), lambda: bench.measure(dense.model, wanted.tasks))
    found = [{**DENSE_POINT, **own}]
    observer.end(f"perplexity {_perplexity(found[0]):.2f}")
    with open_material(dense.directory, run.model, runtime, data / "trials", observer) as material:
        found += _points(wanted, scores, bench, material)
    kinds = bench.heldout.kinds or ("",) * len(bench.heldout.rows)
    about = {"kinds": json.dumps(kinds), "digest": bench.heldout.digest}
    return pa.Table.from_pylist(found, POINTS), about


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


def _perplexity(row: Mapping[str, Any]) -> float:
    return math.exp(math.fsum(row["nll"]) / len(row["nll"]))


def _points(
    wanted: Experiment, scores: Mapping[str, Score], bench: Bench, material: Material
) -> Iterator[dict[str, Any]]:
    cells = list(product(wanted.calibrations.items(), wanted.seeds, scores.items()))
    for number, ((name, changes), seed, (method, score)) in enumerate(cells):
        own = merged(bench.run.calibration.model_dump(mode="json"), {**changes, "seed": seed})
        kind = own.pop("kind", None)
        calibration = read_settings(Calibration, own)
        judged = len(searches(score)) > 1
        rows = bench.rows(calibration, kind, None, judged)
        words = ", ".join(
            filter(None, (name, method, f"draw {seed}" if len(wanted.seeds) > 1 else ""))
        )
        bench.observer.note(f"{number + 1} of {len(cells)}: {words}")
        folder = (
            bench.data
            / "experiments"
            / fingerprint(
                {
                    "model": material.identity,
                    "rows": rows.search.digest,
                    "score": score.model_dump(),
                }
            )
        )
        counts = pipeline.score(material, rows, score, wanted.budgets, folder)
        key: dict[str, Any] = {
            "kind": "search",
            "folder": folder.name,
            "budgets": list(wanted.budgets),
        }
        key["version"] = [SCORE_VERSION, SEARCH_VERSION, PLAN_VERSION]
        counts = bench.kept(key, lambda counts=counts: counts)
        for budget, (heal, how) in product(wanted.budgets, wanted.heal.items()):
            overall = (number + wanted.budgets.index(budget) / len(wanted.budgets)) / len(cells)
            bench.observer.begin(f"{words}, {budget}, {heal}", overall)
            point = {
                "calibration": name,
                "method": method,
                "budget": budget,
                "heal": heal,
                "seed": seed,
            }
            row = _point(
                point,
                bench,
                material,
                score,
                rows,
                folder,
                how,
                wanted,
                (calibration, kind),
                counts,
            )
            if row is not None:
                yield row
                bench.observer.end(f"{row['ratio']:.1%} removed, perplexity {_perplexity(row):.2f}")


def _point(
    point: Mapping[str, Any],
    bench: Bench,
    material: Material,
    score: Score,
    rows: pipeline.Rows,
    folder: Path,
    how: Heal,
    wanted: Experiment,
    drawn: tuple[Calibration, str | None],
    counts: Mapping[str, Any],
) -> dict[str, Any] | None:
    """One point; None where the method's weights cannot be compensated."""
    if how.compensate != "none" and not all(
        kind_of_method(s.method).is_part for s in searches(score).values()
    ):
        return None
    own: dict[str, Any] = {"target": "", "run": "", "compensate": how.compensate}
    proposals = pipeline.commit(folder, score, material.config, point["budget"], rows, **own)
    train = None
    if how.train is not None:
        given = (bench.run.train or Train()).model_dump(mode="json")
        train = read_settings(Train, merged(given, {**how.train, "seed": point["seed"]}))
        rows = bench.rows(drawn[0], drawn[1], train, len(searches(score)) > 1)
    facts: dict[str, Any] = {
        "plans": {each.name: model_facts(each.plan, rows.search.digest) for each in proposals}
    }
    facts |= (
        {"heal": how.compensate, "version": WEIGHTS_VERSION}
        if how.compensate != "none" or train
        else {}
    )
    facts |= {"fit": [rows.fit.digest, rows.tuning.digest]} if how.compensate != "none" else {}
    facts |= {"judge": rows.judge.digest} if len(proposals) > 1 else {}
    if train is not None:
        recipe = train.model_dump(mode="json", exclude={"data"})
        facts |= {"train": recipe, "trained": [rows.train.digest, rows.validation.digest]}

    def compute() -> dict[str, Any]:
        began = monotonic()
        healing = pipeline.heal(lambda: bench.dense.model, proposals, rows, bench.observer)
        place = (
            bench.dense.directory,
            healing.plan,
            rows.search,
            bench.dense.dtype,
            bench.dense.device,
        )
        pruning = Pruning(*place, bench.dense.trust_remote_code)
        if train is None:
            model = choice.model_of(bench.dense.model, healing, rows.search)
        else:
            model = bench.train(healing, pruning, train, rows)
        spent = monotonic() - began
        return {
            "chosen": healing.name,
            "heal_seconds": round(spent, 1),
            **bench.measure(model, wanted.tasks),
        }

    value = bench.kept({**bench.key(wanted.tasks), **facts}, compute)
    chosen = value.pop("chosen")
    (plan,) = (each.plan for each in proposals if each.name == chosen)
    took: dict[str, Any] = taken(counts, plan)
    if took["trials_computed"] < took["trials_asked"]:
        took["seconds"] = None
    what = " ".join(sorted(plan.removed)) or fingerprint(model_facts(plan, ""))
    size = {
        "plan": what,
        "ratio": plan.ratio,
        "mha": plan.blocks[BlockKind.MHA],
        "mlp": plan.blocks[BlockKind.MLP],
    }
    return {**point, **size, "search_ppl": plan.calibration["perplexity"], **took, **value}
