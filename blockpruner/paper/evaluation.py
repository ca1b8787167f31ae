"""The evaluation of a study's models. Each is made in memory from the dense model and a plan, without a checkpoint.

Decides what identifies such a model (its key in the results store) and what is asked of it. If several searches lead to
one model, it is measured once. Every result is stored when it is known.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from transformers import PreTrainedModel

from blockpruner.core.plan import Plan
from blockpruner.core.progress import Observer
from blockpruner.evaluation.settings import Evaluate, Speed
from blockpruner.evaluation.store import ITEMS, ResultsStore, Stored
from blockpruner.evaluation.suite import (
    Checkpoint,
    Evaluated,
    Evaluation,
    Evaluator,
    perplexity_of,
    speed_of,
    task_of,
    tokenizer_digest,
)
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.methods.apply import pruned_copy
from blockpruner.methods.healed import load_healed_
from blockpruner.methods.registry import KINDS
from blockpruner.model import accelerator
from blockpruner.model.models import resolve_device
from blockpruner.paper.studies import DENSE, candidate_facts, model_name
from blockpruner.store.files import replace_directory, write_sealed_json, write_table
from blockpruner.store.provenance import machine
from blockpruner.study import Study

STUDY_ITEMS = pa.schema([pa.field("model", pa.string(), nullable=False), *ITEMS])


@dataclass(frozen=True)
class Candidate:
    """A pruned model of a study."""

    plan: Plan
    rows: CalibrationSet
    """The calibration set of its search."""
    main: bool = False
    """It stands in the main tables, which ask more of it."""
    timed: frozenset[str] = frozenset()
    """The settings of `time_study` in which its generation is timed."""
    healed: str | None = None
    """Digest of its healed weights."""
    weights: Path | None = None
    """Their file."""

    @property
    def facts(self) -> dict[str, Any]:
        return candidate_facts(self.plan, self.rows.digest, self.healed)

    @property
    def name(self) -> str:
        return model_name(self.plan, self.rows.digest, self.healed)


@dataclass(frozen=True)
class CandidateModel:
    """The model of a candidate, made when first used."""

    dense: Checkpoint
    candidate: Candidate

    @cached_property
    def made(self) -> tuple[PreTrainedModel, float]:
        """The model, and the seconds that the dense one's change took."""
        started, candidate = time.monotonic(), self.candidate
        model = pruned_copy(self.dense.model, candidate.plan, candidate.rows.rows)
        if candidate.weights is not None:
            load_healed_(model, candidate.weights, shared=True)
        return model, time.monotonic() - started

    @property
    def model(self) -> PreTrainedModel:
        return self.made[0]

    def making(self, identity: Mapping[str, Any]) -> Evaluation:
        """How long it takes to make the model: of merging and slicing, a part of the method's time."""
        where = {"machine": machine(), "device": accelerator.name(resolve_device(self.dense.device))}
        return Evaluation(
            "making",
            self,
            {**identity, "kind": "making", **where, "threads": torch.get_num_threads()},
            "models",
            lambda advance: Stored({"seconds": self.made[1]}),
            lambda value: f"{value['seconds']:.1f} s",
        )

    @property
    def tokenizer(self) -> Any:
        return self.dense.tokenizer


def unique(candidates: Sequence[Candidate]) -> dict[str, Candidate]:
    """Candidates by name. Those that are one model become one, which is asked for what any of them was asked for."""
    found: dict[str, Candidate] = {}
    for candidate in candidates:
        same = found.get(candidate.name, candidate)
        main, timed = candidate.main or same.main, candidate.timed | same.timed
        found[candidate.name] = replace(same, main=main, timed=timed)
    return found


def evaluate_study(
    dense: Checkpoint,
    candidates: Sequence[Candidate],
    sources: Path,
    out: Path,
    store: Path,
    *,
    settings: Evaluate,
    study: Study,
    observer: Observer,
) -> None:
    """Measure perplexity and tasks of the dense model and of every candidate; writes models.json and items.parquet.

    Args:
        sources: holds perplexity.parquet, tasks/, and maybe wikitext.parquet.
        study: names the tasks and the WikiText-2 rows that only the dense and the main models get.
    """
    own = settings.zero_shot
    tasks = dict.fromkeys(own.tasks, own)
    main_tasks = tasks | dict.fromkeys(study.tasks, own.model_copy(update={"limit": study.tasks_limit}))
    tokenizer = tokenizer_digest(dense.directory)

    def evaluations(model: Evaluated, identity: Mapping[str, Any], main: bool) -> dict[str, Evaluation]:
        text = {**identity, "tokenizer": tokenizer}
        found = {"heldout": perplexity_of(model, sources / "perplexity.parquet", settings.perplexity, text)}
        if main and study.wikitext is not None and (sources / "wikitext.parquet").exists():
            found["wikitext2"] = perplexity_of(model, sources / "wikitext.parquet", study.wikitext, text)
        for task, zero_shot in (main_tasks if main else tasks).items():
            found[task] = task_of(model, task, sources / "tasks", zero_shot, text)
        return found

    evaluator, models, items = Evaluator(ResultsStore(store, observer.note), observer), {}, []
    wanted = unique(candidates)
    for overall, name, model, identity in _models(dense, wanted):
        asked = evaluations(model, identity, name == DENSE or wanted[name].main)
        settled = {key: evaluator.settle(replace(e, name=f"{name}: {key}"), overall) for key, e in asked.items()}
        found = dict(settled)
        texts = {key: found.pop(key).value for key in ("heldout", "wikitext2") if key in found}
        models[name] = {
            **evaluator.size(model, identity),
            "perplexity": texts,
            "tasks": {task: stored.value["scores"] for task, stored in found.items()},
            "made": {key: stored.made for key, stored in settled.items()},
        }
        if isinstance(model, CandidateModel) and not KINDS[model.candidate.plan.kind].removes_blocks:
            making = replace(model.making(identity), name=f"{name}: making")
            models[name]["making_seconds"] = evaluator.settle(making, overall).value["seconds"]
        for stored in found.values():
            assert stored.items is not None
            column = pa.array([name] * stored.items.num_rows, pa.string())
            items.append(stored.items.add_column(0, STUDY_ITEMS.field("model"), column))

    def build(directory: Path) -> None:
        write_sealed_json(directory / "models.json", models)
        write_table(directory / "items.parquet", pa.concat_tables(items))

    replace_directory(out, build)


def time_study(
    dense: Checkpoint,
    candidates: Sequence[Candidate],
    out: Path,
    store: Path,
    *,
    settings: Mapping[str, Speed],
    observer: Observer,
) -> None:
    """Time the generation of the dense model and of candidates in turns; writes speed.json to `out`.

    Args:
        settings: by name; the dense model is timed in all of them.
    """
    evaluator = Evaluator(ResultsStore(store, observer.note), observer)
    found: dict[str, dict[str, Any]] = {}
    wanted = {name: candidate for name, candidate in unique(candidates).items() if candidate.timed}
    for overall, name, model, identity in _models(dense, wanted):
        asked = [key for key in settings if name == DENSE or key in wanted[name].timed]
        found[name] = {}
        for key in asked:
            evaluation = replace(speed_of(model, dense, settings[key], identity), name=f"{name}: {key} speed")
            found[name][key] = evaluator.settle(evaluation, overall).value
    replace_directory(out, lambda directory: write_sealed_json(directory / "speed.json", found))


def _models(
    dense: Checkpoint, wanted: Mapping[str, Candidate]
) -> Iterator[tuple[float, str, Evaluated, dict[str, Any]]]:
    """The dense model and each candidate: share of them done before it, name, model, and what identifies it.

    One pruned model at a time is in memory.
    """
    yield 0.0, DENSE, dense, dense.key
    for number, (name, candidate) in enumerate(wanted.items(), 1):
        yield (
            number / (len(wanted) + 1),
            name,
            CandidateModel(dense, candidate),
            dense.key | {"pruned": candidate.facts},
        )
