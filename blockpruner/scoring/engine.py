"""The scoring engine: losses of a model under many masks; the shared part of their forward passes
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

REFERENCE = Metric("reference", "", title="", formula="")
"""In tasks that the engine gives itself: the dense model's final states are kept for losses that
compare with them."""

DENSE_SHARE = 16
"""The states of a reference stay on the device up to this part of its memory, in addition to the
weights."""

WIDE_NUMBERS = 2**22
"""On a GPU, masks are taken along at once up to so many numbers of their states. A kernel over
these takes longer than its launch (calculated, not measured)."""


@dataclass(frozen=True)
class Unread:
    """Losses that a device may still be computing."""

    masks: Sequence[Mask]
    sums: Tensor
    """[B] float64 on the CPU: of each row, over its targets."""
    counts: Tensor
    """[B]: the targets."""
    ready: torch.Event | None
    """When the sums have arrived; None on a CPU."""

    def means(self) -> list[float]:
        if self.ready is not None:
            self.ready.synchronize()
        means: list[float] = (self.sums / self.counts).tolist()
        return means


class Engine(Forward):
    """Scores masks of a model, exactly. `batch_tokens` are padded tokens to a batch of rows; "auto"
    is 1,024 on a CPU, and on a GPU what the device's memory holds, at most 65,536."""

    limit: int | None
    """No batch has more tokens than this; None: the memory alone decides."""
    growth: float
    """As in `work.row_batches`."""
    _streaming_fix = "set runtime.streaming: true, "

    def __init__(self, model: PreTrainedModel, batch_tokens: int | str = "auto") -> None:
        super().__init__(model)
        self._set_batch_tokens(batch_tokens)
        # the dense model's final states by row, from which its logits are made: H numbers a token,
        # not V
        self._dense: dict[tuple[int, ...], Tensor] = {}

    def row_batches(self, rows: Rows, span: Span) -> list[Span]:
        """Neighbouring rows grouped so that the padded tokens of a group stay within the batch
        budget."""
        return row_batches(rows, span, self._tokens, self.growth)

    @property
    def _tokens(self) -> int:
        return min(self._batch_tokens, self.limit or self._batch_tokens)

    def origin(self) -> Origin:
        device = processor() if self._home.type == "cpu" else accelerator.name(self._home)
        kernel = placement(self._model)["attention"]
        return computing() | {"device": device, "attention": kernel, "batch_tokens": self._tokens}

    def run(self, tasks: Sequence[Task], rows: Rows) -> Iterator[ScoredRows]:
        """Yield the values of each task, in the order in which the walk reaches them; those before
        an error are good.

        If the rows of a task do not fit into the device's memory, its finished masks are kept and
        the rest is halved; later batches are smaller too. Raises DeviceMemoryError if not even one
        row fits, and NonFiniteLossError for a loss of the dense model.
        """
        waiting = list(reversed(self.referenced(tasks, rows)))
        while waiting:
            task = waiting.pop()
            done: set[Mask] = set()
            try:
                for scored in self.score(task, rows):
                    done.add(scored.mask)
                    yield scored
            except RuntimeError as error:
                if not accelerator.is_out_of_memory(error):
                    raise
                reason = str(error).partition(". ")[0]
            else:
                continue
            # after the handler: its traceback keeps the tensors of the failed walk alive
            left = tuple(mask for mask in task.masks if mask not in done)
            waiting.extend(reversed(self._halved(replace(task, masks=left), rows, reason)))
            waiting = [part for task in waiting for part in reversed(self._in_batches(task, rows))]

    def referenced(self, tasks: Sequence[Task], rows: Rows) -> list[Task]:
        """The tasks, after those that make known what their losses compare with."""
        spans = dict.fromkeys(task.span for task in tasks if task.metric.reference)
        missing = [span for span in spans if any(tuple(rows[i]) not in self._dense for i in span)]
        return [*(Task(span, (DENSE,), REFERENCE) for span in missing), *tasks]

    def close(self) -> None:
        """Nothing to give back."""

    def _in_batches(self, task: Task, rows: Rows) -> list[Task]:
        return [replace(task, span=span) for span in self.row_batches(rows, task.span)]

    def _halved(self, task: Task, rows: Rows, reason: str) -> list[Task]:
        span, longest = task.span, max(len(rows[i]) for i in task.span)
        if self._width(len(span) * longest) > 1:  # first one mask at a time
            self._batch_tokens = len(span) * longest
            return [task]
        if len(span) == 1:
            streaming = "" if task.metric.influence else self._streaming_fix
            raise DeviceMemoryError(
                f"one row of {longest} tokens does not fit into the device's memory beside the"
                f" model ({reason}); lower calibration.seq_len, {streaming}or use a larger device."
                " Trials finished before are kept"
            )
        self._dense = {row: states.cpu() for row, states in self._dense.items()}
        gc.collect()
        accelerator.empty_cache()
        self._batch_tokens = min(self._batch_tokens, longest * (len(span) // 2))
        middle = len(span) // 2
        return [replace(task, span=part) for part in (span[:middle], span[middle:])]

    @torch.inference_mode()
    def score(self, task: Task, rows: Rows) -> Iterator[ScoredRows]:
        """One walk: the values of a task, with its rows as one batch."""
        batch = Batch.of([rows[i] for i in task.span], self._home)
        embedded, layer_kwargs = self._prepare(batch.input_ids)
        if task.metric.influence:
            yield from self._influences(task, embedded, batch, layer_kwargs)
            return
        width = self._width(batch.input_ids.numel())
        run = partial(self._added, batch, layer_kwargs, width)
        leaves = walk(self.steps, task.masks, embedded, run, joined, width)
        launched = (self._launched(masks, hidden, batch, task, rows) for masks, hidden in leaves)
        yield from self._values(launched, task)

    def _width(self, tokens: int) -> int:
        """How many masks may go along at once with a batch of so many padded tokens. On a CPU it
        would move bits."""
        most = WIDE_NUMBERS // self._model.config.hidden_size if self._on_gpu else 0
        return max(1, min(most, self._tokens) // tokens)

    def _added(
        self,
        batch: Batch,
        layer_kwargs: LayerKwargs,
        width: int,
        block: BlockId,
        states: Sequence[Tensor],
    ) -> Sequence[Tensor]:
        """What a block adds to each of some states of the batch, in one call. On a GPU a call
        always has `width` states, the last one again and again where there are fewer: the bits may
        depend on their number."""
        calls = [*states, *[states[-1]] * (width - len(states))] if self._on_gpu else states
        if len(calls) == 1:
            return [self._block(block, calls[0], layer_kwargs, batch.packed)]
        together = torch.cat([state.to(self._device(block.layer)) for state in calls])
        adds = self._block(block, together, layer_kwargs, batch.repeated(len(calls)))
        return torch.split(adds, len(batch.input_ids))[: len(states)]

    def _launched(
        self, masks: Sequence[Mask], hidden: Tensor, batch: Batch, task: Task, rows: Rows
    ) -> Unread:
        """The losses of masks at the end of their walk; of the reference, which is kept, there are
        none."""
        keys = [tuple(rows[i]) for i in task.span]
        states = self._final_states(hidden, batch)
        if task.metric == REFERENCE:
            held = sum(kept.nbytes for kept in self._dense.values() if kept.device == self._home)
            stays = self._room is not None and held + states.nbytes <= self._room // DENSE_SHARE
            parts = torch.split(states if stays else states.cpu(), batch.counts.tolist())
            self._dense.update(zip(keys, parts, strict=True))
            return Unread((), torch.zeros(len(keys)), batch.counts, None)
        dense = None
        if task.metric.reference:
            place = self._dense[keys[0]].device
            dense = torch.cat([self._dense[key].to(place) for key in keys])
        sums = self._losses(states, dense, batch, task.metric)
        here = sums.to("cpu", non_blocking=True)
        return Unread(masks, here, batch.counts, accelerator.mark(sums.device))

    def _values(self, launched: Iterable[Unread], task: Task) -> Iterator[ScoredRows]:
        """The values. A CPU computes nothing meanwhile, so there they are read at once: a kill
        loses what is not."""
        devices = {self._device(layer) for layer in range(self.layers)}
        for unread in late(launched, len(devices)) if self._on_gpu else launched:
            values = unread.means()
            for mask in unread.masks:
                yield self._finite(mask, values, task)

    def _finite(self, mask: Mask, values: Sequence[float], task: Task) -> ScoredRows:
        """The values, infinite where a mask makes the model overflow: a search then never chooses
        it."""
        of_dense = task.base == DENSE if task.metric.influence else mask == DENSE
        for offset, value in enumerate(values):
            if of_dense and not math.isfinite(value):
                raise NonFiniteLossError(
                    f"the loss of row {task.span[offset]} is {value} in the dense model; try a"
                    " wider dtype (model.dtype: float32), or leave the row out of the calibration"
                    " set. Trials finished before are kept"
                )
        return ScoredRows(
            mask, task.span, tuple(value if math.isfinite(value) else math.inf for value in values)
        )

    def _influences(
        self, task: Task, hidden: Tensor, batch: Batch, layer_kwargs: LayerKwargs
    ) -> Iterator[ScoredRows]:
        """One pass without `task.base`; a unit is yielded after its last layer."""
        influence, wide = task.metric.compute, torch.promote_types(hidden.dtype, torch.float32)
        units = {
            mask: sorted(mask - task.base, key=lambda block: (block.layer, block.order))
            for mask in task.masks
        }
        reads, adds = dict[BlockId, Tensor](), dict[BlockId, Tensor]()
        for layer in range(self.layers):
            for step in (step for step in self.steps if step[0].layer == layer):
                kept = tuple(block for block in step if block not in task.base)
                reads |= dict.fromkeys(kept, hidden)
                adds |= {
                    block: self._block(block, hidden, layer_kwargs, batch.packed) for block in kept
                }
                hidden = joined(hidden, [adds[block] for block in kept])
            for mask in [mask for mask, unit in units.items() if unit[-1].layer == layer]:
                first, *others = units.pop(mask)
                f = adds[first].to(wide)
                for block in others:
                    f = f + adds[block].to(f)
                yield self._finite(
                    mask,
                    influence(reads[first].to(f), f, batch.is_real.to(f.device)).tolist(),
                    task,
                )
            open_from = min((unit[0].layer for unit in units.values()), default=self.layers)
            for states in (reads, adds):  # a state is kept as long as a unit began at it
                for block in [block for block in states if block.layer < open_from]:
                    del states[block]

    def _losses(self, states: Tensor, dense: Tensor | None, batch: Batch, metric: Metric) -> Tensor:
        """The sum of each row's losses over its targets, [B] float64; logits in chunks of tokens.
        The states are final ones of the masked and of the dense model, [N, H], the latter only
        where they are needed."""
        token_loss, chunk = (
            metric.compute,
            max(1, logits_bytes(self._room) // (self._head.weight.shape[0] * 4)),
        )
        losses = []
        for start in range(0, len(states), chunk):
            part = slice(start, start + chunk)
            logits = self._logits(states[part])
            reference = logits[:0] if dense is None else self._logits(dense[part].to(self._home))
            losses.append(token_loss(logits, batch.targets[part], reference))
        rows, length = batch.input_ids.shape
        total = torch.zeros(rows * (length - 1), dtype=torch.float64, device=states.device)
        total[batch.places] = torch.cat(losses).double()
        return total.view(rows, length - 1).sum(dim=1)

    def _set_batch_tokens(self, batch_tokens: int | str, held: int = 0) -> None:
        """Set the padded tokens to a batch; "auto" is as many as the device holds, with so many
        bytes `held` by what comes beside those of the weights that are there.

        What is free at the moment has no part in it: in 16 bits the batch shape moves a loss, so
        the same model on the same kind of device always gets the same batches. Where others use the
        device, batches are halved (`run`).
        """
        config, item = self._model.config, self._head.weight.element_size()
        self._room = max(0, room_beside(self._model, self._home) - held) if self._on_gpu else None
        self.growth, self.limit = 0.0, None
        if batch_tokens != "auto":
            self._batch_tokens = int(batch_tokens)
        elif self._room is None:
            self._batch_tokens = 1024
        else:
            bytes_of_token = live_numbers(config.hidden_size, inner_size(config.to_dict())) * item
            room = self._room - self._room // DENSE_SHARE - 4 * logits_bytes(self._room)
            self._batch_tokens = int(max(2048, min(65536, room // bytes_of_token)))
            # every head's map, twice, and its softmax in float32
            if config._attn_implementation == "eager":
                self.growth = config.num_attention_heads * (2 * item + 4) / bytes_of_token


def late(launched: Iterable[Unread], depth: int) -> Iterator[Unread]:
    """Each item once so many more are launched, or no more can be: so many devices, each with some
    layers, compute."""
    held = deque[Unread]()
    try:
        for item in launched:
            held.append(item)
            if len(held) > depth:
                yield held.popleft()
    except RuntimeError:
        yield from held
        raise
    yield from held
