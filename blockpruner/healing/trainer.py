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

If a device's memory is full, fewer rows are computed at once, then layers again in the backward
pass (gradient checkpointing), and the step begins again. Several processes (`team`) try this before
the first step, on the longest rows.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
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
from blockpruner.model.process_group import SINGLE_PROCESS, ProcessGroup
from blockpruner.store.files import writing
from blockpruner.store.tensors import read_tensors, write_tensors

SECONDS, SHARE = 60.0, 50
"""Time between two checkpoints: at least 60 seconds, and 50 times as long as one takes to write."""


def train_(
    model: PreTrainedModel,
    rows: CalibrationSet,
    recipe: Train,
    *,
    teacher: PreTrainedModel | None,
    validation: CalibrationSet | None,
    states: Path,
    observer: Observer,
    team: ProcessGroup = SINGLE_PROCESS,
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
            last two are left. Each process of a team has its own.
        team: the processes that train together, each with the same model, teacher and rows on its
            device.

    Returns facts as JSON, in nats per token: `losses`, of each step before it was taken;
    `validations`, before training, during it and at the end ({step, loss, nll}, nll of the text);
    `step`, after which the weights are kept, 0 for those before training. Raises
    NonFiniteLossError if training diverges, and DeviceMemoryError.
    """
    dtype = model.dtype
    if dtype is torch.float16:
        _cast_(model, torch.float32)
    model.eval()
    weights = trained_weights_(model, recipe, team)
    with torch.random.fork_rng(devices=[]), writing(states):
        trainer = _Trainer(
            model, teacher if recipe.distill else None, weights, rows, validation, recipe, states
        )
        start_metrics = {} if validation is None else trainer.evaluate()
        trainer.rehearse()
        untrained = {
            name: master.detach().clone().cpu() for name, master in weights.state_dict().items()
        }
        state = last_state(states, team, observer.note)
        observer.begin("train")
        start_loss = start_metrics.get("eval_loss", math.inf)
        trainer.add_callback(_Watch(observer, state, weights, states, start_loss, team))
        trainer.train(resume_from_checkpoint=state and str(state))
    log = trainer.state.log_history
    losses = [entry["loss"] for entry in log if "loss" in entry]
    validations = [
        {"step": entry["step"], "loss": entry["eval_loss"], "nll": entry["eval_nll"]}
        for entry in (start_metrics | {"step": 0}, *log)
        if "eval_loss" in entry
    ]
    step = len(losses)
    if validations:
        step = min(validations, key=lambda entry: entry["loss"])["step"]
        best_weights = untrained
        # On a GPU, steps that are taken again may lead elsewhere: what counts is in the file.
        if step:
            best_weights, best_facts = read_tensors(states / BEST)
            step = int(best_facts["step"])
        weights.load_state_dict(best_weights)
    weights.show_()
    weights.end_()
    if dtype is torch.float16:
        _cast_(model, dtype)
    model.requires_grad_(False)
    outcome = _outcome(losses, validations, step)
    observer.end(f"{len(losses)} steps over {len(rows.rows)} rows; {outcome}")
    return {"losses": losses, "validations": validations, "step": step}


def _outcome(losses: Sequence[float], validations: Sequence[Mapping[str, float]], step: int) -> str:
    """What training came to, in words."""
    if not validations:
        return f"loss {losses[0]:.4f} -> {losses[-1]:.4f}"
    start_loss = validations[0]["loss"]
    if step == 0:
        return f"validation loss {start_loss:.4f} never fell: the weights are left as they were"
    best_loss = min(entry["loss"] for entry in validations)
    return f"validation loss {start_loss:.4f} -> {best_loss:.4f} after step {step}, which is kept"


class _Trainer(Trainer):  # type: ignore[misc]  # transformers is untyped
    """transformers' Trainer with our loss. It holds the trained weights; the loss holds the
    model."""

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel | None,
        weights: TrainedWeights,
        rows: CalibrationSet,
        validation: CalibrationSet | None,
        recipe: Train,
        states: Path,
    ) -> None:
        self.objective = TrainingLoss(model, teacher, recipe)
        self.team = weights.team
        self.max_rows = recipe.batch
        """Rows that are computed at once."""
        self.is_checkpointing = False
        """Whether layers are computed again in the backward pass."""
        self.step_inputs = list[dict[str, Tensor]]()
        """The batches of the present step that have begun."""
        self.step_batches = 0
        """How many batches the present step has."""
        self.step_loss = 0.0
        """The loss of this process's batches of the present step."""
        is_cpu = model.device.type == "cpu"
        batches = math.ceil(len(rows.rows) / recipe.batch)
        steps = recipe.epochs * math.ceil(batches / recipe.accumulation)
        arguments = TrainingArguments(
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
            optim="adamw_torch" if is_cpu else "adamw_torch_fused",
            eval_strategy="no" if validation is None else "steps",
            eval_steps=recipe.validate_every,
            save_strategy="no",  # `_Watch` asks for states
            logging_steps=1,
            logging_nan_inf_filter=False,
            remove_unused_columns=False,
            disable_tqdm=True,
            report_to="none",
            dataloader_pin_memory=False,
            # The weights stay where they are. Else it would move them, or copy them to all GPUs.
            use_cpu=True,
        )
        if not is_cpu:
            weights.hf_device_map = {"": model.device}  # type: ignore[assignment]
        super().__init__(
            weights,
            arguments,
            train_dataset=rows.rows,
            eval_dataset=validation and validation.rows,
            data_collator=_batch,
            compute_metrics=lambda evaluated: {"nll": float(evaluated.predictions.mean())},
        )
        self.accelerator.device_placement = False
        if self.team.count > 1:
            self.accelerator.clip_grad_norm_ = self._clip
        self.remove_callback(PrinterCallback)

    def get_batch_samples(
        self, iterator: Iterator[Any], number: int, device: Any
    ) -> tuple[list[Any], int]:
        """The batches of a step, and how many rows they have."""
        batches, _ = super().get_batch_samples(iterator, number, device)
        self.step_inputs.clear()
        self.step_batches = len(batches)
        return batches, sum(len(batch["lengths"]) for batch in batches)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None
    ) -> Tensor:
        """Add the gradient of a batch, and return its loss. Each process of a team has its share of
        a step's batches; the last batch returns the loss of all."""
        self.step_inputs.append(inputs)
        count, rank = self.team.count, self.team.rank
        if count == 1:
            return self._gradient(model, self.step_inputs, num_items_in_batch)
        begun = len(self.step_inputs)
        is_end = begun == self.step_batches
        if (begun - 1) % count == rank:
            self.step_loss += float(self._gradient(model, [inputs], num_items_in_batch))
        elif is_end and begun % count and rank >= begun % count:
            # Other processes have one batch more, and wait for the sums of gradients. Divided by
            # infinity this one adds nothing.
            self._gradient(model, [inputs], math.inf)
        if not is_end:
            return torch.zeros(())
        step_loss = self.team.all_reduce(self.step_loss)
        self.step_loss = 0.0
        return torch.tensor(step_loss)

    def rehearse(self) -> None:
        """Agree on one batch size for all processes of a team: on the longest rows, whose gradient
        nobody uses."""
        if self.team.count == 1:
            return
        longest = sorted(self.train_dataset, key=len)[-self.max_rows :]
        self.model.closed = True
        self._gradient(self.model, [_batch(longest)], math.inf)
        self.model.closed = False
        self._clear_gradients()
        self.max_rows = round(self.team.all_reduce(self.max_rows, distributed.ReduceOp.MIN))
        if self.team.all_reduce(self.is_checkpointing) and not self.is_checkpointing:
            self._checkpoint_layers_()

    def _gradient(self, model: nn.Module, batches: list[dict[str, Tensor]], count: Any) -> Tensor:
        """Add the gradient of the last of these batches, and return its loss.

        If the device's memory is full, all batches begin again with smaller parts. A team's cannot:
        other processes wait for the sums of gradients."""
        newest = batches[-1]
        todo = [newest]
        losses = list[Tensor]()
        has_fixed_size = self.team.count > 1 and not self.model.closed

        def compute() -> None:
            losses.clear()
            for batch in todo:
                for part in self._parts(batch):
                    losses.append(super(_Trainer, self).training_step(model, part, count))

        def is_smallest() -> bool:
            return has_fixed_size or (self.max_rows == 1 and self.is_checkpointing)

        tokens = newest["ids"].shape[1]
        with accelerator.named_if_too_large(
            f"training on a row of {tokens} tokens", "lower train.seq_len"
        ):
            while not accelerator.fits(compute, is_least=is_smallest()):
                self._clear_gradients()
                todo = batches
                if self.max_rows > 1:
                    self.max_rows = math.ceil(self.max_rows / 2)
                else:
                    self._checkpoint_layers_()
        return torch.stack(losses[-len(self._parts(newest)) :]).sum()

    def _checkpoint_layers_(self) -> None:
        """Compute layers again in the backward pass. transformers does so only for layers in
        training mode; their modules stay without dropout."""
        self.is_checkpointing = True
        self.objective.model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in decoder_layers(self.objective.model):
            layer.training = True

    def _clear_gradients(self) -> None:
        for weight in (*self.model.parameters(), *self.objective.model.parameters()):
            weight.grad = None

    def _clip(self, parameters: Any, max_norm: float, *_: Any) -> Tensor:
        """Clip a team's gradients to the norm that the gradients of all processes have together."""
        gradients = [weight.grad for weight in parameters if weight.grad is not None]
        squares = sum(float(gradient.double().square().sum()) for gradient in gradients)
        norm = math.sqrt(self.team.all_reduce(squares))
        for gradient in gradients:
            gradient.mul_(min(1.0, max_norm / (norm + 1e-6)))
        return torch.tensor(norm)

    def _parts(self, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """A batch in parts of at most `max_rows` rows."""
        ids = torch.split(batch["ids"], self.max_rows)
        lengths = torch.split(batch["lengths"], self.max_rows)
        return [
            {"ids": some_ids, "lengths": some_lengths}
            for some_ids, some_lengths in zip(ids, lengths, strict=True)
        ]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        return self._losses(inputs, num_items_in_batch)[0]

    @torch.no_grad()
    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss and the text's NLL of a batch, the mean over a team's processes."""
        means = []
        for value in self._losses(inputs, len(inputs["lengths"])):
            total = self.team.all_reduce(float(value / self.team.count))
            means.append(torch.tensor(total, dtype=value.dtype))
        loss, nll = means
        return loss, nll[None], nll[None]

    def _losses(self, inputs: dict[str, Tensor], count: float) -> tuple[Tensor, Tensor]:
        self.model.show_()
        loss, nll = self.objective(inputs["ids"], inputs["lengths"], count)
        if not math.isfinite(loss.detach()):
            raise NonFiniteLossError(
                f"training diverged: the loss of step {self.state.global_step + 1} is {loss:f};"
                " lower train.learning_rate"
            )
        return loss.cpu(), nll.cpu()


class _Watch(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Reports progress, keeps the best weights, saves a state from time to time, and saves and
    validates the last one."""

    def __init__(
        self,
        observer: Observer,
        resumed_state: Path | None,
        weights: TrainedWeights,
        states: Path,
        least_loss: float,
        team: ProcessGroup,
    ) -> None:
        self.observer = observer
        self.resumed_state = resumed_state
        self.weights = weights
        self.states = states
        self.least_loss = least_loss
        self.team = team
        self.start_step = 0
        self.save_began = 0.0
        self.next_save = time.monotonic() + SECONDS

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.start_step = state.global_step
        for entry in state.log_history:
            self.least_loss = min(self.least_loss, entry.get("eval_loss", math.inf))
        if self.resumed_state:
            self.observer.note(
                f"training goes on after step {self.start_step}, from {self.resumed_state}"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.save_began = time.monotonic()
        is_end = state.global_step == state.max_steps
        # The clock of the first process decides for all of a team.
        is_due = self.team.rank == 0 and self.save_began >= self.next_save
        control.should_save = is_end or self.team.all_reduce(is_due) > 0
        if control.should_save:
            drop_old_states(self.states)
        if is_end:
            control.should_evaluate = args.eval_strategy != "no"

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any
    ) -> None:
        self.save_began = time.monotonic()
        if metrics["eval_loss"] < self.least_loss:
            self.least_loss = metrics["eval_loss"]
            facts = {"step": str(state.global_step)}
            write_tensors(self.states / BEST, self.weights.state_dict(), facts)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        seal_state(self.states, state.global_step)
        save_seconds = time.monotonic() - self.save_began
        self.next_save = time.monotonic() + max(SECONDS, SHARE * save_seconds)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            steps, total = state.global_step - self.start_step, state.max_steps - self.start_step
            detail = f"step {state.global_step}, loss {logs['loss']:.4f}"
            self.observer.advance(steps, total, detail)


def _batch(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return {"ids": ids, "lengths": torch.tensor([len(row) for row in rows])}


def _cast_(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast the parameters alone. Rotary tables stay float32, as in a model loaded from its file."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
