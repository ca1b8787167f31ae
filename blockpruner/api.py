"""The three-line API: prune a model that is in memory, without stages or a server."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from blockpruner.checkpoints.hf import code_file, save_pruned
from blockpruner.checkpoints.hub import push
from blockpruner.checkpoints.registry import EXPORTS, require_exports
from blockpruner.compensation.compensate import Compensated, compensate
from blockpruner.compensation.rows import compensation_rows
from blockpruner.core.budgets import resources_of
from blockpruner.core.errors import InputError
from blockpruner.core.plan import Plan
from blockpruner.core.progress import Observer, stderr_observer
from blockpruner.core.settings import Compensate, Perplexity, Score, read_settings
from blockpruner.evaluation.perplexity import HeldOutPerplexity, held_out, measure_perplexity
from blockpruner.inputs.calibration import CalibrationSet, pack_rows
from blockpruner.inputs.checkpoints import GENERATION_FILE, LICENCE_FILES, copy_files, drop_code_, licence_beside
from blockpruner.methods.apply import Pruning
from blockpruner.methods.blocks.kind import choose
from blockpruner.methods.healed import Healed
from blockpruner.methods.kind import fields_of, open_stores
from blockpruner.methods.recipes import RECOMMENDED, Recipe, recipe, rival, settled
from blockpruner.methods.registry import KINDS, kind_of_method
from blockpruner.model.models import prune_, resolve_device
from blockpruner.scoring.engine import Engine
from blockpruner.scoring.metrics import METRICS, Metric
from blockpruner.scoring.stability import Stability
from blockpruner.search.iteration import Iteration, removals, stabilities
from blockpruner.search.registry import Request, Search, request
from blockpruner.search.run import search
from blockpruner.search.trace import Current
from blockpruner.store.files import write_json, write_text
from blockpruner.store.manifest import CARD_FILE, SOURCE_FILE, Identity
from blockpruner.store.provenance import fingerprint
from blockpruner.store.tensors import tensor_bytes

IN_MEMORY = "in memory"
NO_CONTENT = ("_name_or_path", "transformers_version")
"""Fields of a config that say where a model came from."""


@dataclass(frozen=True)
class _Base:
    """What is known of a dense model beside its weights."""

    config: str
    """Its config.json."""
    place: str
    """The folder or the repository that it was loaded from; empty if it was not."""

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
            copy_files(Path(self.place), directory, (GENERATION_FILE, *LICENCE_FILES))

    @property
    def _is_folder(self) -> bool:
        return bool(self.place) and Path(self.place).is_dir()


class _InMemory(Pruning):
    """A model that is pruned already: what is written of it is verified against itself."""

    def __init__(self, dense: Path, plan: Plan, model: PreTrainedModel, dtype: str, healed: Healed | None) -> None:
        super().__init__(dense, plan, CalibrationSet(()), dtype, "cpu", healed=healed)
        object.__setattr__(self, "_model", model)

    def load_for_export(self) -> PreTrainedModel:
        """A copy on the CPU, which the export may change."""
        return copy.deepcopy(vars(self)["_model"]).cpu()

    def prune_(
        self, dense: PreTrainedModel, note: Callable[[PreTrainedModel], object] = lambda reduced: None
    ) -> PreTrainedModel:
        note(dense)
        return dense


@dataclass(frozen=True)
class Pruned:
    """What `prune` returns."""

    model: PreTrainedModel
    """The argument, pruned in place."""
    tokenizer: Any
    plan: Plan
    """What was removed, in order."""
    trials: tuple[Iteration, ...]
    """The scores of every iteration."""
    stability: tuple[Stability | None, ...]
    """Of every iteration, which other candidates the texts cannot tell from the chosen one (`rivals`), and how often
    resampled rows choose the same (`kept`). None where a step rests on no losses or on a price, or on a single row."""
    compensation: Mapping[str, Any]
    """What compensation did, and the perplexities on held-out rows before and after; empty without."""
    base: _Base
    """What exports take over from the dense model beside its weights."""

    def evaluate(self, texts: Sequence[str], seq_len: int = 2048, max_rows: int | None = None) -> HeldOutPerplexity:
        """The perplexity on texts that `prune` has not seen, as `blockpruner.evaluate`."""
        return evaluate(self.model, self.tokenizer, texts, seq_len, max_rows)

    def export(self, directory: str | Path, formats: Sequence[str] = ("hf",)) -> dict[str, Path]:
        """Write verified checkpoints, `hf` at the directory and another format at DIRECTORY-FORMAT; returns the places.

        A fresh process compares each with this model. A copy of the model is in memory meanwhile.

        Args:
            formats: as in `export` of a run file.

        Raises:
            InputError: an unknown format, one that cannot hold the model, or a place that is not empty; before anything
                is written, except where only the writing shows it.
        """
        places = {form: Path(f"{directory}{'' if form == 'hf' else f'-{form}'}").absolute() for form in formats}
        dtype = str(self.model.dtype).removeprefix("torch.")
        require_exports(formats, KINDS[self.plan.kind], dtype)
        for place in places.values():
            if place.exists() and (not place.is_dir() or any(place.iterdir())):
                raise InputError(f"{place} is not empty; choose another directory, or remove it")
        with tempfile.TemporaryDirectory() as folder:
            self.base.write(Path(folder), self.tokenizer)
            for form, place in places.items():
                plan = replace(self.plan, target=place.name, compensate=self.compensation.get("method", "none"))
                EXPORTS[form].write(_InMemory(Path(folder), plan, self.model, dtype, self._healed), place)
        return places

    def push_to_hub(self, repo: str, private: bool = True, format: str = "hf") -> str:
        """Export, and upload what was verified to a repository, which is made if it is not there; returns the address.

        Raises:
            InputError: as `export`; or the format's engine is not installed, the repository is there and not as private
                as was asked, or the hub refuses.
        """
        with tempfile.TemporaryDirectory() as folder:
            name = repo.rpartition("/")[2]
            (place,) = self.export(Path(folder) / name, [format]).values()
            return push(place, repo, private, self.base.licence, name)

    @property
    def _healed(self) -> Healed | None:
        """Words for the card where compensation has changed weights."""
        if not self.compensation.get("share"):
            return None
        words = f"compensated without training ({self.compensation['method']}, {self.compensation['tokens']:,} tokens)"
        return Healed(Path(), "", words, (), "")

    def save(self, directory: str) -> None:
        """Write a checkpoint that `AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)` loads."""
        save_pruned(self.model, Path(directory))
        self.tokenizer.save_pretrained(directory)
        drop_code_(Path(directory), code_file(self.model))


def prune(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: Sequence[str],
    ratio: float | str,
    *,
    seq_len: int = 2048,
    packing: str = "joined",
    method: str | Search | Callable[..., Any] = RECOMMENDED,
    unit: str = "block",
    candidates: str = "all",
    metric: str | Metric | Callable[..., Any] = "perplexity",
    options: Mapping[str, Any] | None = None,
    acceleration: str | None = None,
    compensation: str | None = None,
    batch_tokens: int | str = "auto",
    trials: str | Path | None = None,
    device: str = "auto",
    observer: Observer | None = None,
) -> Pruned:
    """Remove the blocks whose absence costs the least on `texts`, in place.

    Args:
        model: a transformers causal LM of a supported family. It is changed.
        texts: calibration samples; the paper uses 256 Alpaca samples.
        ratio: share of all parameters to remove, in (0, 1); the nearest reachable one is taken. Or a budget as in
            params.yaml ("17blocks", "0.30kv").
        method: "recommended" (floating search, lazy + race, and refit; for a ratio the better of this and of greedy
            layers, by the held-out rows of the refit); "blockpruner", exactly as in arXiv 2406.10594;
            a plain search by its name in a run file's `score` section (docs/methods.md); or a row of your own
            (docs/extend.md), or a function of (problem, options) that yields iterations, whose last choice is taken.
            Methods that change weights need the stages.
        metric: a name as in a run file's `score` section, a row of your own, or a function of (logits, targets, the
            dense model's logits). Speed-ups and answers to items need the stages.
        unit: as in a run file's `score` section.
        candidates: the same.
        options: the same.
        acceleration: "none", "lazy", "race" or "lazy+race" (docs/performance.md names what they gain and risk), in
            place of the method's own.
        compensation: "none", or a method of `compensate.method` (docs/methods.md), in place of the method's own:
            weights that stay change to make up for what is gone. It is fitted to at most 192 joined rows of 256 tokens
            of `texts` (or of `seq_len`, if that is less), of which an eighth is held out to check that it helps.
        seq_len: tokens in a calibration row; shortened to the model's context.
        trials: a folder that keeps every score, so that a call that was killed goes on where it was.
        device: where the model is put before; "auto" is the GPU that is there for a model on the CPU, and else where
            it lies. Or cpu, cuda, cuda:N.
        observer: shows progress; by default on standard error. `core.progress.SilentObserver()` shows nothing.

    Raises:
        InputError: unsupported family, no calibration row, a ratio that cannot be met, settings that do not fit.
    """
    if callable(method):
        method = Search(name := _name(method), name, method, nested=False)
    if isinstance(method, str):
        chosen = recipe(method, acceleration, compensation)
    else:
        chosen = Recipe(method.name, acceleration or "none", compensation or "none")
    if isinstance(method, str) and not kind_of_method(chosen.method).removes_blocks:
        raise InputError(f"method {method!r} changes weights, which prune does not; use a run file and the stages")
    if isinstance(texts, str):
        raise InputError("texts is one string; give a list of calibration samples")
    own = None if isinstance(method, str) else method
    asked = _request(chosen, own, metric, unit, candidates, options or {})
    if asked.metric.answers:
        raise InputError(
            f"metric {asked.metric.name!r} is of items and their answers, which prune does not take; write a run file"
        )
    if callable(metric) and trials is not None:
        raise InputError("trials keeps scores by a metric's name, and a function may change; give a row, or no trials")
    observer = observer or stderr_observer()
    config, base = model.config.to_dict(), _Base(model.config.to_json_string(use_diff=False), model.name_or_path)
    budget = ratio if isinstance(ratio, str) else f"{ratio:.12f}".rstrip("0")
    seq_len = min(seq_len, config.get("max_position_embeddings") or seq_len)
    calibration = pack_rows(texts, tokenizer, seq_len, packing)
    mend = read_settings(Compensate, {"method": chosen.compensation}, "compensation: ")
    fit = compensation_rows(texts, tokenizer, mend, (), seq_len) if mend.method != "none" else None
    if fit is not None and len(fit.rows) < 2:
        raise InputError(
            f"compensation {mend.method} is fitted to rows of {min(mend.seq_len, seq_len)} tokens and checked on "
            f"others, and the texts fill {len(fit.rows)}; give more texts or a smaller seq_len, or compensation='none'"
        )
    model.eval()
    if device != "auto" or model.device.type == "cpu":
        model.to(resolve_device(device))
    dtype = str(model.dtype).removeprefix("torch.")
    identity = _identity(model) if trials is not None else Identity(IN_MEMORY, IN_MEMORY)
    folder = None if trials is None else Path(trials)
    engine = Engine(model, batch_tokens)

    def made(one: Request) -> tuple[float, Plan, Sequence[Iteration], tuple[Stability | None, ...], Compensated]:
        trace = search(one, calibration, stores, engine, resources_of(config), [budget], observer).of(budget)
        order, perplexities = removals(trace, one.search.nested)
        current = _current(one, fields_of(one.metric.key, calibration, identity, dtype), calibration)
        plan, healed = choose(order, perplexities, config, budget, current), Compensated()
        if fit is not None:
            healed = compensate(model, plan, fit, mend.held_out(len(fit.rows)), mend.method, observer)
        after = float(healed.report["perplexity"]["after"]) if healed.report else math.inf
        return after, plan, trace, stabilities(trace, one.options.price), healed

    with open_stores(asked.losses, calibration, identity, dtype, folder, observer) as stores:
        found = [made(asked)]
        layers = rival(method, asked.score, config, budget, mend.method) if isinstance(method, str) else None
        if layers is not None:
            found.append(made(request(layers, None, asked.metric)))
            observer.note(settled([asked.score, layers], [each[0] for each in found]))
    _, plan, trace, firm, healed = min(found, key=lambda each: each[0])
    pruned = prune_(model, plan.mask)
    pruned.load_state_dict(healed.weights, strict=False)
    return Pruned(pruned, tokenizer, plan, tuple(trace), firm, healed.report, base)


def evaluate(
    model: PreTrainedModel, tokenizer: Any, texts: Sequence[str], seq_len: int = 2048, max_rows: int | None = None
) -> HeldOutPerplexity:
    """The perplexity of a model, dense or pruned, on texts joined and cut into rows.

    Of two models on the same texts, `reporting.statistics.perplexity_ratio(a.row_nll, b.row_nll)` has the interval.

    Args:
        seq_len: tokens in a row; shortened to the model's context.
        max_rows: at most so many rows.

    Raises:
        InputError: the texts are shorter than one row.
    """
    if isinstance(texts, str):
        raise InputError("texts is one string; give a list of texts")
    seq_len = min(seq_len, model.config.max_position_embeddings or seq_len)
    wanted = read_settings(Perplexity, {"seq_len": seq_len, "max_rows": max_rows})
    return measure_perplexity(model.eval(), held_out(tokenizer, texts, wanted).rows)


def _name(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


def _identity(model: PreTrainedModel) -> Identity:
    """Of a model in memory: its config and the values of its weights."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in NO_CONTENT}
    tensors = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    weights = {name: sha256(tensor_bytes(tensor)).hexdigest() for name, tensor in tensors.items()}
    now = fingerprint({"config": config, "weights": weights})
    return Identity(now, now)


def _request(
    chosen: Recipe,
    own: Search | None,
    metric: str | Metric | Callable[..., Any],
    unit: str,
    candidates: str,
    options: Mapping[str, Any],
) -> Request:
    if callable(metric):
        name = _name(metric)
        metric = Metric(
            name, metric, title=name, units_text="", formula=(metric.__doc__ or "").partition("\n")[0], reference=True
        )
    measure = METRICS[metric] if isinstance(metric, str) else metric
    score = read_settings(
        Score,
        {
            "method": chosen.method,
            "metric": measure.name,
            "unit": unit,
            "candidates": candidates,
            "options": options,
            "acceleration": chosen.acceleration,
        },
    )
    return request(score, own, measure)


def _current(asked: Request, store: Mapping[str, Any], calibration: CalibrationSet) -> Current:
    return Current(
        kind="mask",
        search=IN_MEMORY,
        nested=asked.search.nested,
        score=asked.score,
        store=store,
        calibration={"rows": len(calibration.rows), "tokens": calibration.tokens},
    )
