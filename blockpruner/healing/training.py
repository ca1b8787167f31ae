"""Training a pruned model in memory (arXiv 2406.10594, Figure 8, and distillation from the dense model).

Decides the optimizer, the order of the rows, when a state is validated and saved, and which one is kept. What is
minimised is decided in `loss`, which weights change in `weights`.

The paper gives: 8,000 Alpaca samples, adapters on every linear layer but embeddings and head, rank 32, alpha 10,
learning rate 2e-4, batches of 1 with 4 accumulated, a linear schedule. It leaves the rest open, and these choices fill
it: one epoch, as in SliceGPT's fine-tuning, which has the same figures; each sample is a row, ended by the end-of-text
token and truncated, with a loss on all its tokens, as in Alpaca's plain form; and the defaults of transformers'
Trainer: AdamW with betas 0.9 and 0.999 and no weight decay, gradients clipped to norm 1, no warm-up, no dropout.

The adapters are peft's. The loop is ours and neither transformers' Trainer nor TRL: it is a page long, goes on after a
kill to the same bits, and never holds a row's logits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import PreTrainedModel

from blockpruner.core.errors import InputError, NonFiniteLossError
from blockpruner.core.progress import Observer
from blockpruner.healing.loss import TrainingLoss
from blockpruner.healing.settings import Train
from blockpruner.healing.state import Progress, Validation, resume_, save
from blockpruner.healing.weights import TrainedWeights, checkpointed, trained_weights_
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.model import accelerator
from blockpruner.model.models import decoder_layers
from blockpruner.store.provenance import fingerprint
from blockpruner.versions import WEIGHTS_VERSION

MAX_GRADIENT_NORM = 1.0

NOT_IN_KEY = {"data", "num_samples", "num_rows", "seq_len", "validation", "checkpointing"}
"""The settings that do not decide the weights, given the rows."""


@dataclass(frozen=True)
class Trained:
    """A trained model."""

    model: PreTrainedModel
    """The model that was given, with its weights changed in place."""
    losses: tuple[float, ...]
    """Of each step, before it was taken; nats per token."""
    validations: tuple[Validation, ...]
    """Before training, during it and in the end; none without validation rows."""
    step: int
    """The step after which the weights are kept; 0 leaves them as they were."""

    @property
    def facts(self) -> dict[str, Any]:
        """All but the model, for JSON."""
        validations = [asdict(validation) for validation in self.validations]
        return {"losses": self.losses, "validations": validations, "step": self.step}


def train_(
    model: PreTrainedModel,
    rows: CalibrationSet,
    recipe: Train,
    *,
    teacher: PreTrainedModel | None,
    validation: CalibrationSet | None,
    adapters: Path,
    identity: str,
    observer: Observer,
    depths: Sequence[int] = (),
    save_every: int = 20,
) -> Trained:
    """Train a pruned model on `rows`, in place. Its class and config stay as they are, and it is left without adapters.

    A step minimises the mean over its rows. `batch` therefore changes memory and speed, and `batch * accumulation` the
    result. Adapters of a bfloat16 model, and masters of its weights, are float32. A float16 model, whose gradients
    would vanish, is trained in float32 and rounded in the end. The model stays in evaluation mode: without dropout, a
    step depends only on the steps before it.

    Args:
        teacher: the dense model, used if the recipe has `distill` or `hidden`. Where adapters are trained, it may share
            tensors with `model`; in the end, when it has done its work, the adapters are merged into these.
        validation: rows that are not trained on. The state that is best on them is kept, be it the one before training.
        adapters: folder of the training states, one file for each (identity, dtype, rows, recipe). A state is written
            every `save_every` steps. A killed run goes on from it to the same weights, to the bit on a CPU. The last
            state is kept, and the model is not trained again.
        identity: of the weights of `model`, and of what else the result depends on, such as another teacher.
        depths: for each layer of `model`, the layer of `teacher` with the same depth; used if the recipe has `hidden`.

    Raises:
        NonFiniteLossError: training diverged.
        DeviceMemoryError: a batch does not fit; names the settings to lower.
        InputError: `top_k` is not less than the vocabulary.
    """
    dtype, vocabulary = model.dtype, model.config.vocab_size
    if recipe.top_k is not None and recipe.top_k >= vocabulary:
        raise InputError(
            f"train.top_k {recipe.top_k} is not less than the vocabulary of {vocabulary}; lower it, or leave it out"
        )
    key: dict[str, Any] = {"model": identity, "dtype": str(dtype), "version": WEIGHTS_VERSION}
    key |= {"rows": rows.digest, "validation": validation and validation.digest}
    key["recipe"] = recipe.model_dump(mode="json", exclude=NOT_IN_KEY)
    path = adapters / f"{fingerprint(key)}.safetensors"
    if dtype is torch.float16:
        _cast_(model, torch.float32)
    model.eval()
    weights = trained_weights_(model, recipe)
    objective = TrainingLoss(model, teacher if recipe.distill or recipe.hidden else None, recipe, depths)
    optimizer = torch.optim.AdamW(weights.masters.values(), lr=recipe.learning_rate, weight_decay=0.0)
    plan = list(_steps(len(rows.rows), recipe))
    progress = resume_(path, weights.masters, optimizer, observer)
    weights.show_()
    observer.begin("train")
    cached, first, clock, tokens = progress.finished, len(progress.losses), time.monotonic(), 0
    if validation is not None and not progress.curve:
        _validate_(objective, validation, weights, progress)
    with checkpointed(decoder_layers(model), recipe.checkpointing):
        for step in range(first, len(plan)):
            if cached or _stalled(progress.curve, recipe.patience):
                break
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * _rate(step, len(plan), recipe)
            chosen = [rows.rows[i] for i in plan[step]]
            progress.losses.append(_accumulate_(objective, weights, chosen, step))
            torch.nn.utils.clip_grad_norm_(weights.masters.values(), MAX_GRADIENT_NORM)
            optimizer.step()
            optimizer.zero_grad()
            weights.show_()
            tokens += sum(map(len, chosen))
            done, last = step + 1, step + 1 == len(plan)
            if validation is not None and (last or done % recipe.validate_every == 0):
                _validate_(objective, validation, weights, progress)
            if done % save_every == 0 and not last:
                save(path, weights.masters, optimizer, progress)
            speed = tokens / (time.monotonic() - clock)
            detail = f"step {done}, loss {progress.losses[-1]:.4f}, {speed:,.0f} tokens/s"
            observer.advance(done - first, len(plan) - first, detail)
    kept = progress.kept
    if not cached:
        if kept is not None:
            weights.set_(progress.best)
        progress.finished = True
        save(path, weights.masters, optimizer, progress)
    weights.end_()
    if dtype is torch.float16:
        _cast_(model, dtype)
    observer.end(_summary(progress, len(rows.rows)), cached=cached)
    step = len(progress.losses) if kept is None else kept.step
    return Trained(model.requires_grad_(False), tuple(progress.losses), tuple(progress.curve), step)


def _validate_(objective: TrainingLoss, rows: CalibrationSet, weights: TrainedWeights, progress: Progress) -> None:
    """Measure the present state, enter it into the curve, and keep its weights if it is the best so far."""
    step = len(progress.losses)
    loss, nll = objective.measure(rows.rows)
    _check_finite(loss, f"validation loss after step {step}")
    progress.curve.append(Validation(step, loss, nll))
    if progress.kept is progress.curve[-1]:
        progress.best = {name: master.detach().clone() for name, master in weights.masters.items()}


def _stalled(curve: Sequence[Validation], patience: int | None) -> bool:
    """Whether so many validations in a row were no better than one before them."""
    losses = [validation.loss for validation in curve]
    return patience is not None and len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience])


def _rate(step: int, steps: int, recipe: Train) -> float:
    """The learning rate of a step as a share of its peak: a linear rise over the warm-up, then the schedule to 0."""
    warm = round(recipe.warmup * steps)
    if step < warm:
        return (step + 1) / warm
    gone = (step - warm) / (steps - warm)
    return 1 - gone if recipe.schedule == "linear" else (1 + math.cos(math.pi * gone)) / 2


def _summary(progress: Progress, rows: int) -> str:
    losses, curve, kept = progress.losses, progress.curve, progress.kept
    tenth = -(-len(losses) // 10)
    text = f"{len(losses)} steps over {rows} rows, loss {mean(losses[:tenth]):.4f} -> {mean(losses[-tenth:]):.4f} "
    text += "(first and last tenth)"
    if kept is None:
        return text
    if kept.step == 0:
        return f"{text}; validation loss {kept.loss:.4f} never fell: the weights are left as they were"
    return f"{text}; validation loss {curve[0].loss:.4f} -> {kept.loss:.4f} after step {kept.step}, which is kept"


def _steps(count: int, recipe: Train) -> Iterator[list[int]]:
    """The rows of each step. Every epoch is a new permutation, cut into steps; its last step may be smaller."""
    generator = torch.Generator().manual_seed(recipe.seed)
    size = recipe.batch * recipe.accumulation
    for _ in range(recipe.epochs):
        order = torch.randperm(count, generator=generator).tolist()
        yield from (order[i : i + size] for i in range(0, count, size))


def _accumulate_(objective: TrainingLoss, weights: TrainedWeights, rows: Sequence[Sequence[int]], step: int) -> float:
    """Give the masters the gradient of the mean over `rows` of each row's loss; returns that mean."""
    total, batch = 0.0, objective.recipe.batch
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        with accelerator.named_if_too_large(
            f"training on {len(part)} rows of up to {max(map(len, part))} tokens",
            "lower train.batch (and raise train.accumulation), set train.checkpointing: true, or lower train.seq_len",
        ):
            total += objective.accumulate_(part, 1 / len(rows))
        weights.collect_()
    _check_finite(total, f"loss of step {step + 1}")
    return total


def _check_finite(loss: float, what: str) -> None:
    if not math.isfinite(loss):
        raise NonFiniteLossError(f"training diverged: the {what} is {loss}; lower train.learning_rate")


def _cast_(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast the parameters alone. Rotary tables stay float32, as in a model loaded from its file."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
