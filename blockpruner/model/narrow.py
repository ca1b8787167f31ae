"""Narrower MLPs in a live model: a channel leaves with its rows of the gate and up projections and
its column of the down projection."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blockpruner.core.blocks import DENSE, BlockId, BlockKind, Channels
from blockpruner.core.errors import InputError
from blockpruner.model.models import (
    become_blockpruned_,
    decoder_layers,
    model_family,
    remove_,
    restored,
    shared_copy,
)


@contextmanager
def narrowed(
    model: PreTrainedModel, channels: Mapping[BlockId, Channels]
) -> Iterator[PreTrainedModel]:
    """The model with narrower MLPs; restored on exit. Arguments and errors are those of
    `narrow_`."""
    with restored(model):
        _replace_mlps_(model, channels)
        yield model


def narrow_(model: PreTrainedModel, channels: Mapping[BlockId, Channels]) -> PreTrainedModel:
    """Narrow MLPs of the model in place, for good, to the `channels` that each keeps.

    The tensors of other blocks stay as they are. Model and config become the block-pruned classes
    of the family. Raises InputError for a block that is no MLP of the model, or a channel that it
    does not have.
    """
    _replace_mlps_(model, channels)
    become_blockpruned_(model)
    return model


def _replace_mlps_(model: PreTrainedModel, channels: Mapping[BlockId, Channels]) -> None:
    family = model_family(model)
    layers = decoder_layers(model)
    dense_width = int(model.config.intermediate_size)
    widths = [dense_width] * len(layers)
    for block, kept_channels in channels.items():
        _check(block, kept_channels, model)
        layer = layers[block.layer]
        mlp = shared_copy(getattr(layer, family.mlp.module))
        for name, linear in mlp.named_children():
            if isinstance(linear, nn.Linear):
                dim = int(name == family.mlp.output)
                _keep_channels_(linear, kept_channels, dense_width, dim)
        setattr(layer, family.mlp.module, mlp)
        widths[block.layer] = len(kept_channels)
    # No block leaves, but the config gets the fields of a block-pruned model.
    remove_(model, DENSE, range(len(layers)))
    model.config.mlp_widths = widths


def _check(block: BlockId, channels: Channels, model: PreTrainedModel) -> None:
    """Raise InputError unless the block is an MLP of the model that has these channels."""
    layers = decoder_layers(model)
    width = int(model.config.intermediate_size)
    is_mlp = block.kind == BlockKind.MLP and block.layer < len(layers)
    if not is_mlp or not channels or channels[-1] >= width:
        raise InputError(
            f"{block} cannot keep {len(channels)} channels up to {max(channels, default=None)}: the"
            f" model has {len(layers)} MLPs of {width} channels",
            rule="no-such-channels",
            key=str(block),
            value=len(channels),
        )


def _keep_channels_(linear: nn.Linear, channels: Channels, dense_width: int, dim: int) -> None:
    """Leave only some channels: rows (`dim` 0) of a projection that writes them, columns (1) of the
    one that reads them."""
    weight = linear.weight
    # Phi-3 has the gate and the up projection in one matrix, one above the other.
    starts = torch.arange(0, weight.shape[dim], dense_width)
    index = starts[:, None] + torch.tensor(channels)
    index = index.flatten().to(weight.device)
    linear.weight = _selected(weight, index, dim)
    if linear.bias is not None and dim == 0:
        linear.bias = _selected(linear.bias, index, dim)
    linear.out_features, linear.in_features = linear.weight.shape


def _selected(parameter: Tensor, index: Tensor, dim: int) -> nn.Parameter:
    """Some rows or columns of a parameter, in memory of their own."""
    values = parameter.detach().index_select(dim, index)
    return nn.Parameter(values, parameter.requires_grad)
