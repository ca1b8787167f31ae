"""The evaluation of models: perplexity, zero-shot tasks, and speed next to the dense model.

Decides what identifies a result (its key in the results store) and how results are summed up. A
model is a checkpoint, or made in memory of the dense one, a plan and healed weights. A stored
result is never computed again. Models are loaded only if a result is missing. Every result is
stored at once.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import pyarrow as pa
import torch
from transformers import PreTrainedModel

from blockpruner.core.blocks import BlockKind
from blockpruner.core.errors import InputError
from blockpruner.core.plan import Plan
from blockpruner.core.progress import Observer
from blockpruner.evaluation.benchmarks import BENCHMARKS
from blockpruner.evaluation.perplexity import held_out, measure_perplexity
from blockpruner.evaluation.samples import NEW_TOKENS, PROMPTS, answer
from blockpruner.evaluation.settings import Evaluate, Perplexity, Speed, ZeroShot
from blockpruner.evaluation.speed import measure_speed, weight_bytes
from blockpruner.evaluation.store import ResultsStore, Stored
from blockpruner.evaluation.tasks import task_digest
from blockpruner.inputs.calibration import CalibrationSet, check_context, require_embedded
from blockpruner.inputs.checkpoints import GENERATION_FILE, TOKENIZER_FILES
from blockpruner.inputs.texts import kind_of, read_texts
from blockpruner.inputs.tokenizers import load_export_tokenizer, load_tokenizer
from blockpruner.methods.apply import pruned_copy
from blockpruner.methods.healed import Healed, load_healed_
from blockpruner.methods.registry import model_facts
from blockpruner.model import accelerator
from blockpruner.model.classes import has_our_code
from blockpruner.model.models import load_model, placement, resolve_device
from blockpruner.model.process_group import ProcessGroup, run_processes
from blockpruner.store.files import read_json, replace_directory, write_sealed_json, write_table
from blockpruner.store.manifest import (
    REPORT_FILE,
    content_sha256,
    manifest,
    model_identity,
    require_verified,
)
from blockpruner.store.plans import save_plan
from blockpruner.store.provenance import fingerprint, machine, made
from blockpruner.versions import EVAL_VERSION

Advance = Callable[[int, int], None]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is loaded when first used."""

    directory: Path
    dtype: str
    device: str
    trust_remote_code: bool
    """Whether the run file trusts the code of the dense model's repository."""
    dense: Path | None = None
    """The dense model's directory, for an export. Of its code, only ours is run."""
    beside: "Checkpoint | None" = None
    """Another one, of whose model it takes the tensors that are equal to its own (`load_model`)."""

    def on(self, device: str) -> Self:
        return replace(self, device=device)

    def export(self, directory: Path) -> Self:
        """One of our own verified exports of this dense model."""
        return replace(self, directory=directory, dense=self.directory)

    @cached_property
    def model(self) -> PreTrainedModel:
        trusted = self.trust_remote_code if self.dense is None else has_our_code(self.directory)
        beside = None if self.beside is None else self.beside.model
        return load_model(self.directory, self.dtype, self.device, trusted, shared_with=beside)

    @cached_property
    def tokenizer(self) -> Any:
        if self.dense is None:
            return load_tokenizer(self.directory, self.trust_remote_code)
        return load_export_tokenizer(self.directory, self.dense, self.trust_remote_code)

    @cached_property
    def key(self) -> dict[str, Any]:
        """What identifies the model in the keys of its results; raises InputError for an export
        that has changed."""
        files = manifest(self.directory) if self.dense is None else require_verified(self.directory)
        return {"model": model_identity(files), "dtype": self.dtype, "eval_version": EVAL_VERSION}


@dataclass(frozen=True)
class InMemory:
    """A pruned model that is made when first used, and never written. It shares tensors with the
    dense one."""

    dense: Checkpoint
    plan: Plan
    rows: CalibrationSet
    """The rows that the plan's kind may compute weights from."""
    healed: Healed | None = None

    def on(self, device: str) -> Self:
        return replace(self, dense=self.dense.on(device))

    @cached_property
    def model(self) -> PreTrainedModel:
        model = pruned_copy(self.dense.model, self.plan, self.rows.rows)
        if self.healed is not None:
            load_healed_(model, self.healed.path, shared=True)
        return model

    @property
    def tokenizer(self) -> Any:
        return self.dense.tokenizer

    @cached_property
    def key(self) -> dict[str, Any]:
        facts = model_facts(self.plan, self.rows.digest)
        return self.dense.key | {
            "pruned": facts | ({"healed": self.healed.digest} if self.healed else {})
        }


Evaluated = Checkpoint | InMemory
"""A model and its tokenizer, made when first used."""


@dataclass(frozen=True)
class Evaluation:
    """One result. It is computed and stored as a whole, and a kill loses no more than one."""

    name: str
    subject: Evaluated
    key: Mapping[str, Any]
    """Everything that the result depends on, except the environment."""
    steps: str
    """What its progress counts, for instance "rows"."""
    compute: Callable[[Advance], Stored]
    summary: Callable[[Mapping[str, Any]], str]


@dataclass(frozen=True)
class Evaluator:
    """Takes results from the store, and computes and stores those that are missing."""

    store: ResultsStore
    observer: Observer

    def settle(self, evaluation: Evaluation, overall: float) -> Stored:
        """The result of an evaluation; `overall` is the share of all work that is done before
        it."""
        self.observer.begin(evaluation.name, overall)
        stored = self.store.load(evaluation.key)
        cached = stored is not None
        if stored is None:
            with accelerator.named_if_too_large(
                f"evaluation {evaluation.name}",
                "use a larger device, or set runtime.device: split or cpu (for speed also"
                " evaluate.speed: null). Results found before are kept",
            ):
                found = evaluation.compute(
                    lambda done, total: self.observer.advance(done, total, evaluation.steps)
                )
            stored = replace(found, made=made(**placement(evaluation.subject.model), **found.made))
            self.store.save(evaluation.key, stored)
        self.observer.end(evaluation.summary(stored.value), cached=cached)
        return stored

    def size(self, subject: Evaluated, identity: Mapping[str, Any]) -> dict[str, Any]:
        """parameters and weight_bytes, from the store or counted."""
        key = {**identity, "kind": "size"}
        size = self.store.load(key)
        if size is None:
            model = subject.model
            size = Stored(
                {"parameters": model.num_parameters(), "weight_bytes": weight_bytes(model)}
            )
            self.store.save(key, size)
        return size.value


def benchmark(
    subject: Checkpoint | InMemory,
    dense: Checkpoint,
    sources: Path,
    out: Path,
    store: Path,
    *,
    plan: Plan | None = None,
    settings: Evaluate,
    observer: Observer,
    search: Mapping[str, float] | None = None,
    processes: int = 1,
) -> dict[str, Any]:
    """Evaluate a model and write results.json, items.parquet, speed.json and its plan.json to the
    folder `out`. Raises InputError if a task is unknown, rows exceed the context, or a source or
    checkpoint is missing or damaged.

    Args:
        subject: `dense` itself, one of our own verified exports, or a model that was never written.
        sources: holds perplexity.parquet and tasks/, as the fetch stage wrote them.
        plan: that of the subject; None for the dense model.
        search: what the search of the plan took: seconds, trials_asked, trials_computed; None where
            it is not known.
        processes: how many of this machine share out the results, all but speed.

    Returns:
        results.json has these keys:
        perplexity: with the NLL of each row.
        tasks: the scores of each task; value and stderr are those of its main metric.
        average: mean of the main metrics, SE = sqrt(sum SE_t^2) / tasks.
        chance: the accuracy of guessing, by task.
        samples: answers to `samples.PROMPTS`.
        formats: the folders of verified exports next to the subject, its own among them.
        speed.json has what no two runs agree on:
        speed: pruned (unless the subject is the dense model) and dense; null where it is not
            wanted.
        made: where and when each result was computed, as from `provenance.made`.
    """
    tasks = settings.zero_shot.tasks
    if not tasks:
        message = f"evaluate.zero_shot.tasks is empty; name at least one of {', '.join(BENCHMARKS)}"
        raise InputError(message, rule="no-tasks", key="evaluate.zero_shot.tasks")
    folder = subject.directory if isinstance(subject, Checkpoint) else dense.directory
    check_context(
        settings.perplexity.seq_len,
        read_json(folder / "config.json"),
        "evaluate.perplexity.seq_len",
    )
    is_export = isinstance(subject, Checkpoint) and subject is not dense
    whole = (
        replace(dense, beside=subject) if isinstance(subject, Checkpoint) and is_export else dense
    )
    given = (subject, sources, settings, subject.key | {"tokenizer": tokenizer_digest(folder)})
    evaluations = _without_speed(*given)
    evaluator = Evaluator(ResultsStore(store, observer.note), observer)
    if processes > 1 and any(evaluator.store.load(each.key) is None for each in evaluations):
        with TemporaryDirectory() as claims:
            run_processes(processes, dense.device, _settle, observer, store, claims, *given)
    if settings.speed is not None:
        evaluations.append(speed_of(subject, whole, settings.speed, subject.key))
    found = {
        each.name: evaluator.settle(each, n / len(evaluations))
        for n, each in enumerate(evaluations)
    }
    scores = {task: found[task].value["scores"] for task in tasks}
    results = {
        **evaluator.size(subject, subject.key),
        "perplexity": (
            found["perplexity"].value | {"row_nll": list(found["perplexity"].value["row_nll"])}
        ),
        "tasks": scores,
        "average": _average(list(scores.values())),
        "chance": {task: BENCHMARKS[task].chance(found[task].items) for task in tasks},
        "samples": found["samples"].value["samples"],
        "formats": (
            sorted(path.parent.name for path in folder.parent.glob(f"*/{REPORT_FILE}"))
            if is_export
            else []
        ),
    }
    timings = {
        "speed": found["speed"].value if "speed" in found else None,
        "made": {name: stored.made for name, stored in found.items()},
        "search": dict(search or {}),
    }

    def build(directory: Path) -> None:
        write_sealed_json(directory / "results.json", results)
        write_sealed_json(directory / "speed.json", timings)
        write_table(
            directory / "items.parquet", pa.concat_tables([found[task].items for task in tasks])
        )
        if plan is not None:
            save_plan(plan, directory / "plan.json")

    replace_directory(out, build)
    return results | timings


def _without_speed(
    subject: Evaluated, sources: Path, settings: Evaluate, text_key: Mapping[str, Any]
) -> list[Evaluation]:
    return [
        perplexity_of(subject, sources / "perplexity.parquet", settings.perplexity, text_key),
        *(
            task_of(subject, task, sources / "tasks", settings.zero_shot, text_key)
            for task in settings.zero_shot.tasks
        ),
        samples_of(subject, text_key),
    ]


def _settle(
    team: ProcessGroup,
    device: str,
    observer: Observer,
    store: Path,
    claims: str,
    subject: Evaluated,
    *given: Any,
) -> None:
    """The work of one process: one result after another that no other has begun, of those of
    `_without_speed`."""
    evaluations = _without_speed(subject.on(device), *given)
    evaluator = Evaluator(ResultsStore(store, observer.note), observer)
    for number, each in enumerate(evaluations):
        with suppress(FileExistsError):
            Path(claims, each.name).touch(exist_ok=False)
            evaluator.settle(each, number / len(evaluations))


def headline(results: Mapping[str, Any], plan: Plan | None) -> dict[str, float | int]:
    """The main figures of a model for data/metrics; `plan` is None for the dense model. kv_cache is
    a share."""
    gone = plan.blocks if plan else dict.fromkeys(BlockKind, 0)
    figures = {task: scores["value"] for task, scores in results["tasks"].items()}
    figures |= {
        "average": results["average"]["value"],
        "perplexity": results["perplexity"]["perplexity"],
    }
    figures |= {"ratio": plan.ratio if plan else 0.0, "parameters": results["parameters"]}
    figures |= {"mha_removed": gone[BlockKind.MHA], "mlp_removed": gone[BlockKind.MLP]}
    figures["kv_cache"] = 1 - plan.removes["kv"] if plan else 1.0
    return {key: round(value, 4) for key, value in figures.items()}


def tokenizer_digest(directory: Path) -> str:
    """The digest of what makes tokens and ends generation: tokenizer, chat template, generation
    config."""
    patterns = (*TOKENIZER_FILES, GENERATION_FILE)
    return fingerprint(
        {
            path.name: content_sha256(path)
            for pattern in patterns
            for path in directory.glob(pattern)
        }
    )


def perplexity_of(
    model: Evaluated, texts: Path, settings: Perplexity, identity: Mapping[str, Any]
) -> Evaluation:
    found = read_texts(texts)

    def compute(advance: Advance) -> Stored:
        data = held_out(model.tokenizer, found, settings)
        require_embedded(data.rows, model.tokenizer, model.model.config.to_dict())
        value = asdict(measure_perplexity(model.model, data.rows, advance)) | {
            "seq_len": settings.seq_len
        }
        return Stored(
            value | ({"row_kind": list(data.kinds)} if data.kinds else {}), made={"batch": "1 row"}
        )

    kinds = [kind and kind.name for kind in map(kind_of, found)]
    shares = {kind.name: kind.share for kind in map(kind_of, found) if kind}
    key = {
        "kind": "perplexity",
        "texts": fingerprint({"texts": found} | ({"kinds": kinds} if len({*kinds}) > 1 else {})),
        **settings.model_dump(include={"seq_len", "max_rows", "skip"}),
        **({"shares": shares} if len({*shares.values()}) > 1 else {}),
        **({} if settings.packing == "joined" else {"packing": settings.packing}),
    }
    words = "{perplexity:.2f} over {rows} rows of {seq_len} tokens"
    return Evaluation(
        "perplexity",
        model,
        {**identity, **key},
        "rows",
        compute,
        lambda value: words.format(**value),
    )


def task_of(
    model: Evaluated, task: str, task_dir: Path, settings: ZeroShot, identity: Mapping[str, Any]
) -> Evaluation:
    limit, bos = settings.limit, settings.bos

    def compute(advance: Advance) -> Stored:
        # lm-eval takes seconds to import
        from blockpruner.evaluation.zero_shot import (
            BATCH_SIZE,
            evaluate,
        )

        result = evaluate(
            model.model, model.tokenizer, task, task_dir, limit, advance=advance, bos=bos
        )
        metric = BENCHMARKS[task].metric
        main = {
            "metric": metric,
            "value": result.scores[metric],
            "stderr": result.scores[f"{metric}_stderr"],
        }
        scores = {**main, **result.scores, "items": result.items.num_rows}
        return Stored({"scores": scores}, result.items, {"batch": f"{BATCH_SIZE} requests"})

    key = {
        "kind": "task",
        "task": task,
        "data": task_digest(task, task_dir),
        "limit": limit,
        "bos": bos,
    }
    key, words = (
        {**identity, **key, "harness": version("lm-eval")},
        "{metric} {value:.3f} of {items} items",
    )
    return Evaluation(
        task, model, key, "requests", compute, lambda value: words.format(**value["scores"])
    )


def samples_of(model: Evaluated, identity: Mapping[str, Any]) -> Evaluation:
    def compute(advance: Advance) -> Stored:
        samples = []
        for prompt in PROMPTS:
            samples.append(
                {"prompt": prompt, "text": answer(model.model, model.tokenizer, [prompt]).strip()}
            )
            advance(len(samples), len(PROMPTS))
        return Stored({"samples": samples})

    key = {**identity, "kind": "samples", "prompts": list(PROMPTS), "new_tokens": NEW_TOKENS}
    return Evaluation(
        "samples", model, key, "texts", compute, lambda value: f"{len(value['samples'])} texts"
    )


def speed_of(
    model: Evaluated, dense: Checkpoint, settings: Speed, identity: Mapping[str, Any]
) -> Evaluation:
    sides = {"dense": dense} if model is dense else {"pruned": model, "dense": dense}

    def compute(advance: Advance) -> Stored:
        found = measure_speed({name: side.model for name, side in sides.items()}, settings, advance)
        return Stored({name: asdict(speed) for name, speed in found.items()})

    key = {
        "kind": "speed",
        "dense": dense.key["model"],
        "settings": settings.model_dump(),
        "machine": machine(),
        "device": accelerator.name(resolve_device(dense.device)),
        "threads": torch.get_num_threads(),
        "versions": {package: version(package) for package in ("torch", "transformers")},
    }

    def summary(value: Mapping[str, Any]) -> str:
        rates = (f"{side} {found['decode_tokens_per_second']:.1f}" for side, found in value.items())
        return f"tokens/s: {', '.join(rates)}"

    return Evaluation("speed", model, {**identity, **key}, "generations", compute, summary)


def _average(scores: list[dict[str, Any]]) -> dict[str, float | None]:
    errors = [score["stderr"] for score in scores]
    stderr = None if None in errors else math.hypot(*errors) / len(errors)
    return {"value": math.fsum(score["value"] for score in scores) / len(scores), "stderr": stderr}
