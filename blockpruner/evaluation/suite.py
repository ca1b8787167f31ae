"""The evaluation of one checkpoint: perplexity, zero-shot tasks, speed beside the dense model.

Decides what identifies a result (its key in the results store) and how results are summed up. What is stored is
never computed again, whoever asks; models are loaded only if something is missing; every finished task is stored
at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import torch
from transformers import PreTrainedModel

from blockpruner.core.errors import InputError
from blockpruner.core.progress import Observer
from blockpruner.evaluation.benchmarks import BENCHMARKS, benchmark_of, task_digest
from blockpruner.evaluation.perplexity import held_out_rows, measure_perplexity
from blockpruner.evaluation.speed import device_name, measure_speed, weight_bytes
from blockpruner.evaluation.store import ResultsStore, Stored
from blockpruner.inputs.calibration import check_context
from blockpruner.inputs.texts import TEXTS
from blockpruner.inputs.tokenizers import load_tokenizer
from blockpruner.model.models import load_model, resolve_device, set_threads
from blockpruner.store.files import read_json, read_table, replace_directory, write_json, write_table
from blockpruner.store.provenance import file_sha256, fingerprint, machine, model_identity
from blockpruner.versions import EVAL_VERSION

TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model")

Advance = Callable[[int, int], None]


class Subject(Protocol):
    """What is evaluated: a model and its tokenizer, made when first used."""

    @property
    def model(self) -> PreTrainedModel: ...
    @property
    def tokenizer(self) -> Any: ...


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is loaded when first used."""

    directory: Path
    dtype: str
    device: str
    trust_remote_code: bool

    @cached_property
    def model(self) -> PreTrainedModel:
        return load_model(self.directory, self.dtype, self.device, self.trust_remote_code)

    @cached_property
    def identity(self) -> str:
        return model_identity(self.directory)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.directory, self.trust_remote_code)


@dataclass(frozen=True)
class Phase:
    """One unit of work and of loss. compute: called with a progress function; summary: one line from the value."""

    name: str
    key: Mapping[str, Any]
    steps: str
    compute: Callable[[Advance], Stored]
    summary: Callable[[Mapping[str, Any]], str]


def benchmark(
    checkpoint: Path,
    dense: Path,
    sources: Path,
    out: Path,
    store: Path,
    *,
    perplexity: Mapping[str, Any],
    zero_shot: Mapping[str, Any],
    speed: Mapping[str, Any],
    dtype: str,
    device: str,
    threads: int | str,
    observer: Observer,
) -> dict[str, Any]:
    """Evaluate `checkpoint` and write results.json, items.parquet and lm_eval.json to the folder `out`.

    Args:
        checkpoint: the dense model itself, or one of our own exports, whose modelling file is then trusted.
        sources: holds perplexity.parquet and tasks/, as the fetch stage wrote them.
        store: the results store.
        perplexity: seq_len, max_rows; zero_shot: tasks, limit; speed: prompt_tokens, new_tokens, repeats, batch.

    Returns:
        results.json: parameters, weight_bytes; perplexity; tasks (each with its main metric's value and stderr);
        average (mean of the main metrics that are accuracies, SE = sqrt(sum SE_t^2) / tasks; null if none is);
        chance (accuracy of guessing, by task; null for a perplexity);
        speed (pruned, unless `checkpoint` is the dense model; dense; dense over pruned seconds).

    Raises:
        InputError: an unknown task, rows longer than the context, missing or damaged sources or checkpoints.
    """
    tasks = [benchmark_of(name).task for name in zero_shot["tasks"]]
    if not tasks:
        raise InputError(f"evaluate.zero_shot.tasks is empty; name at least one of {', '.join(BENCHMARKS)}")
    check_context(perplexity["seq_len"], read_json(checkpoint / "config.json"), "evaluate.perplexity.seq_len")
    set_threads(threads)
    dense_loader = Checkpoint(dense, dtype, device, trust_remote_code=False)
    loader = dense_loader if checkpoint == dense else Checkpoint(checkpoint, dtype, device, trust_remote_code=True)
    model = {"model": loader.identity, "dtype": dtype, "eval_version": EVAL_VERSION}
    text = model | {"tokenizer": tokenizer_digest(checkpoint)}
    phases = [
        perplexity_phase(loader, sources / "perplexity.parquet", perplexity, text),
        *(task_phase(loader, task, sources / "tasks", zero_shot["limit"], text) for task in tasks),
        speed_phase(loader, dense_loader, speed, model),
    ]
    results_store = ResultsStore(store, observer.note)
    found = {
        phase.name: settle(phase, results_store, observer, number / len(phases)) for number, phase in enumerate(phases)
    }
    results = {
        **size_of(loader, model, results_store),
        "perplexity": {k: v for k, v in found["perplexity"].value.items() if k != "row_nll"},
        "tasks": {task: found[task].value["scores"] for task in tasks},
        "average": _average([found[task].value["scores"] for task in tasks if benchmark_of(task).is_accuracy]),
        "chance": {task: _chance(task, found[task].items) for task in tasks},
        "speed": found["speed"].value,
    }

    def build(directory: Path) -> None:
        write_json(directory / "results.json", results)
        write_table(directory / "items.parquet", pa.concat_tables([found[task].items for task in tasks]))
        write_json(directory / "lm_eval.json", _merge(found[task].value["harness"] for task in tasks))

    replace_directory(out, build)
    return results


def size_of(subject: Subject, identity: Mapping[str, Any], store: ResultsStore) -> dict[str, Any]:
    """parameters and weight_bytes, from the store or counted."""
    key = {**identity, "kind": "size"}
    size = store.load(key)
    if size is None:
        model = subject.model
        size = Stored({"parameters": model.num_parameters(), "weight_bytes": weight_bytes(model)})
        store.save(key, size)
    return size.value


def tokenizer_digest(directory: Path) -> str:
    files = sorted({path for pattern in TOKENIZER_FILES for path in directory.glob(pattern)})
    return fingerprint({path.name: file_sha256(path) for path in files})


def settle(phase: Phase, store: ResultsStore, observer: Observer, overall: float) -> Stored:
    """A phase's result from the store, or computed and stored."""
    observer.begin(phase.name, overall)
    stored = store.load(phase.key)
    cached = stored is not None
    if stored is None:
        stored = phase.compute(lambda done, total: observer.advance(done, total, phase.steps))
        store.save(phase.key, stored)
    observer.end(phase.summary(stored.value), cached=cached)
    return stored


def perplexity_phase(loader: Subject, texts: Path, settings: Mapping[str, Any], identity: Mapping[str, Any]) -> Phase:
    held_out = read_table(texts, TEXTS)[0].column("text").to_pylist()
    seq_len, max_rows = settings["seq_len"], settings["max_rows"]

    def compute(advance: Advance) -> Stored:
        rows = held_out_rows(loader.tokenizer, held_out, seq_len, max_rows)
        return Stored(asdict(measure_perplexity(loader.model, rows, advance)) | {"seq_len": seq_len})

    key = {"kind": "perplexity", "texts": fingerprint({"texts": held_out}), "seq_len": seq_len, "max_rows": max_rows}
    return Phase(
        "perplexity",
        {**identity, **key},
        "rows",
        compute,
        lambda value: f"{value['perplexity']:.2f} over {value['rows']} rows of {value['seq_len']} tokens",
    )


def task_phase(loader: Subject, task: str, task_dir: Path, limit: int | None, identity: Mapping[str, Any]) -> Phase:
    def compute(advance: Advance) -> Stored:
        from blockpruner.evaluation.zero_shot import evaluate  # lm-eval, seconds to import, only if it is to run

        result = evaluate(loader.model, loader.tokenizer, task, task_dir, limit, advance=advance)
        metric = benchmark_of(task).metric
        main = {"metric": metric, "value": result.scores[metric], "stderr": result.scores[f"{metric}_stderr"]}
        scores = {**main, **result.scores, "items": result.items.num_rows}
        return Stored({"scores": scores, "harness": result.harness}, result.items)

    key = {"kind": "task", "task": task, "data": task_digest(task, task_dir), "limit": limit}
    return Phase(
        task,
        {**identity, **key, "harness": version("lm-eval")},
        "requests",
        compute,
        lambda value: "{metric} {value:.3f} of {items} items".format(**value["scores"]),
    )


def speed_phase(loader: Subject, dense: Checkpoint, settings: Mapping[str, Any], identity: Mapping[str, Any]) -> Phase:
    loaders = {"dense": dense} if loader is dense else {"pruned": loader, "dense": dense}

    def compute(advance: Advance) -> Stored:
        models = {name: side.model for name, side in loaders.items()}
        value = {name: asdict(speed) for name, speed in measure_speed(models, **settings, advance=advance).items()}
        if loader is dense:
            return Stored(value)
        medians = {
            part: [value[name][f"{part}_seconds"]["median"] for name in ("dense", "pruned")]
            for part in ("prefill", "decode", "generation")
        }
        return Stored(value | {f"speedup_{part}": before / after for part, (before, after) in medians.items()})

    key = {
        "kind": "speed",
        "dense": dense.identity,
        "settings": dict(settings),
        "machine": machine(),
        "device": device_name(resolve_device(dense.device)),
        "threads": torch.get_num_threads(),
        "versions": {package: version(package) for package in ("torch", "transformers")},
    }
    return Phase("speed", {**identity, **key}, "generations", compute, _speed_summary)


def _speed_summary(value: Mapping[str, Any]) -> str:
    dense = f"{value['dense']['decode_tokens_per_second']:.1f}"
    if "pruned" not in value:
        return f"{dense} tokens/s"
    pruned = f"{value['pruned']['decode_tokens_per_second']:.1f}"
    return f"{pruned} tokens/s, dense {dense}; generation {value['speedup_generation']:.2f}x"


def _average(scores: list[dict[str, Any]]) -> dict[str, float | None]:
    if not scores:
        return {"value": None, "stderr": None}
    errors = [score["stderr"] for score in scores]
    stderr = None if None in errors else math.hypot(*errors) / len(errors)
    return {"value": math.fsum(score["value"] for score in scores) / len(scores), "stderr": stderr}


def _chance(task: str, items: pa.Table | None) -> float | None:
    """Expected accuracy of guessing: mean over items of 1 / choices; 0 where there are none; null where the metric is
    no accuracy."""
    assert items is not None
    if not benchmark_of(task).has_choices:
        return 0.0 if benchmark_of(task).is_accuracy else None
    choices = items.column("loglikelihoods").combine_chunks().value_lengths().to_pylist()
    return math.fsum(1 / count for count in choices) / len(choices)


def _merge(parts: Iterable[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """lm-eval's results of single tasks, {section: {task: ...}}, as it reports several."""
    merged: dict[str, dict[str, Any]] = {}
    for part in parts:
        for section, values in part.items():
            merged.setdefault(section, {}).update(values)
    return merged
