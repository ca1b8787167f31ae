"""Training of a pruned model by transformers' Trainer: the settings it gets, and which state of the
weights is kept.

The paper states only LoRA, Alpaca and 8,000 samples. Rank 32, alpha 10, rate 2e-4, batches of 1
with 4 accumulated and the linear schedule are those of SliceGPT's fine-tuning, which has the same
figures: also one epoch, each sample a row, ended by the end-of-text token and truncated, with a
loss on all its tokens, as in Alpaca's plain form. The rest is the Trainer's: AdamW with betas 0.9
and 0.999 and no weight decay, gradients clipped to norm 1.

The Trainer holds only the trained weights (`weights`), so its checkpoints hold nothing else, and
the model stays in evaluation mode: without dropout, a step depends only on the steps before it. A
killed run goes on from its last checkpoint to the same weights, to the bit on a CPU. On a GPU the
backward pass adds in an order of its own.

Training is one process. If a device's memory is full, fewer rows are computed at once, then layers
again in the backward pass (gradient checkpointing), and the step begins again.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from blockpruner.core.errors import NonFiniteLossError
from blockpruner.core.progress import Observer
from blockpruner.healing.loss import TrainingLoss
from blockpruner.healing.settings import Train
from blockpruner.healing.states import BEST, drop_old_states, last_state, seal_state
from blockpruner.healing.weights import TrainedWeights, trained_weights_
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.model import accelerator
from blockpruner.model.models import decoder_layers
from blockpruner.store.files import writing
from blockpruner.store.tensors import read_tensors, write_tensors

SAVE_SECONDS = 60.0
"""The least time between two states."""

SAVE_COST_FACTOR = 50
"""The time between two states is at least this many times as long as one takes to write."""


def train_(
    model: PreTrainedModel,
    rows: CalibrationSet,
    recipe: Train,
    *,
    teacher: PreTrainedModel | None,
    validation: CalibrationSet | None,
    states: Path,
    observer: Observer,
) -> dict[str, Any]:
    """Train a pruned model on `rows`, in place. Its class and config stay as they are, and it is
    left without adapters.

    A step minimises the mean over its rows. `batch` therefore changes memory and speed, and `batch
    * accumulation` the result. A bfloat16 model's weights and adapters have masters in float32. A
    float16 model, whose gradients would vanish, is trained in float32 and rounded in the end.

    Args:
        teacher: the dense model, used if the recipe has `distill`. Where adapters are trained, it
            may share tensors with `model`; in the end, when it has done its work, the adapters are
            merged into these.
        validation: rows that are not trained on. The state that is best on them is kept, be it the
            one before training.
        states: folder of the states of this very training, from which a killed one goes on. The
            last two are left.

    Returns facts as JSON, in nats per token: `losses`, of each step before it was taken;
    `validations`, before training, during it and at the end ({step, loss, nll}, nll of the text);
    `step`, after which the weights are kept, 0 for those before training. Raises
    NonFiniteLossError if training diverges, and DeviceMemoryError.
    """
    dtype = model.dtype
    if dtype is torch.float16:
        _cast_(model, torch.float32)
    model.eval()
    weights = trained_weights_(model, recipe)
    loss = TrainingLoss(model, teacher if recipe.distill else None, recipe)
    # The Trainer seeds torch: the caller's random numbers stay as they are.
    with torch.random.fork_rng(devices=[]), writing(states):
        trainer = _Trainer(loss, weights, rows, validation, recipe, states)
        start_metrics = {}
        untrained_weights = {}
        if validation is not None:
            start_metrics = trainer.evaluate()
            untrained_weights = weights.snapshot()
        state = last_state(states, observer.note)
        observer.begin("train")
        start_loss = start_metrics.get("eval_loss", math.inf)
        trainer.add_callback(_ProgressCallback(observer, state))
        trainer.add_callback(_StatesCallback(weights, states, start_loss))
        trainer.train(resume_from_checkpoint=state and str(state))
    facts = _facts(start_metrics, trainer.state.log_history)
    if validation is not None:
        best_weights = untrained_weights
        if facts["step"] > 0:
            best_weights, best_facts = read_tensors(states / BEST)
            # On a GPU, steps that are taken again may lead elsewhere: what counts is in the file.
            facts["step"] = int(best_facts["step"])
        weights.load_state_dict(best_weights)
    weights.copy_to_model_()
    weights.finish_()
    if dtype is torch.float16:
        _cast_(model, dtype)
    model.requires_grad_(False)
    observer.end(f"{len(facts['losses'])} steps over {len(rows.rows)} rows; {_outcome(facts)}")
    return facts


def _facts(start_metrics: Mapping[str, float], log: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The facts that `train_` returns, from the Trainer's log; `step` is the one of the least
    validation loss, and the last one without validation."""
    losses = []
    validations = []
    for entry in ({**start_metrics, "step": 0}, *log):
        if "loss" in entry:
            losses.append(entry["loss"])
        if "eval_loss" in entry:
            validations.append(
                {"step": entry["step"], "loss": entry["eval_loss"], "nll": entry["eval_nll"]}
            )
    step = len(losses)
    if validations:
        best = min(validations, key=lambda validation: validation["loss"])
        step = best["step"]
    return {"losses": losses, "validations": validations, "step": step}


def _outcome(facts: Mapping[str, Any]) -> str:
    """The effect of the training, in words."""
    losses, validations, step = facts["losses"], facts["validations"], facts["step"]
    if not validations:
        return f"loss {losses[0]:.4f} -> {losses[-1]:.4f}"
    start_loss = validations[0]["loss"]
    if step == 0:
        return f"validation loss {start_loss:.4f} never fell: the weights are left as they were"
    best_loss = min(validation["loss"] for validation in validations)
    return f"validation loss {start_loss:.4f} -> {best_loss:.4f} after step {step}, which is kept"


class _Trainer(Trainer):  # type: ignore[misc]  # transformers is untyped
    """transformers' Trainer with our loss. It holds the trained weights; the loss holds the
    model."""

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        loss: TrainingLoss,
        weights: TrainedWeights,
        rows: CalibrationSet,
        validation: CalibrationSet | None,
        recipe: Train,
        states: Path,
    ) -> None:
        self.training_loss = loss
        self.max_rows = recipe.batch
        """Rows that are computed at once."""
        self.has_checkpointing = False
        """Whether layers are computed again in the backward pass."""
        self.step_batches = list[dict[str, Tensor]]()
        """The batches of the present step that have begun."""
        device = loss.model.device
        if device.type != "cpu":
            # The weights stay where they are. Else the Trainer would move them.
            weights.hf_device_map = {"": device}  # type: ignore[assignment]
        super().__init__(
            weights,
            _arguments(recipe, len(rows.rows), states, device, validation is not None),
            train_dataset=rows.rows,
            eval_dataset=validation and validation.rows,
            data_collator=_batch,
            compute_metrics=lambda evaluated: {"nll": float(evaluated.predictions.mean())},
        )
        self.accelerator.device_placement = False
        self.remove_callback(PrinterCallback)

    def get_batch_samples(
        self, iterator: Iterator[Any], number: int, device: Any
    ) -> tuple[list[Any], int]:
        """The batches of a step, and how many rows they have."""
        batches, _ = super().get_batch_samples(iterator, number, device)
        self.step_batches.clear()
        return batches, sum(len(batch["lengths"]) for batch in batches)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None
    ) -> Tensor:
        """Add the gradient of a batch to that of the step, and return its loss."""
        self.step_batches.append(inputs)
        batches = [inputs]
        losses = list[Tensor]()

        def add_gradients() -> None:
            losses.clear()
            for batch in batches:
                losses.append(self._add_gradient(model, batch, num_items_in_batch))

        tokens = inputs["ids"].shape[1]
        with accelerator.named_if_too_large(
            f"training on a row of {tokens} tokens", "lower train.seq_len"
        ):
            while not accelerator.fits(add_gradients, is_least=self._uses_least_memory()):
                self._use_less_memory()
                # The failed backward pass has left some gradients: the whole step begins again.
                batches = self.step_batches
        return losses[-1]

    def _add_gradient(self, model: nn.Module, batch: dict[str, Tensor], row_count: Any) -> Tensor:
        """Add the gradient of a batch, at most `max_rows` rows at once, and return its loss."""
        ids = torch.split(batch["ids"], self.max_rows)
        lengths = torch.split(batch["lengths"], self.max_rows)
        losses = []
        for some_ids, some_lengths in zip(ids, lengths, strict=True):
            some_rows = {"ids": some_ids, "lengths": some_lengths}
            losses.append(super().training_step(model, some_rows, row_count))
        return torch.stack(losses).sum()

    def _uses_least_memory(self) -> bool:
        return self.max_rows == 1 and self.has_checkpointing

    def _use_less_memory(self) -> None:
        """Compute half of the rows at once; if it is one row, compute layers again in the backward
        pass."""
        trained_model = self.training_loss.model
        for weight in (*self.model.parameters(), *trained_model.parameters()):
            weight.grad = None
        if self.max_rows > 1:
            self.max_rows = math.ceil(self.max_rows / 2)
            return
        self.has_checkpointing = True
        trained_model.gradient_checkpointing_enable({"use_reentrant": False})
        # transformers checkpoints only layers in training mode; their modules stay without dropout.
        for layer in decoder_layers(trained_model):
            layer.training = True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        loss, _ = self._losses(inputs, num_items_in_batch)
        return loss

    @torch.no_grad()
    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss and, twice, the text's NLL of a batch: as the Trainer's loss, predictions and
        labels."""
        loss, nll = self._losses(inputs, len(inputs["lengths"]))
        return loss, nll[None], nll[None]

    def _losses(self, inputs: dict[str, Tensor], row_count: float) -> tuple[Tensor, Tensor]:
        self.model.copy_to_model_()
        loss, nll = self.training_loss(inputs["ids"], inputs["lengths"], row_count)
        if not math.isfinite(loss.detach()):
            raise NonFiniteLossError(
                f"training diverged: the loss of step {self.state.global_step + 1} is {loss:f};"
                " lower train.learning_rate"
            )
        return loss.cpu(), nll.cpu()


def _arguments(
    recipe: Train, row_count: int, states: Path, device: torch.device, has_validation: bool
) -> TrainingArguments:
    batches = math.ceil(row_count / recipe.batch)
    steps = recipe.epochs * math.ceil(batches / recipe.accumulation)
    return TrainingArguments(
        output_dir=str(states),
        per_device_train_batch_size=recipe.batch,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=recipe.accumulation,
        num_train_epochs=recipe.epochs,
        seed=recipe.seed,
        data_seed=recipe.seed,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=round(recipe.warmup * steps),
        optim="adamw_torch" if device.type == "cpu" else "adamw_torch_fused",
        eval_strategy="steps" if has_validation else "no",
        eval_steps=recipe.validate_every,
        save_strategy="no",  # `_StatesCallback` asks for states
        logging_steps=1,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=False,
        use_cpu=True,  # else it would copy the weights to all GPUs
    )


class _ProgressCallback(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Reports each step."""

    def __init__(self, observer: Observer, resumed_state: Path | None) -> None:
        self.observer = observer
        self.resumed_state = resumed_state
        self.start_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.start_step = state.global_step
        if self.resumed_state:
            self.observer.note(
                f"training goes on after step {self.start_step}, from {self.resumed_state}"
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            steps = state.global_step - self.start_step
            total = state.max_steps - self.start_step
            detail = f"step {state.global_step}, loss {logs['loss']:.4f}"
            self.observer.advance(steps, total, detail)


class _StatesCallback(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Keeps the best weights, saves a state from time to time, and saves and validates the last
    one."""

    def __init__(self, weights: TrainedWeights, states: Path, start_loss: float) -> None:
        self.weights = weights
        self.states = states
        self.best_loss = start_loss
        self.save_began = 0.0
        self.next_save = time.monotonic() + SAVE_SECONDS

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # The log of a state has the validations before it.
        for entry in state.log_history:
            self.best_loss = min(self.best_loss, entry.get("eval_loss", math.inf))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.save_began = time.monotonic()
        is_end = state.global_step == state.max_steps
        control.should_save = is_end or self.save_began >= self.next_save
        if control.should_save:
            drop_old_states(self.states)
        if is_end:
            control.should_evaluate = args.eval_strategy != "no"

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any
    ) -> None:
        self.save_began = time.monotonic()
        if metrics["eval_loss"] < self.best_loss:
            self.best_loss = metrics["eval_loss"]
            facts = {"step": str(state.global_step)}
            write_tensors(self.states / BEST, self.weights.state_dict(), facts)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        seal_state(self.states, state.global_step)
        save_seconds = time.monotonic() - self.save_began
        seconds_until_next = max(SAVE_SECONDS, SAVE_COST_FACTOR * save_seconds)
        self.next_save = time.monotonic() + seconds_until_next


def _batch(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Rows padded to the longest, `ids` [B, T], and their `lengths` [B]."""
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return {"ids": ids, "lengths": torch.tensor([len(row) for row in rows])}


def _cast_(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast the parameters alone. Rotary tables stay float32, as in a model loaded from its file."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
