"""The three-line API: prune a model that is in memory, without files, stages or a server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from blockpruner.checkpoints.hf import save_pruned
from blockpruner.core.blocks import removable_units
from blockpruner.core.budgets import resources_of
from blockpruner.core.errors import InputError
from blockpruner.core.plan import Plan
from blockpruner.core.progress import Observer, SilentObserver
from blockpruner.inputs.calibration import pack
from blockpruner.methods.commit import commit
from blockpruner.methods.transforms import TRANSFORMS
from blockpruner.model.models import prune_
from blockpruner.scoring.engine import Engine
from blockpruner.scoring.metrics import NLL, Metric, metric_of
from blockpruner.scoring.objectives import Objective
from blockpruner.search import method_of, search_settings
from blockpruner.search.iteration import Iteration, removals
from blockpruner.search.run import SearchRun
from blockpruner.store.trials import TrialStore, store_fingerprint


@dataclass(frozen=True)
class Pruned:
    """model: the argument, pruned in place; plan: what was removed, in order; trials: every iteration's scores."""

    model: PreTrainedModel
    tokenizer: Any
    plan: Plan
    trials: tuple[Iteration, ...]

    def save(self, directory: str) -> None:
        """Write a checkpoint that `AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)` loads."""
        save_pruned(self.model, Path(directory))
        self.tokenizer.save_pretrained(directory)


def prune(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: Sequence[str],
    ratio: float | str,
    *,
    seq_len: int = 2048,
    packing: str = "joined",
    method: str = "greedy",
    unit: str = "block",
    candidates: str = "all",
    metric: str = "perplexity",
    options: Mapping[str, Any] | None = None,
    acceleration: str = "none",
    batch_tokens: int | str = "auto",
    observer: Observer | None = None,
) -> Pruned:
    """Remove the blocks whose absence costs the least on `texts`, in place (by default as arXiv 2406.10594 does).

    Args:
        model: a transformers causal LM of a supported family; it is changed.
        texts: calibration samples; the paper uses 256 Alpaca samples.
        ratio: share of all parameters to remove, in (0, 1), the nearest reachable one is taken; or a budget as in
            params.yaml ("17blocks", "0.30kv").
        method, unit, candidates, metric, options: as in a run file's `score` section (docs/methods.md), of the methods
            that remove blocks; a speed-up and answers to items are for the stages alone.
        acceleration: "none", "lazy", "race" or "lazy+race" (docs/performance.md says what they gain and risk).
        seq_len: tokens a calibration row; shortened to the model's context.

    Raises:
        InputError: unsupported family, no calibration row, a ratio that cannot be met, settings that do not fit.
    """
    if method in TRANSFORMS:
        raise InputError(f"method {method!r} changes weights, which prune does not; use a run file and the stages")
    if metric == "answer_likelihood" or isinstance(texts, str):
        raise InputError(
            "metric 'answer_likelihood' is of items and their answers, which prune does not take; write a run file"
            if metric == "answer_likelihood"
            else "texts is one string; give a list of calibration samples"
        )
    observer = observer or SilentObserver()
    config = model.config.to_dict()
    resources = resources_of(config)
    budget = ratio if isinstance(ratio, str) else f"{ratio:.12f}".rstrip("0")
    seq_len = min(seq_len, config.get("max_position_embeddings") or seq_len)
    calibration = pack(texts, tokenizer, seq_len, packing)
    dtype = str(model.dtype).removeprefix("torch.")
    model.eval()
    score = search_settings(
        {"method": method, "unit": unit, "metric": metric, "options": options, "acceleration": acceleration}
    )
    engine = Engine(model, batch_tokens)

    def objective(of: Metric) -> Objective:
        fields = store_fingerprint(calibration.digest, "in memory", dtype, of.key)
        store = TrialStore(fields, len(calibration.rows))
        return Objective(calibration, store, engine, observer, of)

    asked = objective(metric_of(metric))
    nll = asked if asked.metric.is_nll else objective(NLL)
    units = removable_units(int(config["num_hidden_layers"]), unit, candidates)
    (trace,) = SearchRun(asked, nll, score, units, resources, observer).traces([budget]).values()
    order, perplexities = removals(trace, method_of(method).nested)
    facts = {
        "target": f"in-memory-{budget}", "run": "in-memory", "score": score, "search": "in-memory", "kind": "mask",
        "nested": method_of(method).nested,
        "calibration": {"rows": len(calibration.rows), "tokens": calibration.tokens},
    }  # fmt: skip
    plan = commit(order, perplexities, resources, budget, facts)
    return Pruned(prune_(model, plan.mask), tokenizer, plan, tuple(trace))
