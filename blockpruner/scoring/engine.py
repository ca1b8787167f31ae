"""The scoring engine: NLL of a model under many masks, the shared part of their forward passes computed once.

Decides the arithmetic of one unit. For any set of masks the decoder is walked once, step by step; masks that
agree on all steps so far share their hidden state, and where they part, the walk branches:

    walk(step j, state h, masks):
        the masks without block j    -> walk(j + 1, h)
        the others                   -> walk(j + 1, h + block_j(h))

For a greedy iteration over n live blocks that is n + n(n-1)/2 block forwards instead of n(n-1), the same
operations for each mask as a full forward (so equal to rounding), and one extra hidden state in memory.
A step is one block, or a whole layer where MHA and MLP both read the layer's input (parallel residual).
Which masks are asked for, and what is done with the values, is decided above.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blockpruner.core.blocks import DENSE, BlockId, BlockKind, Mask, format_mask
from blockpruner.core.errors import DeviceMemoryError, NonFiniteLossError
from blockpruner.model.models import decoder_layers, model_family
from blockpruner.scoring.influences import INFLUENCES
from blockpruner.scoring.losses import LOSSES
from blockpruner.scoring.metrics import METRICS
from blockpruner.scoring.work import LOGITS_BYTES, Rows, Task, Unit, live_numbers

REFERENCE = "reference"
"""The loss of a task that is asked for by the engine alone: what the dense model says, kept for those that compare."""

REFERENCED = frozenset(metric.loss for metric in METRICS.values() if metric.reference)


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right; pads follow every real token, so causal attention never sees them."""

    input_ids: Tensor  # [B, T] int64
    is_real: Tensor  # [B, T] bool
    is_target: Tensor  # [B, T-1] bool: position t predicts a real token t+1 that is scored


LayerKwargs = tuple[dict[str, Any], ...]
"""For each layer, the arguments that the family's own decoder passes to it beside the hidden state."""


class Engine:
    """Scores masks of one model, exactly.

    Args:
        model: a dense causal LM of a supported family, in eval mode; its layers may lie on several devices.
        batch_tokens: padded tokens to a batch of rows; "auto" is 1,024 on a CPU, and on CUDA what free memory
            holds, at most 65,536.
    """

    def __init__(self, model: PreTrainedModel, batch_tokens: int | str = "auto") -> None:
        row = model_family(model)
        self._model = model
        self._row = row
        self._decoder: nn.Module = attrgetter(row.decoder)(model)
        self._layers = decoder_layers(model)
        self._norm: nn.Module = attrgetter(row.final_norm)(model)
        self._head: nn.Linear = attrgetter(row.head)(model)
        pairs = [tuple(BlockId(kind, layer) for kind in BlockKind) for layer in range(len(self._layers))]
        config = model.config.to_dict()
        parallel = row.is_parallel(config)
        self._cap: float | None = config[row.logit_cap] if row.logit_cap else None
        self._steps = pairs if parallel else [(block,) for pair in pairs for block in pair]
        self._batch_tokens = self._auto_batch_tokens() if batch_tokens == "auto" else int(batch_tokens)
        # what the dense model's log-probabilities are made of, by row: H numbers a token, not V
        self._dense: dict[tuple[int, ...], Tensor] = {}

    @property
    def layers(self) -> int:
        return len(self._layers)

    def row_batches(self, rows: Rows, span: range) -> list[range]:
        """Consecutive rows grouped so that the padded tokens of a group stay within the batch budget."""
        batches: list[range] = []
        start, longest = span.start, 0
        for index in span:
            longest = max(longest, len(rows[index]))
            if index > start and longest * (index - start + 1) > self._batch_tokens:
                batches.append(range(start, index))
                start, longest = index, len(rows[index])
        batches.append(range(start, span.stop))
        return batches

    def run(self, tasks: Sequence[Task], rows: Rows) -> Iterator[Unit]:
        """Yield the units of each task, in the order in which the walk reaches them.

        A task whose rows do not fit into the device's memory is halved, its finished units kept; batches asked for
        later are smaller too.

        Raises:
            NonFiniteLossError: a loss is NaN or infinite; names mask and row. Units yielded before are good.
            DeviceMemoryError: not even one row fits.
        """
        waiting = list(reversed(self.referenced(tasks, rows)))
        while waiting:
            task = waiting.pop()
            done: set[Mask] = set()
            try:
                for unit in self.score(task, rows):
                    done.add(unit.mask)
                    yield unit
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).partition(". ")[0]
            else:
                continue
            # outside of the handler, whose traceback would keep the failed walk's tensors alive
            left = tuple(mask for mask in task.masks if mask not in done)
            waiting.extend(reversed(self._halved(replace(task, masks=left), rows, reason)))

    def referenced(self, tasks: Sequence[Task], rows: Rows) -> list[Task]:
        """The tasks, and before them those of the dense model that their losses compare with and that are not known."""
        spans = dict.fromkeys(task.span for task in tasks if task.loss in REFERENCED)
        missing = [span for span in spans if any(tuple(rows[i]) not in self._dense for i in span)]
        return [*(Task(span, (DENSE,), REFERENCE) for span in missing), *tasks]

    def close(self) -> None:
        """Nothing to give back."""

    def _halved(self, task: Task, rows: Rows, reason: str) -> list[Task]:
        span, longest = task.span, max(len(rows[i]) for i in task.span)
        if len(span) == 1:
            raise DeviceMemoryError(
                f"one row of {longest} tokens does not fit into the device's memory beside the model ({reason}); "
                "lower calibration.seq_len, set runtime.streaming: true, or use a larger device. "
                "Trials finished before are kept"
            )
        gc.collect()
        torch.cuda.empty_cache()
        self._batch_tokens = min(self._batch_tokens, longest * (len(span) // 2))
        middle = (span.start + span.stop) // 2
        return [replace(task, span=part) for part in (range(span.start, middle), range(middle, span.stop))]

    @torch.inference_mode()
    def score(self, task: Task, rows: Rows) -> Iterator[Unit]:
        """One walk: the units of a task, with the rows of its span as one batch."""
        batch = self._batch([rows[i] for i in task.span])
        embedded, layer_kwargs = self._prepare(batch.input_ids)
        if task.loss in INFLUENCES:
            yield from self._influences(task, embedded, batch, layer_kwargs)
            return
        for masks, hidden in self._walk(range(len(self._steps)), embedded, task.masks, layer_kwargs):
            yield from self._units(masks, hidden, batch, task, rows)

    def _walk(
        self, steps: range, hidden: Tensor, masks: Sequence[Mask], layer_kwargs: LayerKwargs
    ) -> Iterator[tuple[Sequence[Mask], Tensor]]:
        """The masks that agree on all of `steps`, with their hidden state after them, group by group."""
        for position in steps:
            *branches, (kept, masks) = self._parts(position, masks)
            added: dict[BlockId, Tensor] = {}
            later = range(position + 1, steps.stop)
            for keep, part in branches:
                yield from self._walk(later, self._forward(keep, hidden, layer_kwargs, added), part, layer_kwargs)
            hidden = self._forward(kept, hidden, layer_kwargs, added)
        yield masks, hidden

    def _parts(self, position: int, masks: Sequence[Mask]) -> list[tuple[tuple[BlockId, ...], list[Mask]]]:
        """The masks by the blocks that they keep of a step, fewest blocks first."""
        parts: dict[tuple[BlockId, ...], list[Mask]] = {}
        for mask in masks:
            parts.setdefault(tuple(block for block in self._steps[position] if block not in mask), []).append(mask)
        return sorted(parts.items(), key=lambda part: len(part[0]))

    def _forward(
        self, keep: Sequence[BlockId], hidden: Tensor, layer_kwargs: LayerKwargs, added: dict[BlockId, Tensor]
    ) -> Tensor:
        """The residual stream after a step of which only `keep` is left; `added` holds what blocks add to `hidden`."""
        result = hidden
        for block in keep:
            if block not in added:
                added[block] = self._block(block, hidden, layer_kwargs)
            result = result.to(added[block].device) + added[block]
        return result

    def _block(self, block: BlockId, hidden: Tensor, layer_kwargs: LayerKwargs) -> Tensor:
        layer, branch = self._layers[block.layer], self._row.branch(block.kind)
        module, states = getattr(layer, branch.module), hidden.to(self._device(block.layer))
        if branch.norm is not None:
            states = getattr(layer, branch.norm)(states)
        if block.kind is BlockKind.MHA:
            states = module(hidden_states=states, **layer_kwargs[block.layer])[0]
        else:
            states = module(states)
        return states if branch.post is None else getattr(layer, branch.post)(states)  # type: ignore[no-any-return]

    def _device(self, layer: int) -> torch.device:
        return next(self._layers[layer].parameters()).device

    @property
    def _home(self) -> torch.device:
        """Where token ids and head are."""
        return self._head.weight.device

    def _units(self, masks: Sequence[Mask], hidden: Tensor, batch: Batch, task: Task, rows: Rows) -> Iterator[Unit]:
        """The units of masks that have reached the end of their walk; none for the reference, which is kept."""
        keys = [tuple(rows[i]) for i in task.span]
        states = self._final_states(hidden, batch)
        if task.loss == REFERENCE:
            parts = torch.split(states.cpu(), batch.is_target.sum(dim=1).tolist())
            self._dense.update(zip(keys, parts, strict=True))
            return
        dense = torch.cat([self._dense[key] for key in keys]) if task.loss in REFERENCED else states[:0]
        values = self._losses(states, dense, batch, task.loss)
        for mask in masks:
            yield self._unit(mask, values, task)

    def _unit(self, mask: Mask, values: Sequence[float], task: Task) -> Unit:
        for offset, value in enumerate(values):
            if not math.isfinite(value):
                raise NonFiniteLossError(
                    f"the loss of row {task.span.start + offset} is {value} with mask "
                    f"{format_mask(mask) or '(dense)'}; try a wider dtype (model.dtype: float32), or leave the row "
                    "out of the calibration set. Trials finished before are kept"
                )
        return Unit(mask, task.span.start, tuple(values))

    def _influences(self, task: Task, hidden: Tensor, batch: Batch, layer_kwargs: LayerKwargs) -> Iterator[Unit]:
        """One pass without `task.base`; each unit when its last block is done. A unit lies within one layer."""
        influence, wide = INFLUENCES[task.loss], torch.promote_types(hidden.dtype, torch.float32)
        wanted: dict[int, list[Mask]] = {}
        for mask in task.masks:
            wanted.setdefault(max(block.layer for block in mask - task.base), []).append(mask)
        per_layer = len(self._steps) // self.layers
        for layer in range(self.layers):
            reads, adds = dict[BlockId, Tensor](), dict[BlockId, Tensor]()
            for step in self._steps[layer * per_layer : (layer + 1) * per_layer]:
                kept = [block for block in step if block not in task.base]
                reads |= dict.fromkeys(kept, hidden)
                hidden = self._forward(kept, hidden, layer_kwargs, adds)
            for mask in wanted.get(layer, []):
                unit = sorted(mask - task.base, key=lambda block: block.order)
                f = torch.stack([adds[block].to(wide) for block in unit]).sum(dim=0)
                x = reads[unit[0]].to(f)
                yield self._unit(mask, influence(x, f, batch.is_real.to(f.device)).tolist(), task)

    def _prepare(self, input_ids: Tensor) -> tuple[Tensor, LayerKwargs]:
        """Embedded rows [B, T, H], and what the layers are passed.

        Runs the family's own decoder with every layer replaced by a recorder: whatever it does before and
        between its layers (embedding scale, rotary tables, per-layer masks) is taken from it, not rewritten."""
        recorded: list[tuple[Tensor, dict[str, Any]]] = []

        def record(hidden: Tensor, **kwargs: Any) -> Tensor:
            recorded.append((hidden, kwargs))
            return hidden

        hooks = [layer.__dict__.get("forward") for layer in self._layers]  # accelerate's, where a device map is used
        for layer in self._layers:
            layer.forward = record  # an instance attribute: shadows the class's method until deleted
        try:
            self._decoder(input_ids=input_ids, use_cache=False)
        finally:
            for layer, hook in zip(self._layers, hooks, strict=True):
                del layer.forward
                if hook is not None:
                    layer.forward = hook
        layer_kwargs = tuple(
            map_tensors(kwargs, partial(Tensor.to, device=self._device(layer)))
            for layer, (_, kwargs) in enumerate(recorded)
        )
        return recorded[0][0], layer_kwargs

    def _batch(self, rows: Rows) -> Batch:
        longest = max(len(row) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        lengths = torch.tensor([len(row) for row in rows])
        is_real = torch.arange(longest)[None, :] < lengths[:, None]
        is_target = (is_real & (ids >= 0))[:, 1:]
        ids = torch.where(ids < 0, ~ids, ids)
        return Batch(ids.to(self._home), is_real.to(self._home), is_target.to(self._home))

    def _final_states(self, hidden: Tensor, batch: Batch) -> Tensor:
        """What the head reads where it predicts a target, [N, H], N targets of the batch, row by row."""
        normed: Tensor = self._norm(hidden[:, :-1].to(next(self._norm.parameters()).device))
        return normed.to(self._home)[batch.is_target]

    def _losses(self, states: Tensor, dense: Tensor, batch: Batch, loss: str) -> list[float]:
        """Mean over each row's targets, summed in float64; logits in chunks of tokens.

        Args:
            states, dense: of the masked and of the dense model, [N, H]; dense is empty where it is not needed.
        """
        token_loss, chunk = LOSSES[loss], max(1, LOGITS_BYTES // (self._head.weight.shape[0] * 4))
        targets = batch.input_ids[:, 1:][batch.is_target]  # [N]
        losses = []
        for start in range(0, len(states), chunk):
            part = slice(start, start + chunk)
            reference = self._logits(dense[part].to(self._home))
            losses.append(token_loss(self._logits(states[part]), targets[part], reference))
        total = torch.zeros(batch.is_target.shape, dtype=torch.float64, device=states.device)
        total[batch.is_target] = torch.cat(losses).double()
        means: list[float] = (total.sum(dim=1) / batch.is_target.sum(dim=1)).tolist()
        return means

    def _logits(self, states: Tensor) -> Tensor:
        logits: Tensor = self._head(states)
        return logits if self._cap is None else self._cap * torch.tanh(logits / self._cap)

    def _auto_batch_tokens(self, held: int = 0) -> int:
        """What fits beside the weights: those in memory already, and `held` bytes to come."""
        if self._home.type != "cuda":
            return 1024
        free, _ = torch.cuda.mem_get_info(self._home)
        config = self._model.config
        numbers = live_numbers(config.hidden_size, config.intermediate_size)
        fitting = (free - held - 4 * LOGITS_BYTES) // (numbers * self._head.weight.element_size())
        return int(max(2048, min(65536, fitting)))


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device's memory is used up: torch's own error, or a library's that could not allocate its workspace."""
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "CUDA error: out of memory" in said or "ALLOC_FAILED" in said


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every tensor within nested dicts and tuples changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: map_tensors(item, change) for key, item in value.items()}
    return tuple(map_tensors(item, change) for item in value) if isinstance(value, tuple) else value
