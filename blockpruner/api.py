"""The three-line API: prune a model that is in memory, without stages or a server."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from blockpruner.checkpoints.hf import code_file, save_pruned
from blockpruner.compensation.compensate import Compensated, compensate
from blockpruner.core.budgets import resources_of
from blockpruner.core.errors import InputError
from blockpruner.core.plan import Plan
from blockpruner.core.progress import Observer, SilentObserver, stderr_observer
from blockpruner.core.settings import Score, read_settings
from blockpruner.inputs.calibration import CalibrationSet, pack_rows
from blockpruner.inputs.checkpoints import drop_code_
from blockpruner.methods.blocks.kind import choose
from blockpruner.methods.kind import fields_of, open_stores
from blockpruner.methods.recipes import RECOMMENDED, Recipe, recipe
from blockpruner.methods.registry import kind_of_method
from blockpruner.model.models import prune_
from blockpruner.scoring.engine import Engine
from blockpruner.scoring.metrics import METRICS, Metric
from blockpruner.scoring.stability import Stability
from blockpruner.search.iteration import Iteration, removals, stabilities
from blockpruner.search.registry import Request, Search, request
from blockpruner.search.run import search
from blockpruner.search.trace import Current
from blockpruner.store.manifest import Identity
from blockpruner.store.provenance import fingerprint
from blockpruner.store.tensors import tensor_bytes

IN_MEMORY = "in memory"
NO_CONTENT = ("_name_or_path", "transformers_version")
"""Fields of a config that say where a model came from."""


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
    method: str | Search = RECOMMENDED,
    unit: str = "block",
    candidates: str = "all",
    metric: str | Metric | Callable[..., Any] = "perplexity",
    options: Mapping[str, Any] | None = None,
    acceleration: str | None = None,
    compensation: str | None = None,
    batch_tokens: int | str = "auto",
    trials: str | Path | None = None,
    observer: Observer | None = None,
) -> Pruned:
    """Remove the blocks whose absence costs the least on `texts`, in place.

    Args:
        model: a transformers causal LM of a supported family. It is changed.
        texts: calibration samples; the paper uses 256 Alpaca samples.
        ratio: share of all parameters to remove, in (0, 1); the nearest reachable one is taken. Or a budget as in
            params.yaml ("17blocks", "0.30kv").
        method: "recommended" (floating search, lazy + race, and refit); "blockpruner", exactly as in arXiv 2406.10594;
            a plain search by its name in a run file's `score` section (docs/methods.md); or a row of your own
            (docs/extend.md). Methods that change weights need the stages.
        metric: a name as in a run file's `score` section, a row of your own, or a function of (logits, targets, the
            dense model's logits). Speed-ups and answers to items need the stages.
        unit, candidates, options: as in a run file's `score` section.
        acceleration: "none", "lazy", "race" or "lazy+race" (docs/performance.md names what they gain and risk), in
            place of the method's own.
        compensation: "none", or a method of `compensate.method` (docs/methods.md), in place of the method's own:
            weights before removed blocks change to make up for them. A quarter of the calibration rows is held out to
            check that it helps. It wants tens of thousands of tokens.
        seq_len: tokens in a calibration row; shortened to the model's context.
        trials: a folder that keeps every score, so that a call that was killed goes on where it was.
        observer: shows progress; by default a bar on a terminal.

    Raises:
        InputError: unsupported family, no calibration row, a ratio that cannot be met, settings that do not fit.
    """
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
    observer = observer or (stderr_observer() if sys.stderr.isatty() else SilentObserver())
    config = model.config.to_dict()
    budget = ratio if isinstance(ratio, str) else f"{ratio:.12f}".rstrip("0")
    seq_len = min(seq_len, config.get("max_position_embeddings") or seq_len)
    calibration, mend = pack_rows(texts, tokenizer, seq_len, packing), chosen.compensation
    if mend != "none" and len(calibration.rows) < 2:
        raise InputError(
            f"compensation {mend} is fitted to calibration rows and checked on others, and there is one row of "
            f"{calibration.tokens} tokens; give more texts or a smaller seq_len, or compensation='none'"
        )
    model.eval()
    dtype = str(model.dtype).removeprefix("torch.")
    identity = _identity(model) if trials is not None else Identity(IN_MEMORY, IN_MEMORY)
    folder = None if trials is None else Path(trials)
    engine = Engine(model, batch_tokens)
    with open_stores(asked.losses, calibration, identity, dtype, folder, observer) as stores:
        trace = search(asked, calibration, stores, engine, resources_of(config), [budget], observer).of(budget)
    order, perplexities = removals(trace, asked.search.nested)
    current = _current(asked, fields_of(asked.metric.key, calibration, identity, dtype), calibration)
    plan = choose(order, perplexities, config, budget, current)
    firm, rows, found = stabilities(trace, asked.options.price), len(calibration.rows), Compensated()
    if mend != "none":
        found = compensate(model, plan, calibration, max(1, rows // 4), mend, observer)
    pruned = prune_(model, plan.mask)
    pruned.load_state_dict(found.weights, strict=False)
    return Pruned(pruned, tokenizer, plan, tuple(trace), firm, found.report)


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
        name = getattr(metric, "__name__", type(metric).__name__)
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
