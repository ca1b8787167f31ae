"""The evaluation of a study's models in memory: each made from the dense model and a plan, no checkpoint between.

Decides what identifies such a model (its key in the results store) and what is asked of it. A model that several
searches lead to is measured once, whoever asks; every result is stored when it is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
from transformers import PreTrainedModel

from blockpruner.core.plan import Plan
from blockpruner.core.progress import Observer
from blockpruner.evaluation.store import ITEMS, ResultsStore
from blockpruner.evaluation.suite import (
    Checkpoint,
    Phase,
    Subject,
    perplexity_phase,
    settle,
    size_of,
    speed_phase,
    task_phase,
    tokenizer_digest,
)
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.methods.apply import pruned_copy
from blockpruner.paper.studies import DENSE, model_facts, model_name
from blockpruner.store.files import replace_directory, write_json, write_table
from blockpruner.versions import EVAL_VERSION

STUDY_ITEMS = pa.schema([pa.field("model", pa.string(), nullable=False), *ITEMS])


@dataclass(frozen=True)
class Candidate:
    """A pruned model of a study. rows: the calibration set of its search; main: it stands in the main tables, which ask
    more of it; timed: the settings of `time_study` in which its generation is timed."""

    plan: Plan
    rows: CalibrationSet
    main: bool = False
    timed: frozenset[str] = frozenset()

    @property
    def facts(self) -> dict[str, Any]:
        """All that the model depends on beside the dense one."""
        return model_facts(self.plan, self.rows.digest)

    @property
    def name(self) -> str:
        return model_name(self.plan, self.rows.digest)


@dataclass(frozen=True)
class Pruned:
    """The model of a candidate, made when first used."""

    dense: Checkpoint
    candidate: Candidate

    @cached_property
    def model(self) -> PreTrainedModel:
        return pruned_copy(self.dense.model, self.candidate.plan, self.candidate.rows.rows)

    @property
    def tokenizer(self) -> Any:
        return self.dense.tokenizer


def unique(candidates: Sequence[Candidate]) -> dict[str, Candidate]:
    """Candidates by name; of those that are one model, what is asked of any is asked of it."""
    found: dict[str, Candidate] = {}
    for candidate in candidates:
        same = found.get(candidate.name, candidate)
        main, timed = candidate.main or same.main, candidate.timed | same.timed
        found[candidate.name] = Candidate(same.plan, same.rows, main, timed)
    return found


def evaluate_study(
    dense: Checkpoint,
    candidates: Sequence[Candidate],
    sources: Path,
    out: Path,
    store: Path,
    *,
    perplexity: Mapping[str, Any],
    tasks: Mapping[str, int | None],
    main_tasks: Mapping[str, int | None],
    wikitext: Mapping[str, Any] | None,
    observer: Observer,
) -> None:
    """Perplexity and tasks of the dense model and of every candidate; writes models.json and items.parquet to `out`.

    Args:
        sources: holds perplexity.parquet, tasks/, and wikitext.parquet where there is one.
        tasks, main_tasks: how many items of each (null: all); the latter of the dense and the main models only.
        wikitext: seq_len and max_rows of WikiText-2, of the same models.
    """

    def phases(subject: Subject, identity: Mapping[str, Any], main: bool) -> dict[str, Phase]:
        text = {**identity, "tokenizer": tokenizer}
        found = {"heldout": perplexity_phase(subject, sources / "perplexity.parquet", perplexity, text)}
        if main and wikitext is not None and (sources / "wikitext.parquet").exists():
            found["wikitext2"] = perplexity_phase(subject, sources / "wikitext.parquet", wikitext, text)
        for task, limit in {**tasks, **(main_tasks if main else {})}.items():
            found[task] = task_phase(subject, task, sources / "tasks", limit, text)
        return found

    tokenizer = tokenizer_digest(dense.directory)
    results, models, items = ResultsStore(store, observer.note), {}, []
    wanted = unique(candidates)
    for number, (name, subject, identity) in enumerate(_subjects(dense, wanted)):
        main = name == DENSE or wanted[name].main
        found = {}
        for key, phase in phases(subject, identity, main).items():
            found[key] = settle(replace(phase, name=f"{name}: {key}"), results, observer, number / (len(wanted) + 1))
        texts = {key: found.pop(key).value for key in ("heldout", "wikitext2") if key in found}
        models[name] = {
            **size_of(subject, identity, results),
            "perplexity": texts,
            "tasks": {task: stored.value["scores"] for task, stored in found.items()},
        }
        for stored in found.values():
            assert stored.items is not None
            column = pa.array([name] * stored.items.num_rows, pa.string())
            items.append(stored.items.add_column(0, STUDY_ITEMS.field("model"), column))

    def build(directory: Path) -> None:
        write_json(directory / "models.json", models)
        write_table(directory / "items.parquet", pa.concat_tables(items))

    replace_directory(out, build)


def time_study(
    dense: Checkpoint,
    candidates: Sequence[Candidate],
    out: Path,
    store: Path,
    *,
    settings: Mapping[str, Mapping[str, int]],
    observer: Observer,
) -> None:
    """Generation of the dense model and of candidates in turns; writes speed.json to `out`.

    Args:
        settings: prompt_tokens, new_tokens, repeats and batch by name; the dense model is timed in all of them.
    """
    results = ResultsStore(store, observer.note)
    found: dict[str, dict[str, Any]] = {}
    wanted = {name: candidate for name, candidate in unique(candidates).items() if candidate.timed}
    for number, (name, subject, identity) in enumerate(_subjects(dense, wanted)):
        asked = [key for key in settings if name == DENSE or key in wanted[name].timed]
        found[name] = {}
        for key in asked:
            phase = speed_phase(subject, dense, settings[key], identity)
            named = replace(phase, name=f"{name}: {key} speed")
            found[name][key] = settle(named, results, observer, number / (len(wanted) + 1)).value
    replace_directory(out, lambda directory: write_json(directory / "speed.json", found))


def _subjects(dense: Checkpoint, wanted: Mapping[str, Candidate]) -> Any:
    """(name, model, what identifies it) of the dense model and each candidate; one pruned model in memory at a time."""
    identity = {"model": dense.identity, "dtype": dense.dtype, "eval_version": EVAL_VERSION}
    yield DENSE, dense, identity
    for name, candidate in wanted.items():
        yield name, Pruned(dense, candidate), {**identity, "pruned": candidate.facts}
