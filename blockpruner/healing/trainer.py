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

Where a device's memory ends, fewer rows are computed at once, then layers anew in the backward
pass, and the step begins again. Several processes (`team`) find out before the first step, on the
longest rows.
"""

import math
import time
from collections.abc import Iterator, Sequence
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
"""The least time between two checkpoints, and how many times that of writing one it is."""


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
    `validations`, before training, during it and in the end ({step, loss, nll}, nll of the text);
    `step`, after which the weights are kept, 0 if they are left as they were. Raises
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
        start = {} if validation is None else trainer.evaluate()
        trainer.rehearse()
        before = {
            name: master.detach().clone().cpu() for name, master in weights.state_dict().items()
        }
        last = last_state(states, team, observer.note)
        observer.begin("train")
        trainer.add_callback(
            _Watch(observer, last, weights, states, start.get("eval_loss", math.inf), team)
        )
        trainer.train(resume_from_checkpoint=last and str(last))
    log = trainer.state.log_history
    losses = [entry["loss"] for entry in log if "loss" in entry]
    curve = [
        {"step": each["step"], "loss": each["eval_loss"], "nll": each["eval_nll"]}
        for each in (start | {"step": 0}, *log)
        if "eval_loss" in each
    ]
    step = min(curve, key=lambda each: each["loss"])["step"] if curve else len(losses)
    if curve:
        best_weights = before
        # on a GPU, steps that are taken again may lead elsewhere: what counts is in the file
        if step:
            best_weights, facts = read_tensors(states / BEST)
            step = int(facts["step"])
        weights.load_state_dict(best_weights)
    weights.show_()
    weights.end_()
    if dtype is torch.float16:
        _cast_(model, dtype)
    model.requires_grad_(False)
    if not curve:
        text = f"loss {losses[0]:.4f} -> {losses[-1]:.4f}"
    elif step == 0:
        text = (
            f"validation loss {curve[0]['loss']:.4f} never fell: the weights are left as they were"
        )
    else:
        best = min(each["loss"] for each in curve)
        text = (
            f"validation loss {curve[0]['loss']:.4f} -> {best:.4f} after step {step}, which is kept"
        )
    observer.end(f"{len(losses)} steps over {len(rows.rows)} rows; {text}")
    return {"losses": losses, "validations": curve, "step": step}


class _Trainer(Trainer):  # type: ignore[misc]  # transformers is untyped
    """transformers' Trainer with our loss. It holds the trained weights; the model is the
    loss's."""

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
        steps = recipe.epochs * math.ceil(
            math.ceil(len(rows.rows) / recipe.batch) / recipe.accumulation
        )
        self.objective, self.team = TrainingLoss(model, teacher, recipe), weights.team
        self.most, self.again, self.begun, self.todo, self.lost = (
            recipe.batch,
            False,
            list[dict[str, Tensor]](),
            0,
            0.0,
        )
        is_cpu = model.device.type == "cpu"
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
            # the weights stay where they are; it would move them, or copy them to all GPUs
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
            compute_metrics=lambda found: {"nll": float(found.predictions.mean())},
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
        self.begun.clear()
        self.todo = len(batches)
        return batches, sum(len(batch["lengths"]) for batch in batches)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None
    ) -> Tensor:
        """The gradient of a batch. Of a team each process has its share of a step's batches, and
        the last one of them gives the loss of all."""
        self.begun.append(inputs)
        if self.team.count == 1:
            return self._gradient(model, self.begun, num_items_in_batch)
        done, found, team = len(self.begun), torch.zeros(()), self.team
        if (done - 1) % team.count == team.rank:
            found = self._gradient(model, [inputs], num_items_in_batch)
            self.lost += float(found)
        elif done == self.todo and done % team.count and team.rank >= done % team.count:
            # others have one batch more, and wait for the sums of gradients
            self._gradient(model, [inputs], math.inf)
        if done < self.todo:
            return torch.zeros(())
        mine, self.lost = self.lost, 0.0
        return torch.tensor(team.all_reduce(mine))

    def rehearse(self) -> None:
        """Have all processes of a team take parts of one size: on the longest rows, whose gradient
        nobody uses."""
        if self.team.count == 1:
            return
        longest = sorted(self.train_dataset, key=len)[-self.most :]
        self.model.closed = True
        self._gradient(self.model, [_batch(longest)], math.inf)
        self.model.closed = False
        self._clear()
        self.most = round(self.team.all_reduce(self.most, distributed.ReduceOp.MIN))
        if self.team.all_reduce(self.again) and not self.again:
            self._compute_again_()

    def _gradient(self, model: nn.Module, batches: list[dict[str, Tensor]], count: Any) -> Tensor:
        """The gradient of the last of these batches, in as many parts as the device's memory asks
        for. Where it ends, those of all of them begin again, but for a team's: others wait for sums
        of gradients that this one gave."""
        todo, losses, last = batches[-1:], list[Tensor](), batches[-1]
        is_fixed = self.team.count > 1 and not self.model.closed

        def work() -> None:
            losses[:] = [
                super(_Trainer, self).training_step(model, part, count)
                for part in self._parts(todo)
            ]

        with accelerator.named_if_too_large(
            f"training on a row of {last['ids'].shape[1]} tokens", "lower train.seq_len"
        ):
            while not accelerator.fits(work, is_least=is_fixed or (self.most == 1 and self.again)):
                self._clear()
                todo = batches
                if self.most > 1:
                    self.most = -(-self.most // 2)
                else:
                    self._compute_again_()
        return torch.stack(losses[-len(self._parts([last])) :]).sum()

    def _compute_again_(self) -> None:
        """Have layers computed anew in the backward pass: only those in training are; what is in
        them stays without dropout."""
        self.again = True
        self.objective.model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in decoder_layers(self.objective.model):
            layer.training = True

    def _clear(self) -> None:
        for weight in (*self.model.parameters(), *self.objective.model.parameters()):
            weight.grad = None

    def _clip(self, parameters: Any, most: float, *_: Any) -> Tensor:
        """Clip a team's gradients to the norm that all their parts have together."""
        gradients = [weight.grad for weight in parameters if weight.grad is not None]
        norm = math.sqrt(
            self.team.all_reduce(sum(float(each.double().square().sum()) for each in gradients))
        )
        for each in gradients:
            each.mul_(min(1.0, most / (norm + 1e-6)))
        return torch.tensor(norm)

    def _parts(self, batches: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """The batches in parts of at most `most` rows."""
        return [
            dict(zip(batch, pair, strict=True))
            for batch in batches
            for pair in zip(
                *(torch.split(values, self.most) for values in batch.values()), strict=True
            )
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
        loss, nll = (
            each / self.team.count for each in self._losses(inputs, len(inputs["lengths"]))
        )
        loss, nll = (
            torch.tensor(self.team.all_reduce(float(each)), dtype=each.dtype)
            for each in (loss, nll)
        )
        return loss, nll[None], nll[None]

    def _losses(self, inputs: dict[str, Tensor], count: float) -> tuple[Tensor, Tensor]:
        self.model.show_()
        loss, nll = self.objective(inputs["ids"], inputs["lengths"], count)
        if not math.isfinite(loss.detach()):
            what = f"loss of step {self.state.global_step + 1}"
            raise NonFiniteLossError(
                f"training diverged: the {what} is {loss:f}; lower train.learning_rate"
            )
        return loss.cpu(), nll.cpu()


class _Watch(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Reports progress, keeps the best weights, and has states saved from time to time, and the
    last one validated."""

    def __init__(
        self,
        observer: Observer,
        last: Path | None,
        weights: TrainedWeights,
        states: Path,
        least: float,
        team: ProcessGroup,
    ) -> None:
        self.observer, self.last, self.weights, self.states, self.least = (
            observer,
            last,
            weights,
            states,
            least,
        )
        self.team = team
        self.first, self.began, self.next = 0, 0.0, time.monotonic() + SECONDS

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.first = state.global_step
        self.least = min(
            [self.least, *(each["eval_loss"] for each in state.log_history if "eval_loss" in each)]
        )
        if self.last:
            self.observer.note(f"training goes on after step {self.first}, from {self.last}")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began, is_last = time.monotonic(), state.global_step == state.max_steps
        control.should_save = (
            is_last or self.team.all_reduce(self.team.rank == 0 and self.began >= self.next) > 0
        )
        if control.should_save:
            drop_old_states(self.states)
        if is_last:
            control.should_evaluate = args.eval_strategy != "no"

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any
    ) -> None:
        self.began = time.monotonic()
        if metrics["eval_loss"] < self.least:
            self.least = metrics["eval_loss"]
            write_tensors(
                self.states / BEST, self.weights.state_dict(), {"step": str(state.global_step)}
            )

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        seal_state(self.states, state.global_step)
        self.next = time.monotonic() + max(SECONDS, SHARE * (time.monotonic() - self.began))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            done, detail = state.global_step, f"step {state.global_step}, loss {logs['loss']:.4f}"
            self.observer.advance(done - self.first, state.max_steps - self.first, detail)


def _batch(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return {"ids": ids, "lengths": torch.tensor([len(row) for row in rows])}


def _cast_(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast the parameters alone. Rotary tables stay float32, as in a model loaded from its file."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
