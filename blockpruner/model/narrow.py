"""Narrower MLPs in a live model: channels leave, with their rows of what reads and their columns of
what writes."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blockpruner.core.blocks import DENSE, BlockId, Channels
from blockpruner.core.errors import InputError
from blockpruner.model.classes import model_class
from blockpruner.model.models import decoder_layers, model_family, remove_, restored, shared_copy


@contextmanager
def narrowed(
    model: PreTrainedModel, channels: Mapping[BlockId, Channels]
) -> Iterator[PreTrainedModel]:
    """The model with narrower MLPs; restored on exit. Arguments and errors are those of
    `narrow_`."""
    with restored(model):
        _narrow_(model, channels)
        yield model


def narrow_(model: PreTrainedModel, channels: Mapping[BlockId, Channels]) -> PreTrainedModel:
    """Narrow MLPs of the model in place, for good, to the `channels` that each keeps; the tensors
    of the others stay as they are. Model and config become the block-pruned classes of the family.
    Raises InputError for a block that is no MLP of the model, or a channel that it does not
    have."""
    _narrow_(model, channels)
    model.__class__ = model_class(model_family(model))
    model._weight_conversions = []  # as in `prune_`
    return model


def _narrow_(model: PreTrainedModel, channels: Mapping[BlockId, Channels]) -> None:
    family, layers, config = model_family(model), decoder_layers(model), model.config
    width = int(config.intermediate_size)
    widths = [width] * len(layers)
    for block, kept in channels.items():
        whole = (
            getattr(layers[block.layer], family.mlp.module, None)
            if block.layer < len(layers)
            else None
        )
        if block.kind != "mlp" or whole is None or not kept or kept[-1] >= width:
            raise InputError(
                f"{block} cannot keep {len(kept)} channels up to {max(kept, default=None)}: the"
                f" model has {len(layers)} MLPs of {width} channels",
                rule="no-such-channels",
                key=str(block),
                value=len(kept),
            )
        mlp = shared_copy(whole)
        for name, child in mlp.named_children():
            if isinstance(child, nn.Linear):
                _narrow_linear_(child, list(kept), width, name == family.mlp.output)
        setattr(layers[block.layer], family.mlp.module, mlp)
        widths[block.layer] = len(kept)
    remove_(model, DENSE, range(len(layers)))
    config.mlp_widths = widths


def _narrow_linear_(linear: nn.Linear, kept: list[int], width: int, is_writer: bool) -> None:
    """Leave these channels; a reader may hold several matrices, one above the other."""
    starts = range(0, linear.weight.shape[is_writer], width)
    index = torch.tensor(
        [channel + start for start in starts for channel in kept], device=linear.weight.device
    )
    weight, bias = linear.weight.index_select(int(is_writer), index), linear.bias
    if bias is not None and not is_writer:
        bias = _parameter(bias.index_select(0, index), bias)
    linear.out_features, linear.in_features = weight.shape
    linear.weight, linear.bias = _parameter(weight, linear.weight), bias


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(
        value.detach().clone(memory_format=torch.contiguous_format), like.requires_grad
    )
