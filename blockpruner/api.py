"""The three-line API: prune a model that is in memory, without stages or a server."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
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
from blockpruner.checks import check_run
from blockpruner.core.errors import InputError
from blockpruner.core.plan import Plan
from blockpruner.core.progress import Observer, stderr_observer
from blockpruner.core.settings import MixedTexts, Runtime, Texts, read_settings
from blockpruner.evaluation.perplexity import HeldOutPerplexity, held_out, measure_perplexity
from blockpruner.evaluation.settings import Perplexity
from blockpruner.healing.choice import keep
from blockpruner.inputs.calibration import CalibrationSet, require_embedded
from blockpruner.inputs.checkpoints import (
    GENERATION_FILE,
    LICENCE_FILES,
    copy_files,
    identity_of,
    licence_beside,
)
from blockpruner.inputs.sources import cache_folder, named_sources, shipped_texts, with_sources
from blockpruner.inputs.texts import MixedText, TextKind, judging_texts, kind_of, listed, load_texts
from blockpruner.inputs.tokenizers import conversation
from blockpruner.methods.apply import Loaded, Made
from blockpruner.methods.healed import FILE, Healed, find_healed, parameter_digests, set_weights_
from blockpruner.methods.kind import Material
from blockpruner.methods.recipes import (
    RECIPES,
    RECOMMENDED,
    compensation,
    is_judged,
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
from blockpruner.settings import Run
from blockpruner.store.files import write_json, write_text
from blockpruner.store.manifest import CARD_FILE, SOURCE_FILE
from blockpruner.store.plans import unmeasured
from blockpruner.store.provenance import fingerprint
from blockpruner.store.tensors import read_tensors, tensor_bytes

IN_MEMORY = "in memory"
OWN = TextKind("your texts", 1.0)
"""Texts in memory that are of no kind."""
NO_CONTENT = ("_name_or_path", "transformers_version")
"""Fields of a config that say where a model came from."""


@dataclass(frozen=True)
class _Base:
    """What is known of a dense model beside its weights."""

    config: str
    """Its config.json."""
    place: str
    """The folder or the repository that it was loaded from; empty if it was not."""
    folder: Path | None
    """The folder that has its weights, as `_folder_of`."""

    @cached_property
    def identity(self) -> str | None:
        """As of a fetched model; None if no folder has its weights."""
        return identity_of(self.folder) if self.folder else None

    @cached_property
    def licence(self) -> dict[str, Any]:
        """What its card says; nothing where a hub does not answer."""
        if self._is_folder or not self.place:
            return licence_beside(Path(self.place)) if self.place else {}
        from huggingface_hub import hf_hub_download

        try:
            return licence_beside(Path(hf_hub_download(self.place, CARD_FILE)).parent)
        except Exception:  # also errors of its HTTP library, which differs between versions
            return {}

    def write(self, directory: Path, tokenizer: Any) -> None:
        """Write what an export reads of a fetched model, without weights."""
        write_text(directory / "config.json", self.config)
        tokenizer.save_pretrained(directory)
        source = {"source": "path", "path": self.place or IN_MEMORY}
        if self.place and not self._is_folder:
            source = {"source": "hub", "repo": self.place}
        write_json(directory / SOURCE_FILE, {"source": source, "licence": self.licence})
        if self._is_folder:
            copy_files(Path(self.place), directory, LICENCE_FILES)

    @property
    def _is_folder(self) -> bool:
        return bool(self.place) and Path(self.place).is_dir()


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
        return KINDS[self.plan.kind].taken_out(self.plan)

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
        places = {
            form: Path(f"{folder}{'' if form == 'hf' else f'-{form}'}").absolute()
            for form in formats
        }
        dtype = str(self.model.dtype).removeprefix("torch.")
        require_exports(formats, KINDS[self.plan.kind], dtype)
        with tempfile.TemporaryDirectory() as own:
            dense, name = Path(own), Path(folder).absolute().name
            plan, healed = replace(self.plan, target=name, base=self.base.identity), self.healed
            if parameter_digests(self.model) != self.digests:
                plan, healed = unmeasured(plan), _changed(healed)
            self.base.write(dense, self.tokenizer)
            if (generation := self.model.generation_config) is not None:
                write_text(dense / GENERATION_FILE, generation.to_json_string())
            made = Made(
                dense, plan, CalibrationSet(()), dtype, "cpu", healed=healed, model=self.model
            )
            pipeline.export(made, places)
        return places

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
            (place,) = self.save_pretrained(Path(folder) / name, [format]).values()
            return push(place, repo, private, self.base.licence, name)


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
    """Remove the channels of MLPs, layers or blocks of which no kind of text loses much, in place,
    and fit the weights that stay.

    Args:
        model: a transformers causal LM of a supported family. It is changed.
        texts: your texts, half of those that decide; the other half are ours, of packages that are
            downloaded once. A list, or a `datasets.Dataset` with a column `text`, or `messages` of
            chats.
        budget: the share of all parameters to remove, in (0, 1); or a budget as in params.yaml
            ("17blocks", "0.30kv"). The nearest reachable one is taken.
        only_texts: whether your texts alone decide. A method of the paper always takes them alone.
        max_loss: the most that a kind of text may lose; 1.5 is 1.5 times the dense model's
            perplexity.
        seq_len: tokens in a calibration row, by default 256; shortened to the model's context. A
            method of the paper has 2,048.
        num_rows: the most calibration rows, by default 64, and 16 for a method of the paper.
        method: the name of a recipe or of a search (docs/methods.md); a row of your own
            (docs/extend.md); or a function of (problem, options) that yields iterations, whose last
            choice is taken. Methods that change weights need a run file.
        metric: a name, a row of your own, or a function of (logits, targets, the dense model's
            logits).
        unit, candidates, options: as in a run file's `score` section; None leaves the unit to the
            method.
        acceleration, compensate: in place of the method's own (docs/methods.md).
        train: "lora" or "all" trains the result towards the dense model's predictions, on the
            texts.
        cache: a folder that keeps every score, so that a call that was killed continues where it
            was.
        device: auto (a model on the CPU moves to the GPU if there is one), cpu, cuda or cuda:N.
        observer: shows progress; by default on standard error. `core.progress.SilentObserver()`
            shows nothing.

    Raises:
        InputError: unsupported family; a model that is quantized, offloaded, on MPS or has
            adapters; no calibration row, a budget that cannot be met, settings that do not fit;
            texts of ours that cannot be downloaded; a kind of text that loses more than `max_loss`,
            and the model is as it was.
    """
    require_plain(model)
    own_texts = listed(texts, partial(conversation, lambda: tokenizer))
    search, measure = _search(method), _metric(metric)
    if callable(metric) and cache is not None:
        message = (
            "cache keeps scores by a metric's name, and a function may change; give a row, or no"
            " cache"
        )
        raise InputError(message, rule="cache-of-function", key="cache")
    if search is not None and search.name in RECIPES:
        message = (
            f"a search of your own is called {search.name!r}, as a recipe is; give it another name"
        )
        raise InputError(message, rule="name-of-recipe", key="method", value=search.name)
    with ExitStack() as stack:
        if search is not None:
            stack.enter_context(SEARCHES.added(search))
        if not isinstance(metric, str):
            stack.enter_context(METRICS.added(measure))
        name = search.name if search else str(method)
        changed = {"candidates": candidates, "options": options or {}, "metric": measure.name}
        optional = {"unit": unit, "acceleration": acceleration}
        changed |= {name: value for name, value in optional.items() if value is not None}
        sizes = {"seq_len": seq_len, "num_rows": num_rows}
        drawn = {name: value for name, value in sizes.items() if value is not None}
        source = {"source": "path", "path": IN_MEMORY}
        own: dict[str, Any] = {
            "calibration": drawn,
            "score": changed,
            "compensate": compensate,
            "train": train,
        }
        read_settings(Runtime, {"batch_tokens": batch_tokens})
        values = {"model": source} | sections(name, data=source, only_texts=only_texts, **own)
        run = read_settings(Run, with_sources(values, named_sources()))
        check_run(run)
        length = min(
            run.calibration.seq_len, model.config.max_position_embeddings or run.calibration.seq_len
        )
        run = run.model_copy(
            update={"calibration": run.calibration.model_copy(update={"seq_len": length})}
        )
        recipe = run.train and run.train.fitted(model.config.max_position_embeddings)
        if not all(kind_of_method(one.method).is_part for one in searches(run.score).values()):
            name, advice = run.score.method, "use a run file and the stages"
            message = f"method {name!r} makes other weights, which prune does not; {advice}"
            raise InputError(message, rule="method-of-weights", key="method", value=name)
        if device != "auto" or model.device.type == "cpu":
            model.to(resolve_device(device))
        stack.enter_context(evaluating(model))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        wanted = f"{budget:.12f}".rstrip("0") if isinstance(budget, int | float) else str(budget)
        shown, scores = observer or stderr_observer(), None if cache is None else Path(cache)
        config, origin = model.config.to_dict(), model.name_or_path
        base = _Base(model.config.to_json_string(use_diff=False), origin, _folder_of(model))
        chosen = compensation(run.compensate.method, run.score.method)
        judged = is_judged(run.score.method, chosen) or max_loss is not None
        pool = _pool(run.calibration.data, own_texts, judged, tokenizer, shown)
        rows = pipeline.calibrate(
            run.calibration,
            run.compensate,
            recipe,
            pool,
            tokenizer,
            config,
            shown.note,
            judged=judged,
            at_most=True,
        )
        pipeline.require_fit(rows, run.compensate, chosen)
        identity = IN_MEMORY if cache is None else _identity(model)
        dtype = str(model.dtype).removeprefix("torch.")
        material = Material(
            identity, dtype, config, scores, Engine(model, batch_tokens), lambda: model, shown
        )
        pipeline.score(material, rows, run.score, [wanted], folder)
        found = pipeline.commit(
            folder, run.score, config, wanted, rows, target="", run="", compensate=chosen
        )
        healed = pipeline.heal(lambda: model, found, rows, shown)
        current = Current.load(folder / healed.name)
        trace = read_trace(trace_directory(folder / healed.name, current, wanted), current.search)
        firm = stabilities(trace, str(current.score.options.get("per", "none")))
        plan, weights, data = (
            replace(healed.plan, train=recipe is not None),
            healed.weights,
            run.calibration.data,
        )
        told, learns = (
            healed.healed(data),
            [weight for weight in model.parameters() if weight.requires_grad],
        )
        if recipe is not None:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            write_text(place / "config.json", base.config)
            stack.callback(lambda: [weight.requires_grad_() for weight in learns])
            made = Loaded(place, plan, rows.search, dtype, device, model=model, base=identity)
            keep(place / "compensated", healed, made, data)
            made = replace(made, healed=find_healed([place / "compensated"], made.identity))
            pipeline.train(
                made, recipe, rows, (scores or place) / "training", place / "trained", shown
            )
            told = find_healed([place / "trained"], made.identity)
            weights = read_tensors(place / "trained" / FILE)[0]
            plan = told.plan(plan) if told else plan
        pipeline.require_kept(plan, max_loss)
        pruned = KINDS[plan.kind].apply_(model, plan, ())
        set_weights_(pruned, weights)
        return Pruned(
            pruned,
            tokenizer,
            plan,
            tuple(trace),
            firm,
            healed.facts,
            told,
            base,
            parameter_digests(pruned),
        )


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
    wanted = read_settings(
        Perplexity, {"seq_len": seq_len, "max_rows": max_rows, "packing": packing}
    )
    rows = held_out(tokenizer, texts, wanted).rows
    require_embedded(rows, tokenizer, model.config.to_dict())
    with evaluating(model):
        return measure_perplexity(model, rows)


def _pool(
    data: Texts, own: Sequence[str], judged: bool, tokenizer: Any, observer: Observer
) -> pipeline.Pool:
    """The texts of a run, of which those in memory are `own`; ours are beside them if `data` is a
    mix. If it is `judged`, also the texts that judge."""
    named = [text if kind_of(text) else MixedText(text, OWN) for text in own]
    if not judged and not isinstance(data, MixedTexts):
        return pipeline.Pool(named, train=named)
    kept = cache_folder()
    template = partial(conversation, lambda: tokenizer)
    try:
        ours = load_texts(shipped_texts(), kept / "cache", kept / "pins.json", template)
    except InputError as error:
        if isinstance(data, MixedTexts):
            raise InputError(
                f"{error}; or do without (only_texts=True)", rule=error.rule
            ) from error
        observer.note(f"warning: what other kinds of text lose is not judged: {error}")
        ours = []
    texts = [*named, *ours] if isinstance(data, MixedTexts) else named
    return pipeline.Pool(texts, train=texts, judge=judging_texts(ours) if judged else ())


def _name(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


def _changed(healed: Healed | None) -> Healed:
    """What a card says of weights that their owner has changed since, as by training."""
    changed = healed or Healed(Path(), "", "", (), "")
    before = f"{healed.words}, " if healed else ""
    return replace(
        changed, words=f"{before}then changed, after which nothing was measured", perplexity={}
    )


def _identity(model: PreTrainedModel) -> str:
    """The identity of a model in memory: its config, its weights, and all other tensors and numbers
    in its modules."""
    config = {
        name: value for name, value in model.config.to_dict().items() if name not in NO_CONTENT
    }
    tensors = {**model.state_dict(), **dict(model.named_buffers())}
    weights = {
        name: sha256(tensor_bytes(tensor.detach().cpu())).hexdigest()
        for name, tensor in tensors.items()
    }
    numbers = {
        name: {key: value for key, value in vars(module).items() if isinstance(value, int | float)}
        for name, module in model.named_modules()
    }
    return fingerprint({"config": config, "weights": weights, "numbers": numbers})


def _folder_of(model: PreTrainedModel) -> Path | None:
    """The folder that a model was loaded from, for the hub that in its cache, if the files still
    have its weights."""
    from huggingface_hub import try_to_load_from_cache

    place, state, found = model.name_or_path, model.state_dict(), False
    config: Any = f"{place}/config.json"
    if not Path(place).is_dir():
        with suppress(ValueError):  # the name is no repository's
            revision = getattr(model.config, "_commit_hash", None)
            config = try_to_load_from_cache(place, "config.json", revision=revision)
    if not place or not isinstance(config, str):
        return None
    for path in Path(config).parent.glob("model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in state.keys() & set(file.keys()):
                found = torch.equal(file.get_tensor(name).to(state[name]), state[name])
                if not found:
                    return None
    return Path(config).parent if found else None


def _search(method: str | Search | Callable[..., Any]) -> Search | None:
    """The row of a search that no registry has; None for a name."""
    if isinstance(method, str | Search):
        return None if isinstance(method, str) else method
    return Search(name := _name(method), name, method, nested=False)


def _metric(metric: str | Metric | Callable[..., Any]) -> Metric:
    if isinstance(metric, str):
        return METRICS[metric]
    if isinstance(metric, Metric):
        return metric
    formula = (metric.__doc__ or "").partition("\n")[0]
    name = _name(metric)
    return Metric(name, metric, title=name, formula=formula, reference=True)
