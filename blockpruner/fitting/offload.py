"""CPU offload with one layer on the device at a time, for a fit that has no room for all of them.

A layer is loaded when one of its modules is called, and stays until another one is. Its parameters
stay the same objects, and what was changed on the device is written back to the host's memory.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blockpruner.core.families import Config
from blockpruner.fitting.memory import fit_bytes
from blockpruner.model import accelerator
from blockpruner.model.models import decoder_layers, load_model, move_buffers_, resolve_device
from blockpruner.store.files import read_json

swap_: Any = torch.utils.swap_tensors  # untyped


def is_fitted_whole(config: Config, dtype: str, device: str) -> bool:
    """Whether `load_for_fit` puts the whole model on its device (or devices), without CPU
    offload."""
    target = resolve_device(device)
    if target.type == "cpu" or device == "split":
        return True
    return fit_bytes(config, dtype) <= accelerator.total_memory(target)


def load_for_fit(
    directory: Path, dtype: str, device: str, trust_remote_code: bool, attention: str = "auto"
) -> PreTrainedModel:
    """The model whose weights are fitted, on its device; with CPU offload if the device is too
    small for all layers."""
    config = read_json(directory / "config.json")
    if is_fitted_whole(config, dtype, device):
        return load_model(directory, dtype, device, trust_remote_code, attention)
    model = load_model(directory, dtype, "cpu", trust_remote_code, attention)
    offload_layers_(model, resolve_device(device))
    return model


@torch.inference_mode(False)
def offload_layers_(model: PreTrainedModel, device: torch.device) -> None:
    """Keep the layers of a model in the host's memory until they run, and all else on a device."""
    layers = decoder_layers(model)
    layer_weights = {id(weight) for weight in layers.parameters()}
    for weight in model.parameters():
        if id(weight) not in layer_weights:
            swap_(weight, _copy_on(weight, device))
    move_buffers_(model, device)
    loaded = list[tuple[Tensor, Tensor, int]]()
    for layer in layers:
        layer.compute_device = device  # type: ignore[assignment]  # torch types every attribute as a tensor or module
        load = _LayerLoader(layer, device, loaded)
        for module in layer.children():
            module.register_forward_pre_hook(load)
    _LayerLoader(layers[0], device, loaded)()


@dataclass(frozen=True)
class _LayerLoader:
    """A forward hook that brings a layer to the device, and the layer before it back."""

    layer: nn.Module
    device: torch.device
    loaded: list[tuple[Tensor, Tensor, int]]
    """The weights on the device, with their memory on the host and their version when they were
    loaded."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _LayerLoader:
        """The loader of a copied layer. Copies of a model share weights, so they share `loaded`."""
        return _LayerLoader(copy.deepcopy(self.layer, memo), self.device, self.loaded)

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, *_: Any) -> None:
        weights = list(self.layer.parameters())
        if all(weight.device == self.device for weight in weights):
            return
        for weight, host_weight, version in self.loaded:
            if weight._version != version:
                host_weight.copy_(weight)
            swap_(weight, host_weight)
        self.loaded.clear()
        for weight in weights:
            host_weight = _copy_on(weight, self.device)
            swap_(weight, host_weight)
            self.loaded.append((weight, host_weight, weight._version))


def _copy_on(weight: Tensor, device: torch.device) -> Tensor:
    return nn.Parameter(weight.detach().to(device), requires_grad=weight.requires_grad)
