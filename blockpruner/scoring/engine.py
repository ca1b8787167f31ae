"""The scoring engine: losses of a model under many masks; the shared part of their forward passes is computed once.

Decides the arithmetic. The decoder is walked once for all masks (`walk`), with a hidden state as the state. Each mask
sees the same operations as in a full forward pass, so its loss is equal to rounding; a branch takes one extra hidden
state of memory. Which masks are scored, and what is done with the values, is decided by the caller.
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

from blockpruner.core.blocks import DENSE, BlockId, BlockKind, Mask, format_mask, sorted_blocks
from blockpruner.core.errors import DeviceMemoryError, NonFiniteLossError
from blockpruner.model import accelerator
from blockpruner.model.models import decoder_layers, model_family, placement
from blockpruner.scoring.losses import token_nll
from blockpruner.scoring.metrics import Metric
from blockpruner.scoring.walk import Step, steps_of, walk
from blockpruner.scoring.work import LOGITS_BYTES, Rows, ScoredRows, Task, live_numbers, over_all_rows

REFERENCE = Metric("reference", "", title="", units_text="", formula="")
"""In tasks that the engine gives itself: the dense model's final states are kept for losses that compare with them."""


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right; pads follow every real token, so causal attention never sees them."""

    input_ids: Tensor  # [B, T] int64
    is_real: Tensor  # [B, T] bool
    is_target: Tensor  # [B, T-1] bool: position t predicts a real token t+1 that is scored
    packed: Tensor | None  # [N] int64: where the N real tokens lie among all B * T; None if there is no pad


LayerKwargs = tuple[dict[str, Any], ...]
"""For each layer, the arguments that the family's own decoder passes to it with the hidden state."""


class Engine:
    """Scores masks of one model, exactly.

    Args:
        model: a dense causal LM of a supported family, in eval mode; its layers may lie on several devices.
        batch_tokens: padded tokens to a batch of rows; "auto" is 1,024 on a CPU, and on CUDA what the device's
            memory holds, at most 65,536.
    """

    def __init__(self, model: PreTrainedModel, batch_tokens: int | str = "auto") -> None:
        family, config = model_family(model), model.config.to_dict()
        self._model, self._family = model, family
        self._decoder: nn.Module = attrgetter(family.decoder)(model)
        self._layers = decoder_layers(model)
        self._norm: nn.Module = attrgetter(family.final_norm)(model)
        self._head: nn.Linear = attrgetter(family.head)(model)
        self._cap: float | None = config[family.logit_cap] if family.logit_cap else None
        self._steps = steps_of(len(self._layers), family.is_parallel(config))
        self._batch_tokens = self._auto_batch_tokens() if batch_tokens == "auto" else int(batch_tokens)
        # the dense model's final states by row, from which its logits are made: H numbers a token, not V
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

    def placement(self) -> dict[str, str]:
        here = {"device": self._home.type, "device_name": accelerator.name(self._home)}
        return placement(self._model) | here | {"batch": f"{self._batch_tokens} tokens to a batch"}

    def run(self, tasks: Sequence[Task], rows: Rows) -> Iterator[ScoredRows]:
        """Yield the values of each task, in the order in which the walk reaches them.

        If the rows of a task do not fit into the device's memory, its finished masks are kept and the rest is halved;
        later batches are smaller too.

        Raises:
            NonFiniteLossError: a loss is NaN or infinite; names mask and row. Values yielded before are good.
            DeviceMemoryError: not even one row fits.
        """
        waiting = list(reversed(self.referenced(over_all_rows(tasks, rows), rows)))
        while waiting:
            task = waiting.pop()
            done: set[Mask] = set()
            try:
                for scored in (self._by_gradient if task.metric.gradient else self.score)(task, rows):
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

    def referenced(self, tasks: Sequence[Task], rows: Rows) -> list[Task]:
        """The tasks, after those that make known what their losses compare with."""
        spans = dict.fromkeys(task.span for task in tasks if task.metric.reference)
        missing = [span for span in spans if any(tuple(rows[i]) not in self._dense for i in span)]
        return [*(Task(span, (DENSE,), REFERENCE) for span in missing), *tasks]

    def close(self) -> None:
        """Nothing to give back."""

    def _halved(self, task: Task, rows: Rows, reason: str) -> list[Task]:
        span, longest = task.span, max(len(rows[i]) for i in task.span)
        if len(span) == 1 or task.metric.gradient:  # which is taken row by row, and not streamed
            streaming = "" if task.metric.influence else "set runtime.streaming: true, "
            raise DeviceMemoryError(
                f"one row of {longest} tokens does not fit into the device's memory beside the model ({reason}); "
                f"lower calibration.seq_len, {streaming}or use a larger device. Trials finished before are kept"
            )
        gc.collect()
        accelerator.empty_cache()
        self._batch_tokens = min(self._batch_tokens, longest * (len(span) // 2))
        middle = (span.start + span.stop) // 2
        return [replace(task, span=part) for part in (range(span.start, middle), range(middle, span.stop))]

    @torch.inference_mode()
    def score(self, task: Task, rows: Rows) -> Iterator[ScoredRows]:
        """One walk: the values of a task, with its rows as one batch."""
        batch = self._batch([rows[i] for i in task.span])
        embedded, layer_kwargs = self._prepare(batch.input_ids)
        if task.metric.influence:
            yield from self._influences(task, embedded, batch, layer_kwargs)
            return
        for masks, hidden in walk(self._steps, task.masks, embedded, partial(self._forward, batch, layer_kwargs)):
            yield from self._scored(masks, hidden, batch, task, rows)

    def _forward(
        self, batch: Batch, layer_kwargs: LayerKwargs, kept: Step, hidden: Tensor, added: dict[BlockId, Tensor]
    ) -> Tensor:
        """The residual stream after a step with only the `kept` blocks; `added` is what blocks add to `hidden`."""
        result = hidden
        for block in kept:
            if block not in added:
                added[block] = self._block(block, hidden, layer_kwargs, batch.packed)
            result = result.to(added[block].device) + added[block]
        return result

    def _block(self, block: BlockId, hidden: Tensor, layer_kwargs: LayerKwargs, packed: Tensor | None = None) -> Tensor:
        """What a block adds to the stream; an MLP, which sees each token alone, computes no pads if they are known."""
        layer, branch = self._layers[block.layer], self._family.branch(block.kind)
        module, states = getattr(layer, branch.module), hidden.to(self._device(block.layer))
        if branch.norm is not None:
            states = getattr(layer, branch.norm)(states)
        if block.kind is BlockKind.MHA:
            states = module(hidden_states=states, **layer_kwargs[block.layer])[0]
        elif packed is None:
            states = module(states)
        else:
            flat, places = states.flatten(0, 1), packed.to(states.device)
            real = module(flat[places][None])[0]
            states = real.new_zeros(len(flat), real.shape[-1]).index_copy(0, places, real).view(*states.shape[:2], -1)
        return states if branch.post is None else getattr(layer, branch.post)(states)  # type: ignore[no-any-return]

    def _device(self, layer: int) -> torch.device:
        return next(self._layers[layer].parameters()).device

    @property
    def _home(self) -> torch.device:
        """The device of token ids and head."""
        return self._head.weight.device

    def _scored(
        self, masks: Sequence[Mask], hidden: Tensor, batch: Batch, task: Task, rows: Rows
    ) -> Iterator[ScoredRows]:
        """The values of masks at the end of their walk; the reference is kept and yields none."""
        keys = [tuple(rows[i]) for i in task.span]
        states = self._final_states(hidden, batch)
        if task.metric == REFERENCE:
            parts = torch.split(states.cpu(), batch.is_target.sum(dim=1).tolist())
            self._dense.update(zip(keys, parts, strict=True))
            return
        dense = torch.cat([self._dense[key] for key in keys]) if task.metric.reference else states[:0]
        values = self._losses(states, dense, batch, task.metric)
        for mask in masks:
            yield self._finite(mask, values, task)

    def _finite(self, mask: Mask, values: Sequence[float], task: Task) -> ScoredRows:
        for offset, value in enumerate(values):
            if not math.isfinite(value):
                raise NonFiniteLossError(
                    f"the loss of row {task.span.start + offset} is {value} with mask "
                    f"{format_mask(mask) or '(dense)'}; try a wider dtype (model.dtype: float32), or leave the row "
                    "out of the calibration set. Trials finished before are kept"
                )
        return ScoredRows(mask, task.span.start, tuple(values))

    def _influences(self, task: Task, hidden: Tensor, batch: Batch, layer_kwargs: LayerKwargs) -> Iterator[ScoredRows]:
        """One pass without `task.base`; a unit is yielded after its last layer."""
        influence, wide = task.metric.compute, torch.promote_types(hidden.dtype, torch.float32)
        units = {mask: sorted(mask - task.base, key=lambda block: (block.layer, block.order)) for mask in task.masks}
        per_layer = len(self._steps) // self.layers
        reads, adds = dict[BlockId, Tensor](), dict[BlockId, Tensor]()
        for layer in range(self.layers):
            for step in self._steps[layer * per_layer : (layer + 1) * per_layer]:
                kept = tuple(block for block in step if block not in task.base)
                reads |= dict.fromkeys(kept, hidden)
                hidden = self._forward(batch, layer_kwargs, kept, hidden, adds)
            for mask in [mask for mask, unit in units.items() if unit[-1].layer == layer]:
                first, *others = units.pop(mask)
                f = adds[first].to(wide)
                for block in others:
                    f = f + adds[block].to(f)
                yield self._finite(mask, influence(reads[first].to(f), f, batch.is_real.to(f.device)).tolist(), task)
            open_from = min((unit[0].layer for unit in units.values()), default=self.layers)
            for states in (reads, adds):  # a state is kept as long as a unit began at it
                for block in [block for block in states if block.layer < open_from]:
                    del states[block]

    def _by_gradient(self, task: Task, rows: Rows) -> Iterator[ScoredRows]:
        """Influences from backward passes without `task.base`, row by row; all rows of a unit at once."""
        units = {mask: self._weights_of(mask - task.base) for mask in task.masks}
        kept = [tuple(block for block in step if block not in task.base) for step in self._steps]
        weights = list(dict.fromkeys(weight for own in units.values() for weight in own))

        @torch.enable_grad()
        def gradients(row: int) -> dict[Tensor, Tensor]:
            batch = self._batch([rows[row]])
            hidden, layer_kwargs = self._prepare(batch.input_ids)
            for step in kept:
                hidden = self._forward(batch, layer_kwargs, step, hidden, {})
            logits = self._logits(self._final_states(hidden, batch))
            loss = token_nll(logits, batch.input_ids[:, 1:][batch.is_target]).mean()
            found = torch.autograd.grad(loss, weights, allow_unused=True)  # an expert may see no token
            return {weight: part for weight, part in zip(weights, found, strict=True) if part is not None}

        before = [weight.requires_grad for weight in weights]
        try:
            for weight in weights:
                weight.requires_grad_(True)
            values = task.metric.compute(units, gradients, len(rows))
        finally:
            for weight, was in zip(weights, before, strict=True):
                weight.requires_grad_(was)
        for mask in task.masks:
            yield self._finite(mask, values[mask], task)

    def _weights_of(self, unit: Mask) -> list[nn.Parameter]:
        """Of norms and modules, without biases."""
        parts = [
            getattr(self._layers[block.layer], name)
            for block in sorted_blocks(unit)
            for name in (*self._family.branch(block.kind).norms, self._family.branch(block.kind).module)
        ]
        named = (pair for part in parts for pair in part.named_parameters())
        return [parameter for name, parameter in named if not name.endswith("bias")]

    def _prepare(self, input_ids: Tensor) -> tuple[Tensor, LayerKwargs]:
        """Embedded rows [B, T, H], and the arguments of each layer.

        Runs the family's own decoder with a recorder in place of every layer. All that the decoder does before and
        between its layers (embedding scale, rotary tables, masks of a layer) is thus its own, not rewritten here.
        """
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
        packed = None if is_real.all() else is_real.flatten().nonzero()[:, 0].to(self._home)
        return Batch(ids.to(self._home), is_real.to(self._home), is_target.to(self._home), packed)

    def _final_states(self, hidden: Tensor, batch: Batch) -> Tensor:
        """The states that the head reads where it predicts a target, row by row: [N, H] for N targets of the batch."""
        normed: Tensor = self._norm(hidden[:, :-1].to(next(self._norm.parameters()).device))
        return normed.to(self._home)[batch.is_target]

    def _losses(self, states: Tensor, dense: Tensor, batch: Batch, metric: Metric) -> list[float]:
        """Mean over each row's targets, summed in float64; logits in chunks of tokens.

        Args:
            states, dense: final states of the masked and of the dense model, [N, H]; dense may be empty if not needed.
        """
        token_loss, chunk = metric.compute, max(1, LOGITS_BYTES // (self._head.weight.shape[0] * 4))
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
        """As many tokens as nine tenths of the device hold beside the weights, and beside `held` bytes to come.

        What is free at the moment has no part in it: in 16 bits the batch shape moves a loss, so the same model on the
        same kind of device always gets the same batches. Where others use the device, batches are halved (`run`).
        """
        if self._home.type == "cpu":
            return 1024
        total = accelerator.total_memory(self._home)
        weights = sum(weight.nbytes for weight in self._model.parameters() if weight.device == self._home)
        config = self._model.config
        numbers = live_numbers(config.hidden_size, config.intermediate_size)
        fitting = (total * 9 // 10 - weights - held - 4 * LOGITS_BYTES) // (numbers * self._head.weight.element_size())
        return int(max(2048, min(65536, fitting)))


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every tensor within nested dicts and tuples changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: map_tensors(item, change) for key, item in value.items()}
    return tuple(map_tensors(item, change) for item in value) if isinstance(value, tuple) else value
