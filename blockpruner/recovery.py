"""Recovery: LoRA adapters trained on a pruned model, then merged into its weights (arXiv 2406.10594, Figure 8).

Decides the recipe, the order of the samples and what survives a kill. Where texts come from is decided in
`inputs.texts`, how the result is written in `checkpoints`.

The paper gives: 8,000 Alpaca samples, adapters on every linear layer but embeddings and head, rank 32, alpha 10,
learning rate 2e-4, batches of 1 with 4 accumulated, a linear schedule. It leaves the rest open, and these choices fill
it: one epoch, as in SliceGPT's fine-tuning, which has the same figures; each sample is a row, ended by the end-of-text
token and truncated, with a loss on all its tokens, as in Alpaca's plain form; and the defaults of transformers'
Trainer: AdamW with betas 0.9 and 0.999 and no weight decay, gradients clipped to norm 1, no warm-up, no dropout.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import safetensors
import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from blockpruner.core.errors import DeviceMemoryError, InputError, NonFiniteLossError
from blockpruner.core.progress import Observer
from blockpruner.core.settings import Recover
from blockpruner.inputs.calibration import CalibrationSet, draw, pack_rows
from blockpruner.store.files import set_aside, write_atomic
from blockpruner.store.provenance import fingerprint
from blockpruner.versions import RECOVERY_VERSION

MAX_GRADIENT_NORM = 1.0
IGNORED = -100
"""Target of a pad in `cross_entropy`."""


RECIPE = ("rank", "alpha", "learning_rate", "batch", "accumulation", "epochs", "seed")
"""The settings that decide the weights, given the rows. Part of the key of trained adapters."""


@dataclass(frozen=True)
class Recovered:
    """A trained model."""

    model: PreTrainedModel
    """The model that was given, with its weights changed in place."""
    losses: tuple[float, ...]
    """Of each step, before it was taken; nats per token."""


def training_rows(texts: Sequence[str], tokenizer: Any, wanted: Recover) -> CalibrationSet:
    """Draw samples without replacement. Each is a row, ended by the end-of-text token and cut off at `seq_len`.

    Raises:
        InputError: there are fewer texts than `num_samples`.
    """
    ending = tokenizer.eos_token or ""
    samples = [text + ending for text in draw(texts, wanted.num_samples, "all", wanted.seed, section="recover")]
    return pack_rows(samples, tokenizer, wanted.seq_len, "per_sample")


def recover_(
    model: PreTrainedModel,
    rows: CalibrationSet,
    recipe: Recover,
    *,
    adapters: Path,
    identity: str,
    observer: Observer,
    save_every: int = 50,
) -> Recovered:
    """Train adapters on `rows` and merge them into the model's weights, in place. Class and config stay as they are.

    A step minimises the mean over its rows of each row's mean NLL, the logarithm of the perplexity that the search
    minimised. `batch` therefore changes memory and speed, and `batch * accumulation` the result. Adapters are float32
    for a bfloat16 model. A float16 model, whose gradients would vanish, is trained in float32 and rounded in the end.
    The model stays in evaluation mode: without dropout, a step depends only on the steps before it.

    Args:
        adapters: folder of the training states, one file for each (identity, dtype, rows, recipe). A state is written
            every `save_every` steps; a killed run goes on from it to the same weights. The last state is kept, and the
            model is not trained again.
        identity: of the model's weights, as `manifest.model_identity` gives it.

    Raises:
        NonFiniteLossError: training diverged.
        DeviceMemoryError: a batch does not fit; names the settings to lower.
    """
    dtype = model.dtype
    key: dict[str, Any] = {"model": identity, "dtype": str(dtype), "rows": rows.digest, "version": RECOVERY_VERSION}
    key["recipe"] = {field: getattr(recipe, field) for field in RECIPE}
    path = adapters / f"{fingerprint(key)}.safetensors"
    if dtype is torch.float16:
        _cast_(model, torch.float32)
    model.eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        adapted = get_peft_model(
            model, LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, target_modules="all-linear", bias="none")
        )
    weights = {name: weight for name, weight in adapted.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(weights.values(), lr=recipe.learning_rate, weight_decay=0.0)
    plan = list(_steps(len(rows.rows), recipe))
    losses = _resume_(path, weights, optimizer, observer)
    done = len(losses)
    observer.begin("recover")
    for step, chosen in enumerate(plan[done:], done):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * (1 - step / len(plan))
        losses.append(_accumulate_(model, [rows.rows[i] for i in chosen], recipe.batch, step))
        torch.nn.utils.clip_grad_norm_(weights.values(), MAX_GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % save_every == 0 or step + 1 == len(plan):
            _save(path, weights, optimizer if step + 1 < len(plan) else None, losses)
        observer.advance(step + 1 - done, len(plan) - done, f"step {step + 1}, loss {losses[-1]:.4f}")
    adapted.merge_and_unload()
    if dtype is torch.float16:
        _cast_(model, dtype)
    first, last = (mean(part) for part in (losses[: _tenth(losses)], losses[-_tenth(losses) :]))
    observer.end(
        f"{len(plan)} steps over {len(rows.rows)} rows, loss {first:.4f} -> {last:.4f} (first and last tenth)",
        cached=done == len(plan),
    )
    return Recovered(model.requires_grad_(False), tuple(losses))


def _tenth(losses: Sequence[float]) -> int:
    return -(-len(losses) // 10)


def _steps(count: int, recipe: Recover) -> Iterator[list[int]]:
    """The rows of each step. Every epoch is a new permutation, cut into steps; its last step may be smaller."""
    generator = torch.Generator().manual_seed(recipe.seed)
    size = recipe.batch * recipe.accumulation
    for _ in range(recipe.epochs):
        order = torch.randperm(count, generator=generator).tolist()
        yield from (order[i : i + size] for i in range(0, count, size))


def _accumulate_(model: PreTrainedModel, rows: Sequence[Sequence[int]], batch: int, step: int) -> float:
    """Add the gradient of the mean over `rows` of each row's mean NLL; returns that mean."""
    total = 0.0
    for start in range(0, len(rows), batch):
        part = [torch.tensor(row, device=model.device) for row in rows[start : start + batch]]
        try:
            loss = _row_nll(model, part).sum() / len(rows)
            loss.backward()  # type: ignore[no-untyped-call]  # torch has no type for it
        except torch.OutOfMemoryError as error:
            raise DeviceMemoryError(
                f"training on {len(part)} rows of up to {max(map(len, part))} tokens does not fit into the memory of "
                f"{model.device}; lower recover.batch (and raise recover.accumulation), or recover.seq_len"
            ) from error
        total += loss.item()
    if not torch.isfinite(torch.tensor(total)):
        raise NonFiniteLossError(
            f"recovery diverged: the loss of step {step + 1} is {total}; lower recover.learning_rate"
        )
    return total


def _row_nll(model: PreTrainedModel, rows: Sequence[Tensor]) -> Tensor:
    """Mean NLL [B] of each row, nats per token, in float32 or wider. Pads lie on the right, where causal attention does
    not see them, and are no targets."""
    ids = pad_sequence(list(rows), batch_first=True)
    targets = pad_sequence([row[1:] for row in rows], batch_first=True, padding_value=IGNORED)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    wide = logits if logits.dtype == torch.float64 else logits.float()
    nll = F.cross_entropy(wide.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    return nll.sum(dim=1) / (targets != IGNORED).sum(dim=1)


def _cast_(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast the parameters alone. Rotary tables stay float32, as in a model loaded from its file."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


# --- the training state: one safetensors file with adapters, and with the optimizer's moments until training ends -----


def _save(
    path: Path, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer | None, losses: Sequence[float]
) -> None:
    tensors = {name: weight.detach() for name, weight in weights.items()}
    if optimizer is not None:
        for name, weight in weights.items():
            tensors |= {f"{name}.{moment}": optimizer.state[weight][moment] for moment in ("exp_avg", "exp_avg_sq")}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(list(losses))
    facts = {"losses": text, "sha256": _digest(text, tensors)}
    content = safetensors.torch.save(tensors, facts)
    write_atomic(path, lambda temporary: temporary.write_bytes(content))


def _resume_(
    path: Path, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, observer: Observer
) -> list[float]:
    """Restore adapters and optimizer from a sound state. Returns the losses of the steps done; none without a state."""
    if not path.exists():
        return []
    try:
        losses, tensors = _read(path)
        _require_names(tensors, weights)
    except (SafetensorError, InputError, ValueError, TypeError, KeyError) as error:
        observer.note(f"{path} is damaged ({error}); set aside as {set_aside(path).name}, training starts anew")
        return []
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(tensors[name])
            if f"{name}.exp_avg" in tensors:
                moments = {m: tensors[f"{name}.{m}"].to(weight.device) for m in ("exp_avg", "exp_avg_sq")}
                optimizer.state[weight] = {"step": torch.tensor(float(len(losses))), **moments}
    observer.note(f"recovery goes on after step {len(losses)}, from {path}")
    return losses


def _read(path: Path) -> tuple[list[float], dict[str, Tensor]]:
    with safetensors.safe_open(path, framework="pt") as file:
        facts = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    if facts["sha256"] != _digest(facts["losses"], tensors):
        raise InputError("its content does not match its own digest")
    losses: list[float] = json.loads(facts["losses"])
    return losses, tensors


def _require_names(tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Raise InputError unless a state holds these adapters, with the moments of all of them or of none."""
    moments = {f"{name}.{moment}": weight for name, weight in weights.items() for moment in ("exp_avg", "exp_avg_sq")}
    held = {name: tensor.shape for name, tensor in tensors.items()}
    wanted = dict(weights) | (moments if len(held) > len(weights) else {})
    if held != {name: weight.shape for name, weight in wanted.items()}:
        raise InputError("its adapters have other names or shapes than this version of peft gives them")


def _digest(losses: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(losses.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()
