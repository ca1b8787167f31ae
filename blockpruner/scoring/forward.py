"""A model's forward pass in pieces: the embedded rows, what single blocks add to the stream, final
states, logits.

Decides how each piece is computed, by the model's own modules and on their devices. The engine
decides in which order, and for which masks.
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
from blockpruner.scoring.walk import Step, steps_of

LayerKwargs = tuple[dict[str, Any], ...]
"""The arguments that the family's decoder passes to each layer with the hidden state, for one row.
They are the same for every row."""


class Forward:
    """The pieces of one model: a dense causal LM of a supported family, in eval mode; its layers
    may lie on several devices."""

    def __init__(self, model: PreTrainedModel) -> None:
        family = model_family(model)
        config = model.config.to_dict()
        self.model = model
        self.family = family
        self._decoder: nn.Module = attrgetter(family.decoder)(model)
        self.layers = decoder_layers(model)
        self._norm: nn.Module = attrgetter(family.final_norm)(model)
        self.head: nn.Linear = attrgetter(family.head)(model)
        self.logits = head_of(model)
        # Granite multiplies what each block adds by `residual_multiplier`.
        self.added_scale: float | None = config[family.added_scale] if family.added_scale else None
        self.steps = steps_of(len(self.layers), family.is_parallel(config))
        self._on_gpu = self.home.type != "cpu"
        # Else cuBLAS may sum parts of a bf16 or fp16 product in that dtype, for some shapes only.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

    def steps_of_layer(self, layer: int) -> list[Step]:
        return [step for step in self.steps if step[0].layer == layer]

    @property
    def home(self) -> torch.device:
        """The device of token ids and head."""
        return self.head.weight.device

    def prepare(self, input_ids: Tensor) -> tuple[Tensor, LayerKwargs]:
        """Embedded rows [B, T, H], and the arguments of each layer.

        Runs the family's own decoder with a recorder in place of every layer. So all that the
        decoder does before and between its layers (embedding scale, rotary tables, masks of a
        layer) is its own, not rewritten here. Nothing in the arguments depends on a row's tokens,
        so those of one row serve any number of rows.
        """
        recorded = self._recorded(input_ids[:1])

        @cache  # layers share masks, which may be large
        def move(tensor: Tensor, device: torch.device) -> Tensor:
            return tensor.to(device)

        layer_kwargs = []
        for layer, (_, kwargs) in enumerate(recorded):
            layer_kwargs.append(map_tensors(kwargs, partial(move, device=self.device_of(layer))))
        # The arguments came from one row; the embedded states are needed of all.
        if len(input_ids) > 1:
            recorded = self._recorded(input_ids)
        embedded, _ = recorded[0]
        return embedded, tuple(layer_kwargs)

    def _recorded(self, input_ids: Tensor) -> list[tuple[Tensor, dict[str, Any]]]:
        """The hidden state and the arguments that the decoder passes to each of its layers."""
        recorded: list[tuple[Tensor, dict[str, Any]]] = []

        def record(hidden: Tensor, **kwargs: Any) -> Tensor:
            recorded.append((hidden, kwargs))
            return hidden

        # accelerate has its own forward in the instance, where a device map is used
        forwards = [layer.__dict__.get("forward") for layer in self.layers]
        for layer in self.layers:
            layer.forward = record  # in the instance: shadows the class's method until deleted
        try:
            self._decoder(input_ids=input_ids, use_cache=False)
        finally:
            for layer, forward in zip(self.layers, forwards, strict=True):
                del layer.forward
                if forward is not None:
                    layer.forward = forward
        return recorded

    def run_block(
        self,
        block: BlockId,
        hidden: Tensor,
        layer_kwargs: LayerKwargs,
        packed: Tensor | None = None,
    ) -> Tensor:
        """What a block adds to the stream. An MLP, which sees each token alone, skips the pads if
        `packed` is there."""
        layer = self.layers[block.layer]
        branch = self.family.branch(block.kind)
        name = branch.names(layer)[0]
        module = getattr(layer, name)
        states = hidden.to(self.device_of(block.layer))
        if branch.norm is not None:
            states = getattr(layer, branch.norm)(states)
        if block.kind is BlockKind.MHA:
            kwargs = layer_kwargs[block.layer]
            if name == branch.module:
                states = module(hidden_states=states, **kwargs)[0]
            else:  # a linear attention takes no positions, and returns no attention weights
                kwargs = {key: value for key, value in kwargs.items() if "position" not in key}
                states = module(hidden_states=states, **kwargs)
        elif packed is None:
            states = module(states)
        else:
            states = _run_packed(module, states, packed.to(states.device))
        if branch.post is not None:
            states = getattr(layer, branch.post)(states)
        added: Tensor = states if self.added_scale is None else states * self.added_scale
        return added

    def device_of(self, layer: int) -> torch.device:
        module = self.layers[layer]
        return getattr(module, "compute_device", None) or next(module.parameters()).device

    def final_states(self, hidden: Tensor, batch: Batch) -> Tensor:
        """The states that the head reads where it predicts a target, row by row: [N, H] for N
        targets of the batch."""
        normed: Tensor = self._norm(hidden[:, :-1].to(next(self._norm.parameters()).device))
        return normed.to(self.home).flatten(0, 1)[batch.places]


def _run_packed(module: nn.Module, states: Tensor, packed: Tensor) -> Tensor:
    """The output of an MLP [B, T, H], computed for the tokens at `packed` only, else zero."""
    flat = states.flatten(0, 1)
    output = module(flat[packed][None])[0]
    zeros = output.new_zeros(len(flat), output.shape[-1])
    padded: Tensor = zeros.index_copy(0, packed, output)
    return padded.view(*states.shape[:2], -1)


def joined(hidden: Tensor, added: Sequence[Tensor]) -> Tensor:
    """The residual stream after a step, from the stream before it and what its blocks add."""
    # Where a model is split over devices, the stream moves along with its layers.
    for output in added:
        hidden = hidden.to(output.device) + output
    return hidden


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every tensor within nested dicts and tuples changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: map_tensors(item, change) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(map_tensors(item, change) for item in value)
    return value
