"""A model's forward pass in pieces: the embedded rows, what single blocks add to the stream, final
states, logits.

Decides how each piece is computed, by the model's own modules and on their devices. In which order,
and for which masks, is decided by those who use it (`engine`).
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blockpruner.core.blocks import BlockId, BlockKind
from blockpruner.model.models import decoder_layers, head_of, model_family
from blockpruner.scoring.batches import Batch
from blockpruner.scoring.walk import steps_of

LayerKwargs = tuple[dict[str, Any], ...]
"""For each layer, the arguments that the family's own decoder passes to it with the hidden state,
for one row: they are those of every row."""


class Forward:
    """The pieces of one model: a dense causal LM of a supported family, in eval mode; its layers
    may lie on several devices."""

    def __init__(self, model: PreTrainedModel) -> None:
        family, config = model_family(model), model.config.to_dict()
        self._model, self._family = model, family
        self._decoder: nn.Module = attrgetter(family.decoder)(model)
        self._layers = decoder_layers(model)
        self._norm: nn.Module = attrgetter(family.final_norm)(model)
        self._head: nn.Linear = attrgetter(family.head)(model)
        self._logits = head_of(model)
        self._scale: float | None = config[family.added_scale] if family.added_scale else None
        self.steps = steps_of(len(self._layers), family.is_parallel(config))
        self._on_gpu = self._home.type != "cpu"
        # cuBLAS may else add up parts of a 16-bit product in 16 bits; when it does depends on the
        # shape
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

    @property
    def layers(self) -> int:
        return len(self._layers)

    @property
    def _home(self) -> torch.device:
        """The device of token ids and head."""
        return self._head.weight.device

    def _prepare(self, input_ids: Tensor) -> tuple[Tensor, LayerKwargs]:
        """Embedded rows [B, T, H], and the arguments of each layer.

        Runs the family's own decoder with a recorder in place of every layer. All that the decoder
        does before and between its layers (embedding scale, rotary tables, masks of a layer) is
        thus its own, not rewritten here. Nothing in the arguments depends on a row's tokens, so
        those of one row serve any number of rows.
        """
        recorded = self._recorded(input_ids[:1])

        @cache  # layers share masks, which may be large
        def move(tensor: Tensor, device: torch.device) -> Tensor:
            return tensor.to(device)

        layer_kwargs = tuple(
            map_tensors(kwargs, partial(move, device=self._device(layer)))
            for layer, (_, kwargs) in enumerate(recorded)
        )
        hidden = recorded[0][0] if len(input_ids) == 1 else self._recorded(input_ids)[0][0]
        return hidden, layer_kwargs

    def _recorded(self, input_ids: Tensor) -> list[tuple[Tensor, dict[str, Any]]]:
        """What the decoder passes to each of its layers."""
        recorded: list[tuple[Tensor, dict[str, Any]]] = []

        def record(hidden: Tensor, **kwargs: Any) -> Tensor:
            recorded.append((hidden, kwargs))
            return hidden

        # accelerate's, where a device map is used
        hooks = [layer.__dict__.get("forward") for layer in self._layers]
        for layer in self._layers:
            layer.forward = (
                record  # an instance attribute: shadows the class's method until deleted
            )
        try:
            self._decoder(input_ids=input_ids, use_cache=False)
        finally:
            for layer, hook in zip(self._layers, hooks, strict=True):
                del layer.forward
                if hook is not None:
                    layer.forward = hook
        return recorded

    def _block(
        self,
        block: BlockId,
        hidden: Tensor,
        layer_kwargs: LayerKwargs,
        packed: Tensor | None = None,
    ) -> Tensor:
        """What a block adds to the stream; an MLP, which sees each token alone, computes no pads if
        they are known."""
        layer, branch = self._layers[block.layer], self._family.branch(block.kind)
        name, states = branch.names(layer)[0], hidden.to(self._device(block.layer))
        module = getattr(layer, name)
        if branch.norm is not None:
            states = getattr(layer, branch.norm)(states)
        if block.kind is BlockKind.MHA:
            given = layer_kwargs[block.layer]
            if name == branch.module:
                states = module(hidden_states=states, **given)[0]
            else:  # a linear attention takes no positions
                states = module(
                    hidden_states=states, **{k: v for k, v in given.items() if "position" not in k}
                )
        elif packed is None:
            states = module(states)
        else:
            flat, places = states.flatten(0, 1), packed.to(states.device)
            real = module(flat[places][None])[0]
            states = (
                real.new_zeros(len(flat), real.shape[-1])
                .index_copy(0, places, real)
                .view(*states.shape[:2], -1)
            )
        added: Tensor = states if branch.post is None else getattr(layer, branch.post)(states)
        return added if self._scale is None else added * self._scale

    def _device(self, layer: int) -> torch.device:
        found = self._layers[layer]
        return getattr(found, "visits", None) or next(found.parameters()).device

    def _final_states(self, hidden: Tensor, batch: Batch) -> Tensor:
        """The states that the head reads where it predicts a target, row by row: [N, H] for N
        targets of the batch."""
        normed: Tensor = self._norm(hidden[:, :-1].to(next(self._norm.parameters()).device))
        return normed.to(self._home).flatten(0, 1)[batch.places]


def joined(hidden: Tensor, adds: Sequence[Tensor]) -> Tensor:
    """The residual stream after a step, from the stream before it and what its blocks add."""
    for added in adds:
        hidden = hidden.to(added.device) + added
    return hidden


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every tensor within nested dicts and tuples changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: map_tensors(item, change) for key, item in value.items()}
    return tuple(map_tensors(item, change) for item in value) if isinstance(value, tuple) else value
