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
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blockpruner.blocks import BlockId, BlockKind, Mask, format_mask
from blockpruner.errors import DeviceMemoryError, NonFiniteLossError
from blockpruner.models import decoder_layers, model_family
from blockpruner.scoring.work import Rows, Task, Unit

LOGITS_BYTES = 64 * 2**20
"""Upper bound of the logits held at once; the head runs over as many tokens as fit."""


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right; pads follow every real token, so causal attention never sees them."""

    input_ids: Tensor  # [B, T] int64
    is_target: Tensor  # [B, T-1] bool: position t predicts a token t+1 that is neither a pad nor only given


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
        parallel = row.parallel(model.config.to_dict())
        self._steps = pairs if parallel else [(block,) for pair in pairs for block in pair]
        self._batch_tokens = self._auto_batch_tokens() if batch_tokens == "auto" else int(batch_tokens)

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
        waiting = list(reversed(tasks))
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
            waiting.extend(reversed(self._halved(Task(task.span, left), rows, reason)))

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
        return [Task(range(span.start, middle), task.masks), Task(range(middle, span.stop), task.masks)]

    @torch.inference_mode()
    def score(self, task: Task, rows: Rows) -> Iterator[Unit]:
        """One walk: the units of a task, with the rows of its span as one batch."""
        batch = self._batch([rows[i] for i in task.span])
        embedded, layer_kwargs = self._prepare(batch.input_ids)
        for masks, hidden in self._walk(range(len(self._steps)), embedded, task.masks, layer_kwargs):
            for mask in masks:
                yield self._unit(mask, hidden, batch, task.span)

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
        normed = getattr(layer, branch.norm)(hidden.to(self._device(block.layer)))
        module = getattr(layer, branch.module)
        if block.kind is BlockKind.MHA:
            return module(hidden_states=normed, **layer_kwargs[block.layer])[0]  # type: ignore[no-any-return]
        return module(normed)  # type: ignore[no-any-return]

    def _device(self, layer: int) -> torch.device:
        return next(self._layers[layer].parameters()).device

    @property
    def _home(self) -> torch.device:
        """Where token ids and head are."""
        return self._head.weight.device

    def _unit(self, mask: Mask, hidden: Tensor, batch: Batch, span: range) -> Unit:
        nll = self._nll(hidden, batch)
        for offset, value in enumerate(nll):
            if not math.isfinite(value):
                raise NonFiniteLossError(
                    f"the loss of row {span.start + offset} is {value} with mask {format_mask(mask) or '(dense)'}; "
                    "try a wider dtype (model.dtype: float32), or leave the row out of the calibration set. "
                    "Trials finished before are kept"
                )
        return Unit(mask, span.start, tuple(nll))

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
        tokens = torch.full((len(rows), max(len(row) for row in rows)), ~0, dtype=torch.int64)  # pads: given, id 0
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = torch.tensor(row)
        ids = torch.where(tokens < 0, ~tokens, tokens)
        return Batch(ids.to(self._home), (tokens[:, 1:] >= 0).to(self._home))

    def _nll(self, hidden: Tensor, batch: Batch) -> list[float]:
        """Mean over each row's real targets of -log p(token), summed in float64; logits in chunks of tokens."""
        normed = self._norm(hidden[:, :-1].to(next(self._norm.parameters()).device))
        states = normed.to(self._home)[batch.is_target]  # [N, H], N real targets
        targets = batch.input_ids[:, 1:][batch.is_target]  # [N]
        chunk = max(1, LOGITS_BYTES // (self._head.weight.shape[0] * 4))
        losses = [
            token_nll(self._head(part), target)
            for part, target in zip(torch.split(states, chunk), torch.split(targets, chunk), strict=True)
        ]
        total = torch.zeros(batch.is_target.shape, dtype=torch.float64, device=states.device)
        total[batch.is_target] = torch.cat(losses).double()
        means: list[float] = (total.sum(dim=1) / batch.is_target.sum(dim=1)).tolist()
        return means

    def _auto_batch_tokens(self, held: int = 0) -> int:
        """What fits beside the weights: those in memory already, and `held` bytes to come."""
        if self._home.type != "cuda":
            return 1024
        free, _ = torch.cuda.mem_get_info(self._home)
        config = self._model.config
        numbers = 12 * config.hidden_size + 4 * config.intermediate_size  # live at once for a token within a block
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


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p(target) of each token, nats: log-sum-exp of the logits [N, V] less the target's logit; [N].

    In float32 at least. `cross_entropy` would do, but over a vocabulary of 49,152 its sum is off by 4e-6 on average,
    always to the same side; `logsumexp` is exact to 2e-6 and unbiased.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.logsumexp(dim=-1) - wide.gather(-1, targets[:, None])[:, 0]
