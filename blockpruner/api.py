"""The three-line API: prune a model that is in memory, without stages or a server."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache as cached
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from blockpruner import pipeline
from blockpruner.checkpoints.hub import push
from blockpruner.checkpoints.registry import require_exports
from blockpruner.config.checks import check_run
from blockpruner.config.sections import Run
from blockpruner.core.errors import InputError
from blockpruner.core.families import Config
from blockpruner.core.plan import Plan
from blockpruner.core.progress import Observer, stderr_observer
from blockpruner.core.settings import MixedTexts, Runtime, Texts, read_settings
from blockpruner.evaluation.perplexity import HeldOutPerplexity, held_out, measure_perplexity
from blockpruner.evaluation.settings import Perplexity
from blockpruner.inputs.calibration import CalibrationSet, require_embedded
from blockpruner.inputs.checkpoints import (
    GENERATION_FILE,
    LICENCE_FILES,
    copy_files,
    identity_of,
    licence_beside,
)
from blockpruner.inputs.sources import cache_folder, named_sources, shipped_texts, with_sources
from blockpruner.inputs.texts import MixedText, TextKind, kind_of, listed, load_texts
from blockpruner.inputs.tokenizers import conversation
from blockpruner.methods.apply import Loaded, Made
from blockpruner.methods.healed import Healed, parameter_digests, set_weights_
from blockpruner.methods.kind import Material
from blockpruner.methods.recipes import (
    RECIPES,
    RECOMMENDED,
    searches,
    sections,
)
from blockpruner.methods.registry import KINDS, kind_of_method
from blockpruner.model.models import evaluating, require_float64, require_plain, resolve_device
from blockpruner.scoring.engine import Engine
from blockpruner.scoring.metrics import METRICS, Metric
from blockpruner.scoring.stability import Stability
from blockpruner.search.iteration import Iteration, stabilities
from blockpruner.search.registry import SEARCHES, Search
from blockpruner.search.trace import Current, read_trace, trace_directory
from blockpruner.splits import Pool, our_judging_texts
from blockpruner.store.files import write_json, write_text
from blockpruner.store.manifest import CARD_FILE, SOURCE_FILE
from blockpruner.store.plans import unmeasured
from blockpruner.store.provenance import fingerprint
from blockpruner.store.tensors import read_tensors, tensor_bytes
from blockpruner.workspace import Workspace

IN_MEMORY = "in memory"
OWN = TextKind("your texts", 1.0)
"""Texts in memory that are of no kind."""
NO_CONTENT = ("_name_or_path", "transformers_version")
"""Fields of a config that tell where a model came from, and nothing of its content."""


@dataclass(frozen=True)
class _Base:
    """The facts on a dense model that exports take over, next to its weights."""

    config: str
    """Its config.json."""
    origin: str
    """The folder or the repository that it was loaded from; empty if it was not."""
    folder: Path | None
    """The folder that has its weights, as `_folder_of`."""

    @cached_property
    def identity(self) -> str | None:
        """As of a fetched model; None if no folder has its weights."""
        return identity_of(self.folder) if self.folder else None

    @cached_property
    def licence(self) -> dict[str, Any]:
        """The licence of its card; empty if a hub does not answer."""
        if not self.origin:
            return {}
        if self._is_folder:
            return licence_beside(Path(self.origin))
        from huggingface_hub import hf_hub_download

        try:
            return licence_beside(Path(hf_hub_download(self.origin, CARD_FILE)).parent)
        except Exception:  # also errors of its HTTP library, which differs between versions
            return {}

    def write(self, directory: Path, tokenizer: Any) -> None:
        """Write what an export reads of a fetched model, without weights."""
        write_text(directory / "config.json", self.config)
        tokenizer.save_pretrained(directory)
        source = {"source": "path", "path": self.origin or IN_MEMORY}
        if self.origin and not self._is_folder:
            source = {"source": "hub", "repo": self.origin}
        write_json(directory / SOURCE_FILE, {"source": source, "licence": self.licence})
        if self._is_folder:
            copy_files(Path(self.origin), directory, LICENCE_FILES)

    @property
    def _is_folder(self) -> bool:
        return bool(self.origin) and Path(self.origin).is_dir()


@dataclass(frozen=True)
class Pruned:
    """What `prune` returns."""

    model: PreTrainedModel
    """The argument, pruned in place."""
    tokenizer: Any
    plan: Plan
    """What was removed, and the size of what is left. `order` is empty where channels are removed
    and no blocks."""
    steps: tuple[Iteration, ...]
    """The scores of every step of the search."""
    stability: tuple[Stability | None, ...]
    """For every step, which other candidates the texts cannot tell from the chosen one (`rivals`),
    and how often resampled rows choose the same (`kept`). None where a step rests on no losses or
    on a price, or on a single row."""
    compensation: Mapping[str, Any]
    """What compensation did, the perplexities on held-out rows before and after, and what judged
    models lost; empty without either."""
    healed: Healed | None
    """What was done to the weights that stay, in words, and perplexities of rows held out from it;
    None for nothing."""
    base: _Base
    """What exports take over from the dense model beside its weights."""
    digests: Mapping[str, str] = field(repr=False)
    """SHA-256 of each weight as `prune` left it. What is saved of other weights has no number in
    its card."""

    @property
    def taken_out(self) -> str:
        """What was removed, in words: "9 MHA + 2 MLP", "channels of 26 MLPs"."""
        return KINDS[self.plan.kind].removed_words(self.plan)

    def evaluate(self, texts: Sequence[str], **settings: Any) -> HeldOutPerplexity:
        """The perplexity on texts that `prune` has not seen; the settings are those of
        `blockpruner.evaluate`."""
        return evaluate(self.model, self.tokenizer, texts, **settings)

    def save_pretrained(
        self, folder: str | Path, formats: Sequence[str] = ("hf",)
    ) -> dict[str, Path]:
        """Write verified checkpoints, `hf` at the folder and another format at FOLDER-FORMAT;
        returns the places.

        A fresh process compares each with this model. A copy of the model is in memory meanwhile.
        transformers loads `hf` without blockpruner (`trust_remote_code=True`); `blockpruner report`
        and `push` take the folder.

        Args:
            formats: as in `export` of a run file.

        Raises:
            InputError: an unknown format, one that cannot hold the model, or a place that is not
                empty; before anything is written, except where only the writing shows it.
        """
        folders = {}
        for form in formats:
            suffix = "" if form == "hf" else f"-{form}"
            folders[form] = Path(f"{folder}{suffix}").absolute()
        dtype = str(self.model.dtype).removeprefix("torch.")
        require_exports(formats, KINDS[self.plan.kind], dtype)
        plan = replace(self.plan, target=Path(folder).absolute().name, base=self.base.identity)
        healed = self.healed
        # Its owner may have trained the model since: then no measurement is of these weights.
        if parameter_digests(self.model) != self.digests:
            plan, healed = unmeasured(plan), _changed(healed)
        with tempfile.TemporaryDirectory() as directory:
            dense = Path(directory)
            self.base.write(dense, self.tokenizer)
            generation = self.model.generation_config
            if generation is not None:
                write_text(dense / GENERATION_FILE, generation.to_json_string())
            no_rows = CalibrationSet(())
            finished = Made(dense, plan, no_rows, dtype, "cpu", healed=healed, model=self.model)
            pipeline.export(finished, folders)
        return folders

    save = save_pretrained

    def push_to_hub(self, repo: str, private: bool = True, format: str = "hf") -> str:
        """Export, and upload what was verified to a repository, which is made if it is not there;
        returns the address.

        Raises:
            InputError: as `save_pretrained`; or the format's engine is not installed, the
                repository is there and not as private as was asked, or the hub refuses.
        """
        with tempfile.TemporaryDirectory() as folder:
            name = repo.rpartition("/")[2]
            (written,) = self.save_pretrained(Path(folder) / name, [format]).values()
            return push(written, repo, private, self.base.licence, name)


def prune(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: Sequence[str],
    budget: float | str,
    *,
    only_texts: bool = False,
    max_loss: float | None = None,
    seq_len: int | None = None,
    num_rows: int | None = None,
    method: str | Search | Callable[..., Any] = RECOMMENDED,
    unit: str | None = None,
    candidates: str = "all",
    metric: str | Metric | Callable[..., Any] = "perplexity",
    options: Mapping[str, Any] | None = None,
    acceleration: str | None = None,
    compensate: str | None = None,
    train: str | None = None,
    batch_tokens: int | str = "auto",
    cache: str | Path | None = None,
    device: str = "auto",
    observer: Observer | None = None,
) -> Pruned:
    """Remove MLP channels, layers or blocks that every text can spare, in place; refit the rest.

    Args:
        model: a transformers causal LM of a supported family. It is changed.
        texts: your texts, half of those that decide; the other half are ours, of packages that are
            downloaded once. A list, or a `datasets.Dataset` with a column `text`, or `messages` of
            chats.
        budget: the share of all parameters to remove, in (0, 1), or "17blocks" or "0.30kv" as in
            params.yaml. The nearest reachable one is taken.
        only_texts: whether your texts alone decide. A method of the paper always takes them alone.
        max_loss: the highest perplexity of a kind of text, in times the dense model's.
        seq_len: tokens in a row, at most the model's context; 256, or 2,048 as in the paper.
        num_rows: the most calibration rows, by default 64, and 16 for a method of the paper.
        method: the name of a recipe or of a search (docs/methods.md); a row of your own
            (docs/extend.md); or a function of (problem, options) that yields iterations, whose last
            choice is taken. Methods that change weights need a run file.
        metric: a name, a row of your own, or a function of (logits, targets, dense logits).
        unit, candidates, options, acceleration, compensate: as in a run file; None is the method's.
        train: "lora" or "all" trains the result towards the dense model's predictions.
        cache: a folder that keeps every score: a call that was killed continues.
        device: auto (a model on the CPU moves to the GPU if there is one), cpu, cuda or cuda:N.
        observer: shows progress, on standard error by default; `SilentObserver()` shows none.

    Raises:
        InputError: unsupported family; a model that is quantized, offloaded, on MPS or has
            adapters; no calibration row; a budget that cannot be met; settings that do not fit; no
            network for our texts; a kind of text above `max_loss` (the model is as it was).
    """
    require_plain(model)
    user_texts = listed(texts, partial(conversation, lambda: tokenizer))
    search_row, metric_row = _search(method), _metric(metric)
    if cache is not None:
        _require_named(metric)
    progress = observer or stderr_observer()
    with ExitStack() as stack:
        _register(stack, search_row, None if isinstance(metric, str) else metric_row)
        run = _read_run(
            model.config.max_position_embeddings,
            search_row.name if search_row else str(method),
            only_texts=only_texts,
            calibration={"seq_len": seq_len, "num_rows": num_rows},
            score={"unit": unit, "acceleration": acceleration},
            scored={"candidates": candidates, "options": options, "metric": metric_row.name},
            compensate=compensate,
            train=train,
        )
        # A model that is already on an accelerator stays there, unless the caller names a device.
        if device != "auto" or model.device.type == "cpu":
            model.to(resolve_device(device))
        runtime_values = {"batch_tokens": batch_tokens, "device": _device(model)}
        runtime = read_settings(Runtime, runtime_values)
        stack.enter_context(evaluating(model))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        scores = None if cache is None else Path(cache)
        workspace = Workspace(folder, scores, runtime, progress, progress.note)
        return _prune(run, model, tokenizer, user_texts, _budget(budget), max_loss, workspace)


def _require_named(metric: str | Metric | Callable[..., Any]) -> None:
    """Refuse to keep scores of a function; raises InputError."""
    if callable(metric):
        raise InputError(
            "cache keeps scores by a metric's name, and a function may change; give a row, or no"
            " cache",
            rule="cache-of-function",
            key="cache",
        )


def _register(stack: ExitStack, search: Search | None, metric: Metric | None) -> None:
    """Register the rows that a caller wrote until the stack is closed: the settings of the call
    name them as any other row."""
    if search is not None:
        stack.enter_context(SEARCHES.added(search))
    if metric is not None:
        stack.enter_context(METRICS.added(metric))


@dataclass(frozen=True)
class _ModelInMemory:
    """A dense model in memory, as `pipeline.run` takes it."""

    model: PreTrainedModel
    tokenizer: Any
    identity: str
    """A fingerprint of its content, or `IN_MEMORY` where no score is kept."""
    config_folder: Path
    """A folder with its config.json."""
    title = ""
    folder = None

    @property
    def config(self) -> Config:
        config: Config = self.model.config.to_dict()
        return config

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    @contextmanager
    def open(self, workspace: Workspace) -> Iterator[Material]:
        engine = Engine(self.model, workspace.runtime.batch_tokens)
        yield Material(
            self.identity,
            self.dtype,
            self.config,
            workspace.trials,
            engine,
            lambda: self.model,
            workspace.observer,
        )

    def pruning(self, plan: Plan, rows: CalibrationSet) -> Loaded:
        return Loaded(
            self.config_folder,
            plan,
            rows,
            self.dtype,
            _device(self.model),
            model=self.model,
            base=self.identity,
        )


def _prune(
    run: Run,
    model: PreTrainedModel,
    tokenizer: Any,
    user_texts: Sequence[str],
    budget: str,
    max_loss: float | None,
    workspace: Workspace,
) -> Pruned:
    """Run the pipeline on a model in memory, and prune it in place."""
    base = _Base(model.config.to_json_string(use_diff=False), model.name_or_path, _folder_of(model))
    write_text(workspace.root / "config.json", base.config)
    identity = IN_MEMORY if workspace.trials is None else _identity(model)
    dense = _ModelInMemory(model, tokenizer, identity, workspace.root)
    judged = pipeline.has_judges(run, max_loss)
    pool = _pool(run.calibration.data, user_texts, judged, tokenizer, workspace.observer)
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    try:
        outcome = pipeline.run(run, budget, dense, pool, workspace, max_loss=max_loss)
    finally:
        # Training freezes the dense model; its owner gets it back as it was.
        for weight in trainable:
            weight.requires_grad_()
    plan, healed = outcome.pruning.plan, outcome.pruning.healed
    compensation = dict(outcome.compensation)
    search_folder = outcome.search_folder / compensation.pop("search")
    current = Current.load(search_folder)
    trace = read_trace(trace_directory(search_folder, current, budget), current.search)
    # Until here the model is as it was.
    pruned = KINDS[plan.kind].apply_(model, plan, ())
    if healed is not None:
        set_weights_(pruned, read_tensors(healed.path)[0])
    return Pruned(
        model=pruned,
        tokenizer=tokenizer,
        plan=plan,
        steps=tuple(trace),
        stability=stabilities(trace, str(current.score.options.get("per", "none"))),
        compensation=compensation,
        healed=healed,
        base=base,
        digests=parameter_digests(pruned),
    )


def _read_run(
    context: int | None,
    method: str,
    *,
    only_texts: bool,
    calibration: Mapping[str, Any],
    score: Mapping[str, Any],
    scored: Mapping[str, Any],
    compensate: str | None,
    train: str | None,
) -> Run:
    """The settings of a call, as a run file would have them, with rows that fit into the model's
    context; raises InputError. None leaves a value of `calibration` and `score` to the method."""
    source = {"source": "path", "path": IN_MEMORY}
    calibration_values = {name: value for name, value in calibration.items() if value is not None}
    optional = {name: value for name, value in score.items() if value is not None}
    values = sections(
        method,
        data=source,
        only_texts=only_texts,
        calibration=calibration_values,
        score={**scored, "options": scored["options"] or {}, **optional},
        compensate=compensate,
        train=train,
    )
    run = read_settings(Run, with_sources({"model": source} | values, named_sources()))
    check_run(run)
    for search in searches(run.score).values():
        if not kind_of_method(search.method).keeps_weights:
            raise InputError(
                f"method {run.score.method!r} makes other weights, which prune does not; use a run"
                " file and the stages",
                rule="method-of-weights",
                key="method",
                value=run.score.method,
            )
    length = min(run.calibration.seq_len, context or run.calibration.seq_len)
    changes = {
        "calibration": run.calibration.model_copy(update={"seq_len": length}),
        "train": run.train and run.train.fitted(context),
    }
    return run.model_copy(update=changes)


def evaluate(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: Sequence[str],
    seq_len: int = 2048,
    max_rows: int | None = None,
    packing: str = "documents",
) -> HeldOutPerplexity:
    """The perplexity of a model, dense or pruned, on texts.

    `reporting.statistics.perplexity_ratio(a.row_nll, b.row_nll)` compares two models on the same
    texts.

    Args:
        seq_len: tokens in a row; shortened to the model's context.
        max_rows: at most so many rows.
        packing: as in a run file's `evaluate.perplexity`; "joined" is the paper's.

    Raises:
        InputError: the texts are shorter than one row.
    """
    require_float64(model)
    texts = listed(texts, partial(conversation, lambda: tokenizer))
    seq_len = min(seq_len, model.config.max_position_embeddings or seq_len)
    settings = read_settings(
        Perplexity, {"seq_len": seq_len, "max_rows": max_rows, "packing": packing}
    )
    rows = held_out(tokenizer, texts, settings).rows
    require_embedded(rows, tokenizer, model.config.to_dict())
    with evaluating(model):
        return measure_perplexity(model, rows)


def _pool(
    data: Texts, user_texts: Sequence[str], judged: bool, tokenizer: Any, observer: Observer
) -> Pool:
    """The texts of a run, also those that judge if it is `judged`. Ours are added to the user's if
    `data` is a mix."""
    folder = cache_folder()

    @cached
    def load(source: Texts) -> list[str]:
        template = partial(conversation, lambda: tokenizer)
        return load_texts(source, folder / "cache", folder / "pins.json", template)

    texts = [text if kind_of(text) else MixedText(text, OWN) for text in user_texts]
    if isinstance(data, MixedTexts):
        try:
            texts += load(shipped_texts())
        except InputError as error:
            raise InputError(
                f"{error}; or do without (only_texts=True)", rule=error.rule
            ) from error
    judge = our_judging_texts(load, observer.note) if judged else ()
    return Pool(texts, train=texts, judge=judge)


def _budget(budget: float | str) -> str:
    """A budget as in params.yaml, of a number without an exponent."""
    if isinstance(budget, int | float):
        return f"{budget:.12f}".rstrip("0")
    return str(budget)  # what is no budget at all is refused by this text


def _device(model: PreTrainedModel) -> str:
    """The device of a model in memory, as `runtime.device` names it."""
    devices = {parameter.device for parameter in model.parameters()}
    return "split" if len(devices) > 1 else str(model.device)


def _name(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


def _changed(healed: Healed | None) -> Healed:
    """The facts on weights that their owner has changed since `prune`, as by training."""
    history = f"{healed.words}, " if healed else ""
    return replace(
        healed or Healed(Path(), "", "", (), ""),
        words=f"{history}then changed, after which nothing was measured",
        perplexity={},
    )


def _identity(model: PreTrainedModel) -> str:
    """The identity of a model in memory: its config, its weights, and all other tensors and numbers
    in its modules."""
    config = model.config.to_dict()
    content = {name: value for name, value in config.items() if name not in NO_CONTENT}
    weights = {}
    for name, tensor in {**model.state_dict(), **dict(model.named_buffers())}.items():
        weights[name] = sha256(tensor_bytes(tensor.detach().cpu())).hexdigest()
    numbers = {}
    for name, module in model.named_modules():
        fields = vars(module).items()
        numbers[name] = {key: value for key, value in fields if isinstance(value, int | float)}
    return fingerprint({"config": content, "weights": weights, "numbers": numbers})


def _folder_of(model: PreTrainedModel) -> Path | None:
    """The folder that a model was loaded from, if its files still have the model's weights. A model
    of the hub has it in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    origin = model.name_or_path
    if not origin:
        return None
    config: Any = f"{origin}/config.json"
    if not Path(origin).is_dir():
        revision = getattr(model.config, "_commit_hash", None)
        with suppress(ValueError):  # the name is no repository's
            config = try_to_load_from_cache(origin, "config.json", revision=revision)
    if not isinstance(config, str):
        return None
    state = model.state_dict()
    compared = set[str]()
    for path in Path(config).parent.glob("model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in state.keys() & set(file.keys()):
                if not torch.equal(file.get_tensor(name).to(state[name]), state[name]):
                    return None
                compared.add(name)
    return Path(config).parent if compared else None


def _search(method: str | Search | Callable[..., Any]) -> Search | None:
    """The row of a search that no registry has; None for a name. Raises InputError for a row that
    is called as a recipe is."""
    if isinstance(method, str):
        return None
    if isinstance(method, Search):
        row = method
    else:
        name = _name(method)
        row = Search(name, name, method, nested=False)
    if row.name in RECIPES:
        raise InputError(
            f"a search of your own is called {row.name!r}, as a recipe is; give it another name",
            rule="name-of-recipe",
            key="method",
            value=row.name,
        )
    return row


def _metric(metric: str | Metric | Callable[..., Any]) -> Metric:
    if isinstance(metric, str):
        return METRICS[metric]
    if isinstance(metric, Metric):
        return metric
    formula = (metric.__doc__ or "").partition("\n")[0]
    name = _name(metric)
    return Metric(name, metric, title=name, formula=formula, reference=True)
