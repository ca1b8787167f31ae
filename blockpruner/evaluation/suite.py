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
from blockpruner.evaluation.processes import run_processes
from blockpruner.evaluation.samples import NEW_TOKENS, PROMPTS, answer
from blockpruner.evaluation.settings import Evaluate, Speed
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
Facts = dict[str, Any]


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
    shares_with: "Checkpoint | None" = None
    """A checkpoint whose tensors are used wherever they are equal to this one's."""

    def on(self, device: str) -> Self:
        return replace(self, device=device)

    def export(self, directory: Path) -> Self:
        """One of our own verified exports of this dense model."""
        return replace(self, directory=directory, dense=self.directory)

    @cached_property
    def model(self) -> PreTrainedModel:
        trusted = self.trust_remote_code if self.dense is None else has_our_code(self.directory)
        loaded = self.shares_with and self.shares_with.model
        return load_model(self.directory, self.dtype, self.device, trusted, shared_with=loaded)

    @cached_property
    def tokenizer(self) -> Any:
        if self.dense is None:
            return load_tokenizer(self.directory, self.trust_remote_code)
        return load_export_tokenizer(self.directory, self.dense, self.trust_remote_code)

    @cached_property
    def key(self) -> Facts:
        """What identifies the model in the keys of its results; raises InputError for an export
        that has changed."""
        read = manifest if self.dense is None else require_verified
        files = read(self.directory)
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
    def key(self) -> Facts:
        facts = model_facts(self.plan, self.rows.digest)
        if self.healed is not None:
            facts = {**facts, "healed": self.healed.digest}
        return {**self.dense.key, "pruned": facts}


Evaluated = Checkpoint | InMemory
"""A model and its tokenizer, made when first used."""


@dataclass(frozen=True)
class Evaluation:
    """One result. It is computed and stored as a whole, and a kill loses no more than one."""

    name: str
    subject: Evaluated
    key: Facts
    """Everything that the result depends on, except the environment."""
    steps: str
    """What its progress counts, for instance "rows"."""
    compute: Callable[[Advance], Stored]
    summary: str
    """A format string for the result's value."""


@dataclass(frozen=True)
class EvaluationPlan:
    """The evaluations of a model."""

    subject: Evaluated
    sources: Path
    settings: Evaluate
    identity: Facts
    """The model and its tokenizer in the keys of results that read or write text."""

    def without_speed(self) -> list[Evaluation]:
        tasks = map(self.task, self.settings.zero_shot.tasks)
        return [self.perplexity(), *tasks, self.samples()]

    def perplexity(self) -> Evaluation:
        subject, settings = self.subject, self.settings.perplexity
        texts = read_texts(self.sources / "perplexity.parquet")

        def compute(advance: Advance) -> Stored:
            heldout = held_out(subject.tokenizer, texts, settings)
            require_embedded(heldout.rows, subject.tokenizer, subject.model.config.to_dict())
            measured = measure_perplexity(subject.model, heldout.rows, advance)
            value = {**asdict(measured), "seq_len": settings.seq_len}
            if heldout.kinds:
                value["row_kind"] = list(heldout.kinds)
            return Stored(value, made={"batch": "1 row"})

        key = {
            **self.identity,
            "kind": "perplexity",
            "texts": texts_digest(texts),
            **settings.model_dump(include={"seq_len", "max_rows", "skip"}),
        }
        # A default adds nothing to the key, or results from before the setting would be computed
        # again.
        shares = {kind.name: kind.share for kind in map(kind_of, texts) if kind}
        if len(set(shares.values())) > 1:
            key["shares"] = shares
        if settings.packing != "joined":
            key["packing"] = settings.packing
        summary = "{perplexity:.2f} over {rows} rows of {seq_len} tokens"
        return Evaluation("perplexity", subject, key, "rows", compute, summary)

    def task(self, task: str) -> Evaluation:
        subject, settings = self.subject, self.settings.zero_shot
        task_dir, limit, bos = self.sources / "tasks", settings.limit, settings.bos

        def compute(advance: Advance) -> Stored:
            # lm-eval takes seconds to import, and stored results do without.
            from blockpruner.evaluation.zero_shot import BATCH_SIZE, evaluate

            result = evaluate(
                subject.model, subject.tokenizer, task, task_dir, limit, advance=advance, bos=bos
            )
            metric = BENCHMARKS[task].metric
            scores = {
                "metric": metric,
                "value": result.scores[metric],
                "stderr": result.scores[f"{metric}_stderr"],
                **result.scores,
                "items": result.items.num_rows,
            }
            return Stored({"scores": scores}, result.items, {"batch": f"{BATCH_SIZE} requests"})

        key = {
            **self.identity,
            "kind": "task",
            "task": task,
            "data": task_digest(task, task_dir),
            "limit": limit,
            "bos": bos,
            "harness": version("lm-eval"),
        }
        summary = "{scores[metric]} {scores[value]:.3f} of {scores[items]} items"
        return Evaluation(task, subject, key, "requests", compute, summary)

    def samples(self) -> Evaluation:
        def compute(advance: Advance) -> Stored:
            samples = []
            for prompt in PROMPTS:
                text = answer(self.subject.model, self.subject.tokenizer, [prompt])
                samples.append({"prompt": prompt, "text": text.strip()})
                advance(len(samples), len(PROMPTS))
            return Stored({"samples": samples})

        sampling = {"kind": "samples", "prompts": list(PROMPTS), "new_tokens": NEW_TOKENS}
        key = {**self.identity, **sampling}
        return Evaluation("samples", self.subject, key, "texts", compute, f"{len(PROMPTS)} texts")

    def speed(self, dense: Checkpoint, settings: Speed) -> Evaluation:
        subject = self.subject
        models: dict[str, Evaluated] = {"dense": dense}
        if subject is not dense:
            # Both models are in memory at once: an export and the dense model share equal tensors.
            if isinstance(subject, Checkpoint):
                dense = replace(dense, shares_with=subject)
            models = {"pruned": subject, "dense": dense}

        def compute(advance: Advance) -> Stored:
            loaded = {name: evaluated.model for name, evaluated in models.items()}
            speeds = measure_speed(loaded, settings, advance)
            return Stored({name: asdict(speed) for name, speed in speeds.items()})

        key = {
            **subject.key,
            "kind": "speed",
            "dense": dense.key["model"],
            "settings": settings.model_dump(),
            "machine": machine(),
            "device": accelerator.name(resolve_device(dense.device)),
            "threads": torch.get_num_threads(),
            "versions": {package: version(package) for package in ("torch", "transformers")},
        }
        rates = [f"{name} {{{name}[decode_tokens_per_second]:.1f}}" for name in models]
        summary = f"tokens/s: {', '.join(rates)}"
        return Evaluation("speed", subject, key, "generations", compute, summary)


def texts_digest(texts: list[str]) -> str:
    """The digest of texts, with the kind of each if there are several."""
    content: dict[str, Any] = {"texts": texts}
    kinds = [kind.name if kind else None for kind in map(kind_of, texts)]
    if len(set(kinds)) > 1:
        content["kinds"] = kinds
    return fingerprint(content)


def tokenizer_digest(directory: Path) -> str:
    """The digest of what makes tokens and ends generation: tokenizer, chat template, generation
    config."""
    digests = {}
    for pattern in (*TOKENIZER_FILES, GENERATION_FILE):
        for path in directory.glob(pattern):
            digests[path.name] = content_sha256(path)
    return fingerprint(digests)


@dataclass(frozen=True)
class Evaluator:
    """Takes results from the store, and computes and stores those that are missing."""

    store: ResultsStore
    observer: Observer

    def settle(self, evaluation: Evaluation, progress: float) -> Stored:
        """The result of an evaluation; `progress` is the share of the evaluations that are done."""
        self.observer.begin(evaluation.name, progress)
        stored = self.store.load(evaluation.key)
        is_cached = stored is not None
        if stored is None:
            stored = self._compute(evaluation)
            self.store.save(evaluation.key, stored)
        self.observer.end(evaluation.summary.format(**stored.value), cached=is_cached)
        return stored

    def _compute(self, evaluation: Evaluation) -> Stored:
        def advance(done: int, total: int) -> None:
            self.observer.advance(done, total, evaluation.steps)

        with accelerator.named_if_too_large(
            f"evaluation {evaluation.name}",
            "use a larger device, or set runtime.device: split or cpu (for speed also"
            " evaluate.speed: null). Results found before are kept",
        ):
            result = evaluation.compute(advance)
        device_facts = placement(evaluation.subject.model)
        return replace(result, made=made(**device_facts, **result.made))

    def size(self, subject: Evaluated) -> Facts:
        """parameters and weight_bytes, from the store or counted."""
        key = {**subject.key, "kind": "size"}
        stored = self.store.load(key)
        if stored is None:
            model = subject.model
            size = {"parameters": model.num_parameters(), "weight_bytes": weight_bytes(model)}
            stored = Stored(size)
            self.store.save(key, stored)
        return stored.value


def _settle_unclaimed(
    device: str, observer: Observer, store: Path, claims: str, plan: EvaluationPlan
) -> None:
    """The work of one process: one result after another that no other process has begun."""
    evaluations = replace(plan, subject=plan.subject.on(device)).without_speed()
    evaluator = Evaluator(ResultsStore(store, observer.note), observer)
    for number, evaluation in enumerate(evaluations):
        # A file can be created once: the process that creates it has claimed the result.
        with suppress(FileExistsError):
            Path(claims, evaluation.name).touch(exist_ok=False)
            evaluator.settle(evaluation, number / len(evaluations))


def benchmark(
    subject: Evaluated,
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
) -> Facts:
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
        The content of results.json (`_results`) and of speed.json (`_timings`).
    """
    is_export = isinstance(subject, Checkpoint) and subject is not dense
    folder = subject.directory if isinstance(subject, Checkpoint) else dense.directory
    _check_settings(settings, folder)
    identity = {**subject.key, "tokenizer": tokenizer_digest(folder)}
    evaluation_plan = EvaluationPlan(subject, sources, settings, identity)
    evaluations = evaluation_plan.without_speed()
    evaluator = Evaluator(ResultsStore(store, observer.note), observer)
    # Each process loads the model: that only pays if a result is missing.
    is_missing = [evaluator.store.load(evaluation.key) is None for evaluation in evaluations]
    if processes > 1 and any(is_missing):
        with TemporaryDirectory() as claims:
            arguments = (observer, store, claims, evaluation_plan)
            run_processes(processes, dense.device, _settle_unclaimed, *arguments)
    # Speed comes last and in this process, where nothing else runs while it is timed.
    if settings.speed is not None:
        evaluations.append(evaluation_plan.speed(dense, settings.speed))
    stored_by_name = {}
    for number, evaluation in enumerate(evaluations):
        stored = evaluator.settle(evaluation, number / len(evaluations))
        stored_by_name[evaluation.name] = stored
    tasks = settings.zero_shot.tasks
    results = {**evaluator.size(subject), **_results(stored_by_name, tasks), "formats": []}
    if is_export:
        reports = folder.parent.glob(f"*/{REPORT_FILE}")
        results["formats"] = sorted(report.parent.name for report in reports)
    timings = _timings(stored_by_name, search)

    def build(directory: Path) -> None:
        write_sealed_json(directory / "results.json", results)
        write_sealed_json(directory / "speed.json", timings)
        items = [stored_by_name[task].items for task in tasks]
        write_table(directory / "items.parquet", pa.concat_tables(items))
        if plan is not None:
            save_plan(plan, directory / "plan.json")

    replace_directory(out, build)
    return results | timings


def _check_settings(settings: Evaluate, folder: Path) -> None:
    """Raise InputError for no task and for rows that exceed the context of the model."""
    if not settings.zero_shot.tasks:
        names = ", ".join(BENCHMARKS)
        raise InputError(
            f"evaluate.zero_shot.tasks is empty; name at least one of {names}",
            rule="no-tasks",
            key="evaluate.zero_shot.tasks",
        )
    config = read_json(folder / "config.json")
    check_context(settings.perplexity.seq_len, config, "evaluate.perplexity.seq_len")


def _results(stored_by_name: Mapping[str, Stored], tasks: tuple[str, ...]) -> Facts:
    """What every run of the evaluation agrees on. results.json also has the size of the model, and
    formats: the folders of verified exports next to the subject, its own among them.

    perplexity: with the NLL of each row.
    tasks: the scores of each task; value and stderr are those of its main metric.
    average: mean of the main metrics, SE = sqrt(sum SE_t^2) / tasks.
    chance: the accuracy of guessing, by task.
    samples: answers to `samples.PROMPTS`.
    """
    perplexity = stored_by_name["perplexity"].value
    scores, chance = {}, {}
    for task in tasks:
        stored = stored_by_name[task]
        scores[task] = stored.value["scores"]
        chance[task] = BENCHMARKS[task].chance(stored.items)
    return {
        "perplexity": {**perplexity, "row_nll": list(perplexity["row_nll"])},
        "tasks": scores,
        "average": _average(list(scores.values())),
        "chance": chance,
        "samples": stored_by_name["samples"].value["samples"],
    }


def _average(scores: list[Facts]) -> dict[str, float | None]:
    mean = math.fsum(score["value"] for score in scores) / len(scores)
    errors = [score["stderr"] for score in scores]
    # A single item has no standard error.
    stderr = None if None in errors else math.hypot(*errors) / len(errors)
    return {"value": mean, "stderr": stderr}


def _timings(stored_by_name: Mapping[str, Stored], search: Mapping[str, float] | None) -> Facts:
    """What no two runs of the evaluation agree on.

    speed: pruned (unless the subject is the dense model) and dense; null where it is not timed.
    made: where and when each result was computed, as from `provenance.made`.
    search: what the search of the plan took.
    """
    speed = stored_by_name.get("speed")
    origins = {name: stored.made for name, stored in stored_by_name.items()}
    return {"speed": speed and speed.value, "made": origins, "search": dict(search or {})}


def headline(results: Facts, plan: Plan | None) -> dict[str, float | int]:
    """The main figures of a model for data/metrics; `plan` is None for the dense model. kv_cache is
    a share."""
    figures = {task: scores["value"] for task, scores in results["tasks"].items()}
    figures["average"] = results["average"]["value"]
    figures["perplexity"] = results["perplexity"]["perplexity"]
    figures["ratio"] = plan.ratio if plan else 0.0
    figures["parameters"] = results["parameters"]
    figures["mha_removed"] = plan.blocks[BlockKind.MHA] if plan else 0
    figures["mlp_removed"] = plan.blocks[BlockKind.MLP] if plan else 0
    figures["kv_cache"] = 1 - plan.removes["kv"] if plan else 1.0
    return {key: round(value, 4) for key, value in figures.items()}
