"""The scoring engine: NLL of a model under many masks, the shared part of their forward passes computed once.

Decides the arithmetic of one trial. For any set of masks the decoder is walked once, block by block; masks that
agree on all blocks so far share their hidden state, and where they part, the walk branches:

    walk(block j, state h, masks):
        one mask set has block j removed -> walk(j + 1, h)
        the others keep it               -> walk(j + 1, block_j(h))

For a greedy iteration over n live blocks that is n + n(n-1)/2 block forwards instead of n(n-1), the same
operations for each mask as a full forward (so equal to rounding), and one extra hidden state in memory.
Which masks are asked for, and what is done with the values, is decided above.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blockpruner.blocks import BlockId, BlockKind, Mask, format_mask
from blockpruner.errors import NonFiniteLossError
from blockpruner.models import decoder_layers, model_family

LOGITS_BYTES = 64 * 2**20
"""Upper bound of the logits held at once; the head runs over as many tokens as fit."""


@dataclass(frozen=True)
class Unit:
    """The unit of work and of loss: rows [start, start + len(nll)) of one mask; mean NLL of each, nats per token."""

    mask: Mask
    start: int
    nll: tuple[float, ...]


@dataclass(frozen=True)
class _Batch:
    """Rows padded on the right; pads follow every real token, so causal attention never sees them."""

    input_ids: Tensor  # [B, T] int64
    is_target: Tensor  # [B, T-1] bool: position t predicts a real token t+1


@dataclass(frozen=True)
class _Prepared:
    """Embedded rows and, for each layer, the arguments that the family's own decoder passes to it."""

    hidden: Tensor  # [B, T, H]
    layer_kwargs: tuple[dict[str, Any], ...]


class Engine:
    """Scores masks of one model, exactly.

    Args:
        model: a dense causal LM of a supported family, in eval mode.
        batch_tokens: padded tokens to a batch of rows; "auto" is 1,024 on a CPU, and on CUDA what free memory
            holds at 24 hidden states a token, at most 65,536.
    """

    def __init__(self, model: PreTrainedModel, batch_tokens: int | str = "auto") -> None:
        row = model_family(model)
        self._model = model
        self._row = row
        self._decoder: nn.Module = attrgetter(row.decoder)(model)
        self._layers = decoder_layers(model)
        self._norm: nn.Module = attrgetter(row.final_norm)(model)
        self._head: nn.Linear = attrgetter(row.head)(model)
        self._sequence = [BlockId(kind, layer) for layer in range(len(self._layers)) for kind in BlockKind]
        self._batch_tokens = self._auto_batch_tokens() if batch_tokens == "auto" else int(batch_tokens)

    @property
    def layers(self) -> int:
        return len(self._layers)

    def row_batches(self, rows: Sequence[Sequence[int]]) -> list[range]:
        """Consecutive rows grouped so that the padded tokens of a group stay within the batch budget."""
        batches: list[range] = []
        start, longest = 0, 0
        for index, row in enumerate(rows):
            longest = max(longest, len(row))
            if index > start and longest * (index - start + 1) > self._batch_tokens:
                batches.append(range(start, index))
                start, longest = index, len(row)
        batches.append(range(start, len(rows)))
        return batches

    @torch.inference_mode()
    def score(self, masks: Sequence[Mask], rows: Sequence[Sequence[int]], span: range) -> Iterator[Unit]:
        """Yield each mask's NLL of the rows in `span`, in the order in which the walk reaches them.

        Raises:
            NonFiniteLossError: a loss is NaN or infinite; names mask and row. Units yielded before are good.
        """
        batch = self._batch([rows[i] for i in span])
        prepared = self._prepare(batch.input_ids)
        for mask, hidden in self._walk(0, prepared.hidden, list(masks), prepared):
            nll = self._nll(hidden, batch)
            for offset, value in enumerate(nll):
                if not math.isfinite(value):
                    raise NonFiniteLossError(
                        f"the loss of row {span.start + offset} is {value} with mask "
                        f"{format_mask(mask) or '(dense)'}; try a wider dtype (model.dtype: float32), or leave the "
                        "row out of the calibration set. Trials finished before are kept"
                    )
            yield Unit(mask, span.start, tuple(nll))

    def _walk(
        self, position: int, hidden: Tensor, masks: list[Mask], prepared: _Prepared
    ) -> Iterator[tuple[Mask, Tensor]]:
        while position < len(self._sequence):
            block = self._sequence[position]
            without = [mask for mask in masks if block in mask]
            masks = [mask for mask in masks if block not in mask]
            if without and masks:
                yield from self._walk(position + 1, hidden, without, prepared)
            elif without:
                masks = without
                position += 1
                continue
            hidden = self._forward(block, hidden, prepared)
            position += 1
        for mask in masks:
            yield mask, hidden

    def _forward(self, block: BlockId, hidden: Tensor, prepared: _Prepared) -> Tensor:
        layer, branch = self._layers[block.layer], self._row.branch(block.kind)
        normed = getattr(layer, branch.norm)(hidden)
        module = getattr(layer, branch.module)
        if block.kind is BlockKind.MHA:
            out = module(hidden_states=normed, **prepared.layer_kwargs[block.layer])[0]
        else:
            out = module(normed)
        return hidden + out  # type: ignore[no-any-return]

    def _prepare(self, input_ids: Tensor) -> _Prepared:
        """Run the family's own decoder with every layer replaced by a recorder: whatever it does before and
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
        return _Prepared(recorded[0][0], tuple(kwargs for _, kwargs in recorded))

    def _batch(self, rows: Sequence[Sequence[int]]) -> _Batch:
        device = self._head.weight.device
        longest = max(len(row) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        lengths = torch.tensor([len(row) for row in rows])
        is_target = torch.arange(1, longest)[None, :] < lengths[:, None]
        return _Batch(ids.to(device), is_target.to(device))

    def _nll(self, hidden: Tensor, batch: _Batch) -> list[float]:
        """Mean over each row's real targets of -log p(token), summed in float64; logits in chunks of tokens."""
        states = self._norm(hidden[:, :-1])[batch.is_target]  # [N, H], N real targets
        targets = batch.input_ids[:, 1:][batch.is_target]  # [N]
        chunk = max(1, LOGITS_BYTES // (self._head.weight.shape[0] * 4))
        losses = [
            token_nll(self._head(part), target)
            for part, target in zip(torch.split(states, chunk), torch.split(targets, chunk), strict=True)
        ]
        total = torch.zeros(batch.is_target.shape, dtype=torch.float64, device=hidden.device)
        total[batch.is_target] = torch.cat(losses).double()
        means: list[float] = (total.sum(dim=1) / batch.is_target.sum(dim=1)).tolist()
        return means

    def _auto_batch_tokens(self) -> int:
        device = self._head.weight.device
        if device.type != "cuda":
            return 1024
        free, _ = torch.cuda.mem_get_info(device)
        hidden_bytes = self._head.weight.shape[1] * self._head.weight.element_size()
        return max(2048, min(65536, (free - 2 * LOGITS_BYTES) // (24 * hidden_bytes)))


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p(target) of each token, nats: log-sum-exp of the logits [N, V] less the target's logit; [N].

    In float32 at least. `cross_entropy` would do, but over a vocabulary of 49,152 its sum is off by 4e-6 on average,
    always to the same side; `logsumexp` is exact to 2e-6 and unbiased.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.logsumexp(dim=-1) - wide.gather(-1, targets[:, None])[:, 0]
