"""The scoring engine: losses of a model under many masks. The shared part of their forward passes
is computed once.

Decides the arithmetic. The decoder is walked once for all masks (`walk`), with a hidden state as
the state. Each mask sees the same operations as in a full forward pass, so its loss is equal to
rounding; a branch takes one extra hidden state of memory. On a GPU several masks go along at once
where rows are few and short. Which masks are scored, and what is done with the values, is decided
by the caller.
"""

import gc
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blockpruner.core.blocks import DENSE, BlockId, Mask
from blockpruner.core.errors import DeviceMemoryError, NonFiniteLossError
from blockpruner.model import accelerator
from blockpruner.model.models import placement, room_beside
from blockpruner.scoring.batches import Batch
from blockpruner.scoring.forward import Forward, LayerKwargs, joined
from blockpruner.scoring.metrics import Metric
from blockpruner.scoring.walk import walk
from blockpruner.scoring.work import (
    Rows,
    ScoredRows,
    Span,
    Task,
    inner_size,
    live_numbers,
    logits_bytes,
    row_batches,
)
from blockpruner.store.provenance import computing, processor
from blockpruner.store.trials import Origin

KEEP_DENSE_STATES = Metric("reference", "", title="", formula="")
"""Marks the tasks that the engine adds: they compute no loss, and keep the dense model's final
states for metrics that compare with them (`Metric.reference`)."""

DENSE_SHARE = 16
"""The dense model's final states stay on the device up to 1 / DENSE_SHARE of its memory."""

WIDE_NUMBERS = 2**22
"""On a GPU, masks are taken along at once up to this many numbers of their states. A kernel over
these takes longer than its launch (calculated, not measured)."""

CPU_BATCH_TOKENS = 1024
GPU_BATCH_TOKENS = (2048, 65536)
"""The least and the most tokens of a batch that batch_tokens: auto takes."""


@dataclass(frozen=True)
class Unread:
    """Losses that a device may still be computing."""

    masks: Sequence[Mask]
    sums: Tensor
    """[B] float64 on the CPU: the sum over a row's targets."""
    counts: Tensor
    """[B]: the number of a row's targets."""
    ready: torch.Event | None
    """The arrival of the sums; None on a CPU."""

    def means(self) -> list[float]:
        if self.ready is not None:
            self.ready.synchronize()
        row_means = self.sums / self.counts
        return cast(list[float], row_means.tolist())


class Engine(Forward):
    """Scores masks of a model, exactly.

    `batch_tokens` are the padded tokens of a batch of rows. "auto" is 1,024 on a CPU, and what the
    device's memory holds on a GPU, at most 65,536.
    """

    limit: int | None
    """No batch has more tokens than this; None: the memory alone decides."""
    growth: float
    """As in `work.row_batches`."""
    _streaming_fix = "set runtime.streaming: true, "

    def __init__(self, model: PreTrainedModel, batch_tokens: int | str = "auto") -> None:
        super().__init__(model)
        self._set_batch_tokens(batch_tokens)
        # The dense model's final states by row. Its logits are computed from them again: a state
        # has H numbers a token, logits have V.
        self._dense: dict[tuple[int, ...], Tensor] = {}

    def row_batches(self, rows: Rows, span: Span) -> list[Span]:
        """Group neighbouring rows so that the padded tokens of a group stay within the batch
        budget."""
        return row_batches(rows, span, self.batch_tokens, self.growth)

    @property
    def batch_tokens(self) -> int:
        if self.limit is None:
            return self._batch_tokens
        return min(self._batch_tokens, self.limit)

    def origin(self) -> Origin:
        device = accelerator.name(self.home) if self._on_gpu else processor()
        return {
            **computing(),
            "device": device,
            "attention": str(placement(self.model)["attention"]),
            "batch_tokens": self.batch_tokens,
        }

    def run(self, tasks: Sequence[Task], rows: Rows) -> Iterator[ScoredRows]:
        """Yield the values of each task, in the order in which the walk reaches them; those before
        an error are good.

        If the rows of a task do not fit into the device's memory, its finished masks are kept and
        the rest is halved; later batches are smaller too. Raises DeviceMemoryError if not even one
        row fits, and NonFiniteLossError for a loss of the dense model.
        """
        waiting = self.referenced(tasks, rows)
        while waiting:
            task = waiting.pop(0)
            done: set[Mask] = set()
            reason = ""
            try:
                for scored in self.score(task, rows):
                    done.add(scored.mask)
                    yield scored
            except RuntimeError as error:
                if not accelerator.is_out_of_memory(error):
                    raise
                reason = str(error).partition(". ")[0]
            # Not in the handler: its traceback keeps the tensors of the failed walk alive.
            if reason:
                masks = tuple(mask for mask in task.masks if mask not in done)
                unfinished = replace(task, masks=masks)
                halves = self._halved(unfinished, rows, reason)
                waiting = self._in_batches(halves + waiting, rows)

    def referenced(self, tasks: Sequence[Task], rows: Rows) -> list[Task]:
        """Return the tasks, after those that keep the states with which their losses compare."""
        spans = dict.fromkeys(task.span for task in tasks if task.metric.reference)
        references = []
        for span in spans:
            is_held = all(tuple(rows[row]) in self._dense for row in span)
            if not is_held:
                references.append(Task(span, (DENSE,), KEEP_DENSE_STATES))
        return [*references, *tasks]

    def close(self) -> None:
        """Nothing to give back."""

    def _in_batches(self, tasks: Iterable[Task], rows: Rows) -> list[Task]:
        batches = []
        for task in tasks:
            for span in self.row_batches(rows, task.span):
                batches.append(replace(task, span=span))
        return batches

    def _halved(self, task: Task, rows: Rows, reason: str) -> list[Task]:
        """Split a task that did not fit into tasks that may."""
        span = task.span
        longest = max(len(rows[row]) for row in span)
        padded_tokens = len(span) * longest
        # Several masks at once are given up before rows are split.
        if self._width(padded_tokens) > 1:
            self._batch_tokens = padded_tokens
            return [task]
        if len(span) == 1:
            # An influence is not streamed, so streaming would not help it.
            streaming = "" if task.metric.influence else self._streaming_fix
            raise DeviceMemoryError(
                f"one row of {longest} tokens does not fit into the device's memory beside the"
                f" model ({reason}); lower calibration.seq_len, {streaming}or use a larger device."
                " Trials finished before are kept"
            )
        self._dense = {row: states.cpu() for row, states in self._dense.items()}
        gc.collect()
        accelerator.empty_cache()
        middle = len(span) // 2
        self._batch_tokens = min(self._batch_tokens, longest * middle)
        return [replace(task, span=half) for half in (span[:middle], span[middle:])]

    @torch.inference_mode()
    def score(self, task: Task, rows: Rows) -> Iterator[ScoredRows]:
        """Yield the values of a task from one walk, with its rows as one batch."""
        batch_rows = [rows[row] for row in task.span]
        batch = Batch.of(batch_rows, self.home)
        embedded, layer_kwargs = self.prepare(batch.input_ids)
        if task.metric.influence:
            yield from self._influences(task, embedded, batch, layer_kwargs)
            return
        width = self._width(batch.input_ids.numel())
        run = partial(self._added, batch, layer_kwargs, width)
        leaves = walk(self.steps, task.masks, embedded, run, joined, width)
        launched = (
            self._start_losses(masks, hidden, batch, task, rows) for masks, hidden in leaves
        )
        yield from self._values(launched, task)

    def _width(self, tokens: int) -> int:
        """The number of masks that go along at once with a batch of `tokens` padded tokens."""
        # On a CPU, several masks at once would move bits.
        if not self._on_gpu:
            return 1
        wide_tokens = WIDE_NUMBERS // int(self.model.config.hidden_size)
        budget = min(wide_tokens, self.batch_tokens)
        return max(1, budget // tokens)

    def _added(
        self,
        batch: Batch,
        layer_kwargs: LayerKwargs,
        width: int,
        block: BlockId,
        states: Sequence[Tensor],
    ) -> Sequence[Tensor]:
        """What a block adds to each of some states of the batch, computed in one call."""
        inputs = list(states)
        if self._on_gpu:
            # The bits may depend on the number of states, so a call always has `width`.
            inputs += [states[-1]] * (width - len(states))
        if len(inputs) == 1:
            return [self.run_block(block, inputs[0], layer_kwargs, batch.packed)]
        device = self.device_of(block.layer)
        stacked = torch.cat([state.to(device) for state in inputs])
        packed = batch.repeated(len(inputs))
        added = self.run_block(block, stacked, layer_kwargs, packed)
        added_by_state = torch.split(added, len(batch.input_ids))
        return added_by_state[: len(states)]

    def _start_losses(
        self, masks: Sequence[Mask], hidden: Tensor, batch: Batch, task: Task, rows: Rows
    ) -> Unread:
        """Start to compute the losses of masks, from the stream `hidden` behind their last block.

        A GPU computes them while the next masks are on their way: the sums are copied to the CPU
        without waiting, and `Unread.means` waits for the copy.
        """
        keys = [tuple(rows[row]) for row in task.span]
        states = self.final_states(hidden, batch)
        if task.metric == KEEP_DENSE_STATES:
            self._keep_dense_states(keys, states, batch)
            # Such a task has no mask to report.
            return Unread((), torch.zeros(len(keys)), batch.counts, None)
        dense_states = None
        # KL and JS divergence need the dense model's prediction of the same tokens.
        if task.metric.reference:
            device = self._dense[keys[0]].device
            dense_states = torch.cat([self._dense[key].to(device) for key in keys])
        sums = self.row_losses(states, dense_states, batch, task.metric)
        sums_on_cpu = sums.to("cpu", non_blocking=True)
        arrival = accelerator.mark(sums.device)
        return Unread(masks, sums_on_cpu, batch.counts, arrival)

    def _keep_dense_states(
        self, keys: Sequence[tuple[int, ...]], states: Tensor, batch: Batch
    ) -> None:
        size = states.nbytes
        for dense_states in self._dense.values():
            if dense_states.device == self.home:
                size += dense_states.nbytes
        if self.room is None or size > self.room // DENSE_SHARE:
            states = states.cpu()
        row_states = torch.split(states, batch.counts.tolist())
        self._dense.update(zip(keys, row_states, strict=True))

    def _values(self, launched: Iterable[Unread], task: Task) -> Iterator[ScoredRows]:
        """Read the values, on a GPU with a delay of one launch for each device."""
        # A CPU computes nothing meanwhile, so its values are read at once: a kill loses the unread
        # ones.
        if self._on_gpu:
            devices = {self.device_of(layer) for layer in range(len(self.layers))}
            launched = late(launched, len(devices))
        for unread in launched:
            values = unread.means()
            for mask in unread.masks:
                yield self._finite(mask, values, task)

    def _finite(self, mask: Mask, values: Sequence[float], task: Task) -> ScoredRows:
        """The values, infinite where a mask makes the model overflow: a search then never chooses
        it."""
        # An influence is computed with only the base removed.
        removed = task.base if task.metric.influence else mask
        losses = []
        for row, value in zip(task.span, values, strict=True):
            is_finite = math.isfinite(value)
            if removed == DENSE and not is_finite:
                raise NonFiniteLossError(
                    f"the loss of row {row} is {value} in the dense model; try a"
                    " wider dtype (model.dtype: float32), or leave the row out of the calibration"
                    " set. Trials finished before are kept"
                )
            losses.append(value if is_finite else math.inf)
        return ScoredRows(mask, task.span, tuple(losses))

    def _influences(
        self, task: Task, hidden: Tensor, batch: Batch, layer_kwargs: LayerKwargs
    ) -> Iterator[ScoredRows]:
        """Yield the influence of each unit, after its last layer, from one pass without
        `task.base`."""
        influence = task.metric.compute
        wide_dtype = torch.promote_types(hidden.dtype, torch.float32)
        units = {}
        for mask in task.masks:
            blocks = mask - task.base
            units[mask] = sorted(blocks, key=lambda block: (block.layer, block.order))
        inputs: dict[BlockId, Tensor] = {}
        outputs: dict[BlockId, Tensor] = {}
        for layer in range(len(self.layers)):
            for step in self.steps_of_layer(layer):
                live_blocks = [block for block in step if block not in task.base]
                for block in live_blocks:
                    inputs[block] = hidden
                    outputs[block] = self.run_block(block, hidden, layer_kwargs, batch.packed)
                hidden = joined(hidden, [outputs[block] for block in live_blocks])
            complete = [mask for mask, unit in units.items() if unit[-1].layer == layer]
            for mask in complete:
                unit = units.pop(mask)
                # The unit takes x to x + f, where f is the sum of what its blocks add.
                added = outputs[unit[0]].to(wide_dtype)
                for block in unit[1:]:
                    added = added + outputs[block].to(added)
                unit_input = inputs[unit[0]].to(added)
                is_real = batch.is_real.to(added.device)
                values = influence(unit_input, added, is_real)
                yield self._finite(mask, values.tolist(), task)
            # States are freed as soon as no unit under way begins at them.
            oldest = min((unit[0].layer for unit in units.values()), default=len(self.layers))
            for block in list(inputs):
                if block.layer < oldest:
                    del inputs[block]
                    del outputs[block]

    def row_losses(
        self, states: Tensor, dense: Tensor | None, batch: Batch, metric: Metric
    ) -> Tensor:
        """The sum of each row's losses over its targets, [B] float64.

        The states are final ones of the masked and of the dense model, [N, H], the latter only
        where the metric compares with it. Logits are made in chunks of tokens.
        """
        compute_loss = metric.compute
        # The logits of a token are V numbers in float32.
        token_bytes = self.head.weight.shape[0] * 4
        chunk_size = max(1, logits_bytes(self.room) // token_bytes)
        losses = []
        for start in range(0, len(states), chunk_size):
            chunk = slice(start, start + chunk_size)
            logits = self.logits(states[chunk])
            reference = logits[:0]
            if dense is not None:
                reference = self.logits(dense[chunk].to(self.home))
            losses.append(compute_loss(logits, batch.targets[chunk], reference))
        rows, length = batch.input_ids.shape
        positions = rows * (length - 1)
        by_position = torch.zeros(positions, dtype=torch.float64, device=states.device)
        by_position[batch.places] = torch.cat(losses).double()
        return by_position.view(rows, -1).sum(dim=1)

    def _set_batch_tokens(self, batch_tokens: int | str, reserved: int = 0) -> None:
        """Set the padded tokens of a batch. "auto" is as many as the device holds beside the
        weights and `reserved` bytes.

        What is free at the moment plays no role: in bf16 and fp16 the batch shape moves a loss, so
        the same model on the same kind of device always gets the same batches. Where others use the
        device, batches are halved (`run`).
        """
        config = self.model.config
        itemsize = self.head.weight.element_size()
        self.limit = None
        self.growth = 0.0
        self.room = None
        if self._on_gpu:
            free = room_beside(self.model, self.home) - reserved
            self.room = max(0, free)
        if batch_tokens != "auto":
            self._batch_tokens = int(batch_tokens)
        elif self.room is None:
            self._batch_tokens = CPU_BATCH_TOKENS
        else:
            inner = inner_size(config.to_dict())
            token_bytes = live_numbers(config.hidden_size, inner) * itemsize
            room = self.room - self.room // DENSE_SHARE - 4 * logits_bytes(self.room)
            smallest, largest = GPU_BATCH_TOKENS
            fitting = room // token_bytes
            self._batch_tokens = max(smallest, min(largest, fitting))
            # Eager attention holds every head's map twice, and its softmax in float32.
            if config._attn_implementation == "eager":
                map_bytes = 2 * itemsize + 4
                self.growth = config.num_attention_heads * map_bytes / token_bytes


def late(launched: Iterable[Unread], depth: int) -> Iterator[Unread]:
    """Yield each item once `depth` further items are launched, or none is left to launch. `depth`
    devices, each with some layers, then compute while a value is read."""
    queue = deque[Unread]()
    try:
        for item in launched:
            queue.append(item)
            if len(queue) > depth:
                yield queue.popleft()
    except RuntimeError:
        yield from queue
        raise
    yield from queue
